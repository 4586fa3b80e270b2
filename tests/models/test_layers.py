"""The modules beside PyTorch's and Transformers' of the same name, with the same state dict."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ponder.models import GPT, GPTConfig
from ponder.models.layers import (
    MLP,
    Attention,
    GatedMLP,
    LayerNorm,
    LinearCrossEntropyLoss,
    RMSNorm,
    Rotary,
)

from .peers import randomize

MLP_CONFIG = LlamaConfig(
    hidden_size=24,
    intermediate_size=40,
    num_attention_heads=2,
    mlp_bias=True,
    hidden_act="gelu",
)
PAIRS = {
    "RMSNorm": (RMSNorm(24, 1e-3), nn.RMSNorm(24, 1e-3)),
    "RMSNorm of Llama": (RMSNorm(24, 1e-3), LlamaRMSNorm(24, 1e-3)),
    "LayerNorm": (LayerNorm(24, 1e-3), nn.LayerNorm(24, 1e-3)),
    "LayerNorm without bias": (LayerNorm(24, bias=False), nn.LayerNorm(24, bias=False)),
    "GatedMLP": (GatedMLP(24, 40, "gelu", bias=True), LlamaMLP(MLP_CONFIG)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_in_the_place_of(name):
    ours, theirs = PAIRS[name]
    torch.manual_seed(0)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 24)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for y in (found, expected):
        (y * weights).sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_called_as_torchs_and_ligers_are():
    """The same calls and the same state dicts; Liger's own compute on a GPU alone."""
    options = dict(device="meta", dtype=torch.float64)
    for ours, theirs in ((RMSNorm, nn.RMSNorm), (LayerNorm, nn.LayerNorm)):
        found, expected = (kind(24, 1e-3, **options).state_dict() for kind in (ours, theirs))
        assert {n: (t.shape, t.dtype, t.device) for n, t in found.items()} == {
            n: (t.shape, t.dtype, t.device) for n, t in expected.items()
        }
    liger = pytest.importorskip("liger_kernel.transformers", reason="Liger is not installed")
    pairs = [
        (RMSNorm(24, 1e-3), liger.LigerRMSNorm(24, 1e-3)),
        (LayerNorm(24, 1e-3), liger.LigerLayerNorm(24, 1e-3, bias=True)),
        (
            GatedMLP(24, 40),
            liger.LigerSwiGLUMLP(
                LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)
            ),
        ),
    ]
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())
    options = dict(ignore_index=7, label_smoothing=0.1, reduction="sum", softcap=4.0)
    theirs = liger.LigerFusedLinearCrossEntropyLoss(**options)
    assert {n: getattr(theirs, n) for n in options} == {
        n: getattr(LinearCrossEntropyLoss(**options), n) for n in options
    }


@pytest.mark.parametrize("norm", [RMSNorm(24), LayerNorm(24)], ids=["rms", "layer"])
def test_residual_of_a_norm(norm):
    x, residual = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    y, h = norm(x, residual)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, norm(x + residual))


def test_linear_cross_entropy_loss():
    x, weight, bias = torch.randn(6, 8), torch.randn(11, 8), torch.randn(11)
    targets = torch.tensor([0, 10, 7, 7, 3, 7])
    loss = LinearCrossEntropyLoss(7, label_smoothing=0.1, softcap=4.0)
    logits = 4 * torch.tanh((x @ weight.T + bias) / 4)
    options = dict(ignore_index=7, label_smoothing=0.1)
    torch.testing.assert_close(
        loss(weight, x, targets, bias), F.cross_entropy(logits, targets, **options)
    )
    torch.testing.assert_close(
        loss(weight, x, targets, bias, reduction="none"),
        F.cross_entropy(logits, targets, **options, reduction="none"),
    )


class Adapted(nn.Linear):
    """A projection whose output is not its weight's alone, as LoRA's."""

    def forward(self, x):
        return super().forward(x) + 1.0


@torch.no_grad()
@pytest.mark.parametrize("kind", [MLP, GatedMLP])
def test_an_adapted_projection_is_called(kind):
    torch.manual_seed(0)
    module = kind(24, 40, "silu", bias=True)
    x = torch.randn(3, 24)
    plain = module(x)
    module.down_proj.__class__ = Adapted
    torch.testing.assert_close(module(x), plain + 1.0)
    module.down_proj.__class__ = nn.Linear
    hook = module.up_proj.register_forward_hook(lambda m, x, y: 0 * y)
    torch.testing.assert_close(module(x), (x * 0 + module.down_proj.bias))
    hook.remove()
    torch.testing.assert_close(module(x), plain)


@torch.no_grad()
def test_norms_of_queries_and_keys_may_be_looked_at_and_differ():
    """Within the rotation they are not called: so not there, where that would show."""
    torch.manual_seed(0)
    module, rope = Attention(24, 2, 1, 16, qk_norm=True), Rotary(16, 8)(5)
    randomize(module)
    x = torch.randn(2, 5, 24)
    plain = module(x, rope)
    seen = []
    hook = module.k_norm.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    torch.testing.assert_close(module(x, rope), plain)
    assert seen == [(2, 5, 1, 16)]
    hook.remove()
    module.q_norm.eps = module.k_norm.eps = 3.0
    both = module(x, rope)
    assert len(seen) == 1 and (both - plain).abs().max() > 1e-2
    module.q_norm.__class__ = type("Own", (RMSNorm,), {})  # whatever it computes, it is called
    torch.testing.assert_close(module(x, rope), both)
    module.k_norm.eps = 1e-6
    mixed = module(x, rope)
    assert (mixed - plain).abs().max() > 1e-2 and (mixed - both).abs().max() > 1e-2
    module.q_norm.__class__ = RMSNorm
    torch.testing.assert_close(module(x, rope), mixed)


def test_an_adapted_head_gives_the_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, n_layer=1, tie_embeddings=False))
    randomize(model)
    tokens = torch.randint(0, 50, (2, 9))
    hook = model.lm_head.register_forward_hook(lambda m, x, y: 0 * y)
    assert model(tokens, tokens).item() == pytest.approx(torch.tensor(50.0).log().item())
    hook.remove()
    assert model(tokens, tokens).item() != pytest.approx(torch.tensor(50.0).log().item(), rel=1e-2)

"""What only a GPU can show: more than 2³¹ elements, and capture in a CUDA graph."""

import pytest
import torch

from ponder import kernels
from ponder.kernels.attention import attention_reference
from ponder.kernels.cross_entropy import cross_entropy_reference
from ponder.kernels.decode_attention import decode_attention_reference
from ponder.kernels.mlp import mlp_reference
from ponder.kernels.norm import rms_norm_reference
from ponder.kernels.rotary import rotary_reference
from ponder.kernels.softmax import softmax_reference
from ponder.models import GPT, GPTConfig

from .numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MANY = 2**31 + 2**20
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def unpoisoned_memory(poisoned_memory):
    """Filling what is empty would double the memory, and is no work that a graph captures."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.cuda.empty_cache()


def long(*shape: int, row: int) -> torch.Tensor:
    """Zeros of at least MANY elements, all but the last `row` rows of the first dimension."""
    x = torch.zeros(shape, dtype=BF16, device="cuda")
    assert x.numel() >= MANY
    x[-row:].normal_()
    return x


def last_rows_agree(ours, reference, x, *others, row=2):
    """Output and gradient of the last rows, which lie beyond 2³¹ elements."""
    leaf, part = (y.detach().requires_grad_() for y in (x, x[-row:].double()))
    out = ours(leaf, *others)
    upstream = torch.randn(out[-row:].shape, device=out.device)
    (out[-row:].float() * upstream).sum().backward()
    truth = reference(part, *(y.double() for y in others))
    (truth * upstream).sum().backward()
    assert relative_error(out[-row:], truth) < 1e-2
    assert relative_error(leaf.grad[-row:], part.grad) < 2e-2


def test_norm_past_2_31_elements():
    width = 4096
    weight = torch.ones(width, dtype=BF16, device="cuda")
    x = long(MANY // width + 1, width, row=2)
    last_rows_agree(kernels.rms_norm, rms_norm_reference, x, weight)


def test_softmax_past_2_31_elements():
    x = long(MANY // 8192 + 1, 8192, row=2)
    last_rows_agree(lambda x: 100 * kernels.softmax(x), lambda x: 100 * softmax_reference(x), x)


def test_cross_entropy_past_2_31_elements():
    x = long(MANY // 131072 + 1, 131072, row=2)
    targets = torch.zeros(len(x), dtype=torch.int64, device="cuda")
    last_rows_agree(
        lambda x: kernels.cross_entropy(x, targets, reduction="none"),
        lambda x: cross_entropy_reference(x, targets[-2:], reduction="none"),
        x,
    )


def test_rotary_past_2_31_elements():
    length, heads, dim = 4096, 32, 128
    x = long(MANY // (length * heads * dim) + 1, length, heads, dim, row=1).transpose(1, 2)
    angle = torch.rand(length, dim // 2, device="cuda")
    last_rows_agree(
        lambda x: kernels.rotary(x, x[:, :1], angle.cos(), angle.sin())[0],
        lambda x: rotary_reference(x, x[:, :1], angle.cos().double(), angle.sin().double())[0],
        x,
        row=1,
    )


def test_mlp_past_2_31_elements():
    """Of the hidden activations, which are the most."""
    inner = 16384
    x = torch.randn(MANY // inner + 1, 64, dtype=BF16, device="cuda")
    up = torch.randn(inner, 64, dtype=BF16, device="cuda") / 8
    down = torch.randn(64, inner, dtype=BF16, device="cuda") / 128
    last_rows_agree(
        lambda x: kernels.mlp(x, up, down, activation="relu2"),
        lambda x: mlp_reference(x, up.double(), down.double(), "relu2"),
        x,
    )


def test_attention_past_2_31_elements():
    heads, length, dim = 64, 512, 128
    q = long(MANY // (heads * length * dim) + 1, heads, length, dim, row=1)
    last_rows_agree(
        lambda q: kernels.attention(q, q, q), lambda q: attention_reference(q, q, q), q, row=1
    )


def test_decode_attention_past_2_31_elements():
    heads, length, dim = 8, 32768, 128
    cache = long(MANY // (heads * length * dim) + 1, heads, length, dim, row=1)
    q = torch.randn(len(cache), 32, 1, dim, dtype=BF16, device="cuda")
    lengths = torch.full((len(cache),), length, device="cuda")
    out = kernels.decode_attention(q, cache, cache, lengths)
    wide = cache[-1:].double()
    truth = decode_attention_reference(q[-1:].double(), wide, wide, lengths[-1:])
    assert relative_error(out[-1:], truth) < 1e-2


def test_a_training_step_in_a_cuda_graph():
    """Forward and backward are captured, and replayed on other tokens give their gradients."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=300, context=64, n_layer=2, n_head=4, n_kv_head=2)
    model = GPT(config).cuda()
    tokens = torch.randint(300, (2, 4, 64), device="cuda")
    static = tokens[0].clone()
    parameters = list(model.parameters())

    def step():
        loss = model(static, static.roll(-1, 1))
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    with torch.autocast("cuda", BF16):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for part in tokens:
            static.copy_(part)
            graph.replay()
            for a, b in zip(captured, step(), strict=True):
                assert torch.equal(a, b)

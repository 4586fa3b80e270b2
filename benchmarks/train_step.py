"""A whole training step against Transformers' Qwen3 of the same weights, in the same run.

`python -m ponder.benchmarks train_step`. On a CPU 4.85M parameters (6 layers, 256 wide, 8 query and
4 key-value heads) and 16 × 256 tokens; on a GPU 124M (12 layers, 768 wide) and 16 × 1024 in bf16.
AdamW. What has another loss than Transformers' in its first step gets no row.
"""

from collections.abc import Callable, Collection, Iterator

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ponder.benchmarks.comparison import matmul_ceiling, settings
from ponder.benchmarks.figures import COMPILED
from ponder.benchmarks.measure import (
    DEVICE,
    Row,
    left_out_if_it_fails,
    rows,
    synchronize,
    write,
)
from ponder.models import GPT, GPTConfig
from ponder.models.memory import parameter_count
from ponder.training.batch import IGNORE
from ponder.training.hardware import PRECISION

SMALL = GPTConfig(
    vocab_size=512,
    context=256,
    n_layer=6,
    n_head=8,
    n_kv_head=4,
    head_dim=32,
    n_embd=256,
    n_inner=768,
)
GPT2_SIZE = GPTConfig(
    vocab_size=50304,
    context=1024,
    n_layer=12,
    n_head=12,
    n_kv_head=12,
    head_dim=64,
    n_embd=768,
    n_inner=2048,
)
PEER = "transformers Qwen3"
BATCH = 16
CONFIG = GPT2_SIZE if DEVICE == "cuda" else SMALL
CONTEXT = CONFIG.context
DTYPES = {PRECISION[setting.dtype]: setting.dtype for setting in settings(smoke=False)}
# Of a loss, relative: the mean of thousands of tokens, whose roundings (2^-9 in bf16) cancel.
ALLOWED = {"fp32": 1e-5, "bf16": 1e-3}


def random_model() -> GPT:
    """A model of CONFIG, the same at each call."""
    torch.manual_seed(0)
    model = GPT(CONFIG).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():  # zero output projections would make it trivial
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def peer_of(model: GPT) -> Qwen3ForCausalLM:
    """Transformers' Qwen3 with the model's own weights."""
    c = model.config
    config = Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        max_position_embeddings=c.context,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_embeddings,
        use_cache=False,
    )
    peer = Qwen3ForCausalLM(config).to(DEVICE)
    state = {
        k if k.startswith("lm_head") else f"model.{k}": v for k, v in model.state_dict().items()
    }
    peer.load_state_dict(state)
    return peer


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the targets behind them, the same at each call."""
    torch.manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, CONTEXT), device=DEVICE)
    targets = torch.roll(tokens, -1, 1)
    targets[:, -1] = IGNORE  # as Transformers has it
    return tokens, targets


def stepper(loss_of, parameters, dtype: torch.dtype):
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        return loss.detach()

    return step


def our_step(dtype: torch.dtype, compiled: bool) -> Callable[[], torch.Tensor]:
    model, (tokens, targets) = random_model(), batch()
    call = torch.compile(model) if compiled else model
    return stepper(lambda: call(tokens, targets), model.parameters(), dtype)


def their_step(dtype: torch.dtype, compiled: bool) -> Callable[[], torch.Tensor]:
    """It shifts its labels itself."""
    peer, (tokens, _) = peer_of(random_model()).train(), batch()
    call = torch.compile(peer) if compiled else peer
    return stepper(lambda: call(input_ids=tokens, labels=tokens).loss, peer.parameters(), dtype)


def run(compiled: bool = True, done: Collection[str] = ()) -> Iterator[list[Row]]:
    """The rows of each dtype that is not done: of what is not compiled, then of all in turns."""
    for name in [name for name in DTYPES if name not in done]:
        steps: dict[str, Callable[[], torch.Tensor]] = {}
        losses: dict[str, float] = {}
        for compiling in (False, True) if compiled else (False,):
            for who, make in (("ponder", our_step), (PEER, their_step)):
                who += COMPILED * compiling
                with left_out_if_it_fails(f"train_step {name}", who):
                    step = make(DTYPES[name], compiling)
                    losses[who] = step().item()
                    steps[who] = step
            with left_out_if_it_fails(f"train_step {name}", "ponder or its peer"):
                yield _rows(name, steps, losses)


def _rows(
    name: str, steps: dict[str, Callable[[], torch.Tensor]], losses: dict[str, float]
) -> list[Row]:
    if PEER not in losses:
        raise RuntimeError(f"without the loss of {PEER} there is none to compare with")
    truth = losses[PEER]
    measured = rows(
        "train_step",
        f"Qwen3 {parameter_count(CONFIG) / 1e6:.2f}M, {BATCH}x{CONTEXT} tokens, AdamW",
        name,
        steps,
        repeats=15,
        flops=3 * CONFIG.flops_per_token(CONTEXT) * BATCH * CONTEXT,
        ceiling=matmul_ceiling() if DEVICE == "cuda" else None,
        errors={who: abs(loss - truth) / truth for who, loss in losses.items()},
        allowed=ALLOWED[name],
    )
    for found in measured:
        rate = BATCH * CONTEXT / found.ms_p50 * 1e3
        peer = next((row.ms_p50 for row in measured if row.implementation == PEER), float("nan"))
        print(
            f"  {name} {found.implementation}: {rate:,.0f} tokens/s, "
            f"{peer / found.ms_p50:.2f}× Transformers"
        )
    return measured


if __name__ == "__main__":
    for measured in run():
        write(measured)

"""The planner's counts against what a step really keeps and takes, byte by byte."""

import importlib.util
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint as recomputed

from ponder.models import GPT, GPTConfig
from ponder.models.memory import (
    layer_activations,
    parameter_count,
    require,
    sampling_memory,
    training_memory,
)
from ponder.training import TrainConfig
from ponder.training.optimizer import build_optimizer

PLAIN = GPTConfig(
    vocab_size=90, context=32, n_layer=3, n_head=2, n_kv_head=2, head_dim=32, n_embd=64,
    n_inner=256, gated=False, activation="relu2",
)  # fmt: skip
GATED = GPTConfig(
    vocab_size=300, context=48, n_layer=4, n_head=4, n_kv_head=1, head_dim=16, n_embd=80,
    n_inner=160, tie_embeddings=False,
)  # fmt: skip


GPT2 = replace(
    PLAIN, qk_norm=False, norm="layer", positions="learned", attention_bias=True, mlp_bias=True
)
QWEN2 = replace(GATED, qk_norm=False, qkv_bias=True, mlp_bias=True)
LONG = replace(PLAIN, context=200)  # on a CPU the attention of more than one block


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()

        def gone():
            self.seen.discard(key)
            self.now -= size

        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, gone)


@pytest.fixture(autouse=True)
def unseen(monkeypatch):
    """Under a dispatch mode, as `Live` is one, norms, activations and attention are made of
    PyTorch's pieces, for whoever looks at them; a training run's keep less."""
    for module in ("norm", "_cpu", "_attention_cpu"):
        monkeypatch.setattr(f"ponder.kernels.{module}.traced", lambda: False)


@pytest.mark.parametrize(
    "shape", [PLAIN, GATED, GPT2, QWEN2, LONG], ids=["plain", "gated", "gpt2", "qwen2", "long"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("rows", "accumulation", "optimizer"), [(16, 1, "muon"), (8, 2, "adamw"), (1, 1, "muon")]
)
def test_the_peak_of_a_training_step_is_as_counted(shape, precision, rows, accumulation, optimizer):
    with Live() as live:
        torch.manual_seed(0)
        model = GPT(shape)
        update = build_optimizer(model, TrainConfig(optimizer=optimizer))
        tokens = torch.zeros(rows, shape.context, dtype=torch.int64)
        for _ in range(2):  # the second finds the optimizer's states in place
            for _ in range(accumulation):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(tokens, tokens)
                loss.backward()
            update.step()
            update.zero_grad()
    counted = training_memory(
        shape,
        rows=rows,
        precision=precision,
        optimizer=optimizer,
        accumulation=accumulation,
        triton=False,
    )
    counted.pop("oneDNN", 0)  # no tensors
    assert sum(counted.values()) == pytest.approx(live.peak, rel=0.05), counted


def kept(shape, precision):
    """Bytes that the forward pass keeps for the backward, parameters and their casts left out."""
    model = GPT(shape)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    sizes = {tuple(p.shape) for p in model.parameters()}
    sizes |= {size[::-1] for size in sizes}
    found = {}

    def pack(x):
        key = x.untyped_storage().data_ptr()
        if key not in own and tuple(x.shape) not in sizes:
            found[key] = (x.untyped_storage().nbytes(), x)
        return x

    tokens = torch.zeros(1, shape.context, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(tokens, tokens)
    return sum(size for size, _ in found.values())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("gated", "precision"), [(True, "bf16"), (False, "fp32")])
def test_the_triton_kernels_keep_what_is_counted(gated, precision, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shape = GPTConfig(
        vocab_size=40, context=128, n_layer=1, n_head=4, n_kv_head=2, head_dim=16, n_embd=80,
        n_inner=112, gated=gated, activation="silu" if gated else "relu2",
    )  # fmt: skip
    # The difference of two layers and one: neither the head nor the first layer's casts. 128
    # positions, for attention's log-sum-exps lie in rows of a multiple of that.
    more = kept(replace(shape, n_layer=2), precision) - kept(shape, precision)
    assert more == 128 * layer_activations(shape, precision, triton=True)


@pytest.mark.parametrize("shape", [PLAIN, GATED, GPT2, QWEN2])
def test_parameters_are_counted_without_building(shape):
    assert parameter_count(shape) == GPT(shape).parameter_count


def test_a_layer_that_is_computed_again_keeps_its_input_alone():
    options = dict(rows=16, precision="fp32", optimizer="adamw", triton=False)
    with Live() as live:
        model = GPT(PLAIN)
        for block in model.layers:
            block.forward = partial(recomputed, block.forward, use_reentrant=False)
        update = build_optimizer(model, TrainConfig(optimizer="adamw"))
        tokens = torch.zeros(16, PLAIN.context, dtype=torch.int64)
        for _ in range(2):
            model(tokens, tokens).backward()
            update.step()
            update.zero_grad()
    counted = sum(training_memory(PLAIN, recompute=True, **options).values())
    assert counted == pytest.approx(live.peak, rel=0.1)
    assert counted < 0.7 * sum(training_memory(PLAIN, **options).values())


def test_more_copies_of_the_weights_are_counted():
    alone = training_memory(GATED, rows=4)
    more = training_memory(GATED, rows=4, average=True, devices=8)
    assert more["average"] == more["buckets"] == alone["weights"] == 4 * parameter_count(GATED)
    assert "buckets" not in training_memory(GATED, rows=4, devices=8, shards=8)


def test_shards_divide_the_state_and_nothing_else():
    whole = training_memory(GATED, rows=4)
    split = training_memory(GATED, rows=4, shards=8, accumulation=1)
    for part in ("weights", "optimizer"):
        assert split[part] == whole[part] / 8
    assert split["gathered layers"] > 0 and "gathered layers" not in whole


def test_samples_fill_the_cache_by_slots_and_length():
    one = sampling_memory(GATED, slots=1, prompt=0, new=100)["KV cache"]
    assert one == 2 * 4 * 1 * 16 * 100 * 2
    assert sampling_memory(GATED, slots=6, prompt=10, new=30)["KV cache"] == 3 * one


def test_what_does_not_fit_is_named_by_parts():
    parts = {"weights": 3 * 2**30, "activations": 5 * 2**30, "gradients": 0.0}
    require(parts, 8 * 2**30, "a step", "take less")
    message = r"a step needs 8.00 GiB on each device \(activations 5.00, weights 3.00\) and there"
    with pytest.raises(ValueError, match=message):
        require(parts, 7 * 2**30, "a step", "take less")

"""What calls of the public functions launch on a GPU, found where there is none.

They are called with fake tensors, which have shapes and no memory, and Triton is told of a chip
where a launch is taken note of and nothing done. So all that a launcher computes is computed, and
what it asks Triton to compile is known, with the types, alignments and ones that Triton sees. A
launcher that looked at a value on the device, and so waited for it, would fail here.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ponder import kernels
from ponder.benchmarks import every_kernel
from ponder.kernels import _runtime
from ponder.kernels._attention_tiles import SPECIALIZED_TILES
from ponder.kernels._runtime import Specialization
from ponder.models import GPT, GPTConfig, KVCache, Prefix, gpt, layers
from ponder.tests.ptx.chip import Compiled, chip
from ponder.training.plan import shape_of


def specializations(capability: int) -> Iterator[Specialization]:
    """What `workload` launches, each once."""
    found: dict[str, Specialization] = {}

    def compiled(kernel, key, signature, device, constexprs, options, attrs, warmup) -> Compiled:
        names = list(signature)
        kinds = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        for (i,), attributes in attrs.items():
            if attributes:
                assert attributes == [["tt.divisibility", 16]]
                kinds[names[i]] += ":16"
        constants = {names[i]: value for (i,), value in constexprs.items()}
        spec = Specialization(kernel, kinds, constants, options.num_warps, options.num_stages)
        found[f"{kernel.__name__} {spec}"] = spec
        return Compiled()

    with contextlib.ExitStack() as stack:
        seen = chip(capability, compiled, use_triton=lambda x: True, processors=132)
        stack.enter_context(seen)
        stack.enter_context(patch.object(_runtime, "traced", lambda: False))  # launchers are called
        for module in (layers, gpt):  # a fake weight is of a type that modules would not look into
            stack.enter_context(patch.object(module, "readable", lambda *projections: True))
        stack.enter_context(FakeTensorMode())
        # Triton asks for the address of a fake tensor, which is 0, and PyTorch warns of it.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        workload()
        if capability == 90:
            tiles = "ponder.kernels._attention_tiles.measured"
            stack.enter_context(patch(tiles, lambda: (capability, SPECIALIZED_TILES)))
            workload()
    yield from found.values()


def workload() -> None:
    """Every function in bf16, and the steps of models as they are trained and sampled."""
    for _, call in every_kernel.calls(torch.bfloat16):
        call().float().square().sum().backward()
    every_kernel.without_gradient(torch.bfloat16)
    for name, rows in (("gpt2", 64), ("demo", 256), ("8b", 2)):
        train(replace(shape_of(name), n_layer=1), rows)
    for name, rows, samples in (("demo", 4096, 64), ("demo", 4096, 1), ("8b", 64, 64)):
        decode(replace(shape_of(name), n_layer=1), rows, samples)


def train(shape: GPTConfig, rows: int) -> None:
    model = GPT(shape)
    tokens = torch.zeros(rows, shape.context, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens).backward()


@torch.inference_mode()
def decode(shape: GPTConfig, rows: int, samples: int) -> None:
    """A step of `rows` samples, so many of a prompt."""
    torch.set_default_dtype(torch.bfloat16)  # a fake model cannot be converted
    model = GPT(shape)
    torch.set_default_dtype(torch.float32)
    cache = KVCache(shape, rows, 64, dtype=torch.bfloat16)
    cache.prefix = Prefix(shape, rows, 64, samples, dtype=torch.bfloat16)
    cache.prefix.resize(rows // samples, 64)
    cache.empty = False
    hidden = model.hidden(torch.zeros(rows, 1, dtype=torch.int64), cache)
    logits = model.logits(hidden[:, -1])
    numbers = torch.zeros(rows, dtype=torch.int64)
    kernels.sample_tokens(logits, temperature=1.0, seeds=numbers, positions=numbers)

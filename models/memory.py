"""What a GPT needs of a device's memory, in bytes and by part, counted from its shape.

The activations kept for the backward pass are counted tensor by tensor as the kernels keep them
(`triton=True`) or as PyTorch's operations on a CPU do; tests hold both counts against what a
training step really keeps. P parameters, M of them in the layers' matrices.

One count serves all: `ponder plan` holds it against a device's memory, `train` and `sweep` against
what is free (`available`) before they start.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from ..kernels._cpu import FROM_OUTPUT
from ..kernels.cross_entropy import FEW
from ..kernels.linear_cross_entropy import CHUNK, PLAIN
from .gpt import GPTConfig

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What a CUDA context, cuBLAS's workspaces and the Triton kernels' code take before any tensor, and
# how much of the rest the caching allocator loses to fragments: common figures, not yet measured
# with ponder on a GPU.
CONTEXT = 0.8 * GIB
FRAGMENTS = 0.05
ONEDNN = 8 * 2**20  # its kernels and scratch for a CPU's products in bf16: 5 to 20 MiB were seen
# Elements of the matrices of one shape that Muon works on at once: 64 MiB of fp32; large matrices
# gain nothing.
MUON_STACK = 2**24
# Linux's control groups: which ones a process is in, and where version 2 ("") and version 1 keep
# the most that one may take, what it has taken, and how that is made up.
CGROUPS, CGROUP_FILES = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
MEMORY_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def parameter_count(shape: GPTConfig) -> int:
    """P, as `GPT.parameter_count`, without building the model."""
    C, L = shape.n_embd, shape.n_layer
    norms = C * (2 * L + 1) * (2 if shape.norm == "layer" else 1)
    norms += 2 * shape.head_dim * L * shape.qk_norm
    qkv = (shape.n_head + 2 * shape.n_kv_head) * shape.head_dim
    biases = qkv * (shape.attention_bias or shape.qkv_bias) + C * shape.attention_bias
    biases += (C + shape.n_inner * (2 if shape.gated else 1)) * shape.mlp_bias
    tables = shape.vocab_size * C * (1 if shape.tie_embeddings else 2)
    tables += shape.context * C * (shape.positions == "learned")
    return shape.layer_weights + norms + biases * L + tables


def layer_activations(shape: GPTConfig, precision: str, *, triton: bool) -> float:
    """Bytes a token that one layer keeps for the backward pass."""
    a = BYTES[precision]
    C, F = shape.n_embd, shape.n_inner
    q, kv = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    # The fp32 stream before each norm, the norms' outputs and statistics; q, k before and after
    # their norm, v, the attention's output and log-sum-exp.
    norms = 2 * 4 * C + 2 * a * C + a * (q + kv) * shape.qk_norm
    apart = shape.qk_norm and shape.positions != "rotary"  # which norms q and k in its own kernel
    statistics = 4 * (2 + (shape.n_head + shape.n_kv_head) * apart)
    attention = a * (2 * q + 2 * kv) + 4 * shape.n_head
    if triton:  # the MLP's pre-activations
        return norms + statistics + attention + (2 if shape.gated else 1) * a * F
    tables = 8 * shape.head_dim  # of the rotary positions, once a row
    hidden = 3 if shape.gated else 1 if shape.activation in FROM_OUTPUT else 2
    return norms + statistics + attention + hidden * a * F + tables


def training_memory(
    shape: GPTConfig,
    *,
    rows: int,
    length: int | None = None,
    precision: str = "bf16",
    optimizer: str = "muon",
    accumulation: int = 1,
    devices: int = 1,
    shards: int = 1,
    recompute: bool = False,
    average: bool = False,
    triton: bool = True,
) -> dict[str, float]:
    """Bytes on each device at the peak of a training step, by part.

    rows: sequences in one micro-batch of this device, `length` tokens each (default: the context).
    Weights, gradients and optimizer states are fp32 and split over `shards` of the `devices` (FSDP;
    1: DDP or one device). recompute keeps each layer's input alone; average: a moving average of
    the weights is kept. The peak is in the backward pass or in the update. In the backward pass of
    a step's only micro-batch gradients grow as activations shrink, so the two share their room.
    """
    T = length or shape.context
    tokens = rows * T
    a, C, V = BYTES[precision], shape.n_embd, shape.vocab_size
    P, M = parameter_count(shape), shape.layer_weights
    states = {
        "muon": 4 * M + 8 * (P - M), "adamw": 8 * P, "adam": 8 * P, "momentum": 4 * P, "sgd": 0
    }[optimizer]  # fmt: skip
    casts = 0 if precision == "fp32" else a * (M + V * C)
    layer = layer_activations(shape, precision, triton=triton) * tokens
    kept = layer + shape.n_layer * 4 * C * tokens if recompute else shape.n_layer * layer
    if triton or tokens * V > PLAIN:
        chunks = math.ceil(
            tokens / max(1, CHUNK["cuda" if triton else "cpu"] // V)
        )  # all of about the same height
        head = tokens * (8 + 2 * a) * C + 4 * V * C
        logits = math.ceil(tokens / chunks) * V * a
    else:
        few = tokens * V <= FEW  # which PyTorch's own operation takes, and keeps in fp32
        head = tokens * ((4 + a) * C + (4 if few else a) * V)
        logits = tokens * V * (8 if few else a)
    activations = kept + head + casts / (1 if shards == 1 else shape.n_layer)
    # One layer's backward: gradients of the MLP's inside, of the stream and of a norm's input. What
    # PyTorch's pieces kept is freed as they go.
    if triton:
        one = tokens * ((3 if shape.gated else 2) * a * shape.n_inner + 3 * 4 * C)
    else:
        inside = 2 if shape.gated or shape.activation in FROM_OUTPUT else 1
        one = tokens * (inside * a * shape.n_inner + 4 * C) - head
    gradients = 4 * P / shards
    backward = {
        "gradients": gradients if accumulation > 1 else max(0.0, gradients - activations),
        "activations": activations,
        "working": max(one, logits),
    }
    update = {"gradients": gradients, "working": 0.0}
    if optimizer == "muon":
        update["working"] = 8.0 * _stacked(shape, 0 if shards > 1 else MUON_STACK)
    peak = max(backward, update, key=lambda parts: sum(parts.values()))
    parts = {"weights": 4 * P / shards, "optimizer": states / shards, **peak}
    if average:
        parts["average"] = 4 * P / shards
    if devices > 1 and shards == 1:  # where DDP sums gradients
        parts["buckets"] = 4.0 * P
    if shards > 1:  # the layer at work and the next, gathered, and their whole gradients
        parts["gathered layers"] = 2 * (a + 4) * max(M / shape.n_layer, V * C)
    if triton:
        parts |= _gpu_parts(parts)
    elif precision == "bf16":
        parts["oneDNN"] = ONEDNN
    return parts


def sampling_memory(
    shape: GPTConfig,
    *,
    slots: int,
    prompt: int,
    new: int,
    itemsize: int = 2,
    weights: float | None = None,
    block_tokens: int = 2048,
    triton: bool = True,
) -> dict[str, float]:
    """Bytes on each device while `slots` samples are decoded at once, by part, at the worst.

    prompt, new: most tokens of a prompt and of a sample behind it; itemsize: bytes of a number in
    the cache; weights: bytes that weights take (default: all, in numbers of itemsize);
    block_tokens: tokens of a prefill. At the worst no prompt is shared, every sample is as long as
    it may be, and a cache is copied into a larger one, keys and values in turn.
    """
    C, V = shape.n_embd, shape.vocab_size
    token = 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * itemsize
    width = 4 * C + 2 * (shape.n_head + shape.n_kv_head) * shape.head_dim + 3 * shape.n_inner
    parts = {
        "weights": itemsize * parameter_count(shape) if weights is None else weights,
        # A prompt lies in its prefilled block, and in front of its sample or as a prefix.
        "KV cache": float(slots * token * (new + 2 * prompt)),
        "a cache's copy": float(slots * token * (new + prompt) // 2),
        # Logits as fp32, log-probabilities, weights, their sums in fp64; one layer's inside.
        "working": float(slots * V * 24 + 4 * width * max(block_tokens, slots)),
    }
    return parts | _gpu_parts(parts) if triton else parts


def _stacked(shape: GPTConfig, most: int) -> int:
    """Elements of the largest batch of matrices of one shape that Muon works on, where those of up
    to `most` elements are one."""
    alike = {size: n * shape.n_layer for size, n in Counter(shape.matrices).items()}
    return max(a * b * max(1, min(n, most // (a * b))) for (a, b), n in alike.items())


def _gpu_parts(parts: Mapping[str, float]) -> dict[str, float]:
    return {"CUDA context": CONTEXT, "fragments": FRAGMENTS * (CONTEXT + sum(parts.values()))}


def available(device: torch.device) -> int | None:
    """Bytes that new tensors may take on the device; None where it does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        import psutil  # comes with accelerate

        return min([psutil.virtual_memory().available, *_allowed()])
    return None


def _allowed() -> Iterator[int]:
    """Bytes that each limit on this process, as a container or a batch system sets, leaves it."""
    with suppress(ImportError):  # not on Windows
        import resource

        import psutil

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            yield max(0, most - psutil.Process().memory_info().vms)
    with suppress(OSError):
        for line in CGROUPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            for kind, (root, most, used, cached) in MEMORY_FILES.items():
                if kind in kinds.split(","):
                    group = Path(path.lstrip("/"))
                    for folder in (group, *group.parents):
                        yield from _left(CGROUP_FILES / root / folder, most, used, cached)


def _left(folder: Path, most: str, used: str, cached: str) -> Iterator[int]:
    """What the limit of one control group leaves, where it has one."""
    with suppress(OSError, ValueError, KeyError):  # "max" is no number
        left = int((folder / most).read_text()) - int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield max(0, left + int(stat[cached]))  # files that were read can be forgotten


def require(parts: Mapping[str, float], available: float, what: str, remedy: str) -> None:
    """ValueError with the sum by parts where `parts` are more than `available` bytes."""
    total = sum(parts.values())
    if total > available:
        largest = sorted(parts.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest if size > 0)
        raise ValueError(
            f"{what} needs {total / GIB:.2f} GiB on each device ({listed}) and there are "
            f"{available / GIB:.2f}; {remedy}"
        )

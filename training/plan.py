"""`ponder plan`: what a training or a sweep needs, said before anything is paid for.

Memory is counted from the shape (`models/memory.py`). A step's time is a roofline: the matrix
products at a share of the peak, what is read and written besides at a share of the bandwidth, and
the part of the communication that the backward pass does not hide.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..models.flops import decode_flops, prefill_flops
from ..models.gpt import GPTConfig
from ..models.memory import (
    BYTES,
    layer_activations,
    parameter_count,
    require,
    sampling_memory,
    training_memory,
)
from .config import PRESETS, SHAPE, TrainConfig
from .devices import Device, device, load

Precision = Literal["bf16", "fp16", "fp32"]
HIDDEN = 0.7  # the share of the backward pass behind which gradients can travel
NEWTON_SCHULZ = 5  # iterations of Muon
SMALL = 0.8  # of what large products reach, Muon's do
# Bytes that a step moves for each byte that is kept for the backward pass: a GPU's kernels write
# and read once, twice over; a CPU's, by precision, are fitted to measured steps, as are its bytes
# for each score of the attention and the seconds that a layer's calls take (benchmarks/NOTES.md).
PASSES = {"gpu": 4, "fp32": 14, "bf16": 17.5, "fp16": 17.5}
CPU_SCORE = 35
CPU_CALLS = 2.5e-3
CPU_SAMPLING = 0.75  # of a CPU's peak, prompts and decoding reach (benchmarks/results/sampling.csv)
LAUNCHES = 0.02  # seconds of a GPU's step below which launching its kernels is no small part
BUSY = 1.25  # programs that want a core, for each core, beyond which a CPU was measured too slow
ROOM = 0.9  # the share of a memory that is filled where possible: the count is up to 10 % off
GPU_BATCH = 524_288  # tokens in a step where no preset says it, as in GPT-2's and llm.c's trainings
# A CPU is asked for its precision by an MLP of at most this size: 1 s, a wide one takes minutes.
ASKED = 256, 1024
SLOTS = 512  # a sweep's


def _llama(n_layer, n_embd, n_head, n_kv_head, n_inner, vocab_size=32_000) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size,
        context=4096,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=n_embd // n_head,
        n_embd=n_embd,
        n_inner=n_inner,
        qk_norm=False,
        tie_embeddings=False,
    )


def _gpt2(n_layer, n_embd, n_head) -> GPTConfig:
    return GPTConfig(
        vocab_size=50_257,
        context=1024,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=n_embd // n_head,
        n_embd=n_embd,
        n_inner=4 * n_embd,
        gated=False,
        activation="relu2",
    )


MODELS = {
    "124m": _gpt2(12, 768, 12),
    "350m": _gpt2(24, 1024, 16),
    "1.3b": _gpt2(24, 2048, 16),
    "1.5b": _gpt2(48, 1600, 25),
    "3b": _llama(26, 3200, 32, 32, 8640),
    "7b": _llama(32, 4096, 32, 32, 11_008),
    "8b": _llama(32, 4096, 32, 8, 14_336, 128_256),
}


@dataclass(frozen=True)
class PlanConfig:
    """What is to be run, and on what."""

    what: Literal["train", "sweep"] = "train"
    """a training run, or a sweep of samples"""
    device: str = "h100"
    """b200, h200, h100, a100, a100-40, l40s, l4, a10, rtx4090, rtx3090, t4, or cpu: this machine"""
    devices: int = 1
    """how many of them"""
    context: int = 0
    """0: the model's own"""
    precision: Literal["auto"] | Precision = "auto"
    """auto: bf16 where the device has it and is faster so; this machine's CPU is measured"""
    tokens: float = 0
    """train: to train on; 0: as many as the preset's steps see; without a preset twenty a parameter
    (Hoffmann et al. 2022)"""
    batch_tokens: int = 0
    """train: in one optimizer step, over all devices; 0: the preset's, without one 524288, on a CPU
    32 sequences; rounded up to what the devices can share"""
    optimizer: Literal["muon", "adamw", "adam", "momentum", "sgd"] = "muon"
    """train: its states take memory, Muon's products time"""
    shards: int = 0
    """train: devices that weights and states are split over (FSDP); 1: none are (DDP); 0: whatever
    is fastest"""
    recompute: bool = False
    """train: compute each layer again in the backward pass"""
    problems: int = 500
    """sweep: problems"""
    samples: int = 16
    """sweep: of each problem at each budget; a greedy one is counted besides"""
    budgets: int = 5
    """sweep: thinking budgets besides unlimited thinking; 0: none"""
    prompt_tokens: int = 0
    """sweep: in each prompt; 0: 256, or a third of the context where that is less"""
    new_tokens: int = 0
    """sweep: in each sample, at most; 0: 512, or what the context leaves"""
    slots: int = 0
    """sweep: samples that are decoded at once on a device; 0: 512, halved until they fit, as a
    sweep's are (with Transformers it has 16)"""


@dataclass(frozen=True)
class Layout:
    """How a training is spread: DDP copies the state, FSDP splits it over `shards` devices."""

    shards: int
    rows: int
    """sequences in a device's micro-batch"""
    accumulation: int


@dataclass(frozen=True)
class Plan:
    """What a run needs: bytes and seconds by part, and how it is spread."""

    config: PlanConfig
    """what was asked, with all that it left open"""
    model: GPTConfig
    device: Device
    memory: dict[str, float]
    """bytes on each device, by part"""
    seconds: dict[str, float]
    """of one step (train) or of the whole (sweep), by part"""
    steps: int = 1
    mfu: float = 0.0
    layout: Layout | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def devices(self) -> int:
        """Of how many the plan is."""
        return self.config.devices

    @property
    def batch_tokens(self) -> int:
        """In one optimizer step, over all devices."""
        return self.config.batch_tokens

    @property
    def step_seconds(self) -> float:
        """Of one optimizer step; of the whole sweep."""
        return sum(self.seconds.values())

    @property
    def total_seconds(self) -> float:
        """Of the whole run."""
        return self.steps * self.step_seconds


def shape_of(name: str, context: int = 0) -> GPTConfig:
    """A model by name (124m … 8b), by a preset of `ponder train`, or by a folder that has a
    config.json; ValueError names them."""
    from ..models import load_config

    shape = MODELS.get(name.lower())
    if shape is None and (Path(name) / "config.json").is_file():
        shape = load_config(name)
    if shape is None:
        if name not in PRESETS:
            raise ValueError(
                f"no model is named {name!r}; there are {', '.join(MODELS)}, the presets "
                f"{', '.join(PRESETS)}, and folders with a config.json"
            )
        c = PRESETS[name]()
        kind, _, size = c.tokenizer.partition(":")
        fields = {key: getattr(c, key) for key in ("context", *SHAPE)}
        shape = GPTConfig(vocab_size=int(size) if kind == "bpe" else 100, **fields)
    if context > shape.context and (Path(name) / "config.json").is_file():
        raise ValueError(f"context is {context}; {name} has one of {shape.context}")
    return replace(shape, context=context) if context else shape


def step_seconds(
    shape: GPTConfig,
    hardware: Device,
    *,
    rows: int,
    accumulation: int = 1,
    precision: str = "bf16",
    optimizer: str = "muon",
    shards: int = 1,
    devices: int = 1,
    recompute: bool = False,
) -> dict[str, float]:
    """Seconds of one optimizer step, by part; every device has `rows` sequences a micro-batch."""
    T, P, M = shape.context, parameter_count(shape), shape.layer_weights
    peak = hardware.peak[precision] * hardware.matrix_efficiency
    stream = hardware.bandwidth * hardware.stream_efficiency
    tokens = rows * accumulation * T
    # Forward once, backward twice.
    products = (4 if recompute else 3) * shape.flops_per_token(T) * tokens / peak
    # What is kept is written once and read once, and so is a gradient of its size.
    kept = shape.n_layer * layer_activations(shape, precision, triton=hardware.gpu)
    kept += 0 if hardware.gpu else 4 * shape.vocab_size
    moved = PASSES["gpu" if hardware.gpu else precision] * kept
    moved += 0 if hardware.gpu else CPU_SCORE * shape.n_layer * shape.n_head * (T + 1) / 2
    streams = moved * tokens / stream
    # Weights, gradients and states, read and written; the clipping's norm; the casts.
    states = {
        "muon": 28 * (P - M) + 20 * M, "adamw": 28 * P, "adam": 28 * P, "momentum": 20 * P,
        "sgd": 12 * P,
    }[optimizer]  # fmt: skip
    update = (states + 8 * P + (4 + BYTES[precision]) * M * accumulation) / shards / stream
    if optimizer == "muon":
        # In fp32 where the hardware has no products in bf16, which then are many times slower.
        rate = max(hardware.peak.get("bf16", hardware.peak[precision]), hardware.peak["fp32"])
        update += _newton_schulz(shape) / (rate * hardware.matrix_efficiency * SMALL)
    parts = {"matrix products": products, "memory": streams, "update": update}
    if not hardware.gpu:
        parts["calls"] = CPU_CALLS * shape.n_layer * accumulation
    if devices > 1:
        inside = min(devices, hardware.per_node)
        speed = hardware.link if devices <= hardware.per_node else hardware.network
        ring = (devices - 1) / devices
        if shards == 1:
            sent = 2 * 4 * P * ring / speed
        else:  # weights gathered for the forward and the backward pass, gradients scattered
            speed = hardware.link if shards <= inside else hardware.network
            sent = (2 * BYTES[precision] * accumulation + 4) * P * (shards - 1) / shards / speed
            if shards < devices:
                sent += 2 * 4 * P / shards / hardware.network
        parts["communication"] = max(0.0, sent - HIDDEN * (products + streams) * 2 / 3)
    return parts


def _newton_schulz(shape: GPTConfig) -> float:
    """FLOPs of Muon's orthogonalization of every matrix: n ≥ m, 4 n m² + 2 m³ an iteration."""
    each = sum(4 * max(s) * min(s) ** 2 + 2 * min(s) ** 3 for s in shape.matrices)
    return NEWTON_SCHULZ * shape.n_layer * each


def layouts(config: PlanConfig, shape: GPTConfig, hardware: Device) -> Iterator[Layout]:
    """Every way to spread a step: whole copies first, then split over a node, then over all."""
    sequences = config.batch_tokens // shape.context
    shards = [1]
    if config.devices > 1:
        shards += sorted({min(config.devices, hardware.per_node), config.devices})
    for count in [config.shards] if config.shards else shards:
        share = sequences // config.devices
        small = [d for d in range(1, math.isqrt(share) + 1) if share % d == 0]
        for rows in sorted({*small, *(share // d for d in small)}, reverse=True):
            yield Layout(count, rows, share // rows)


def plan(config: PlanConfig, model: str) -> Plan:
    """The plan of a training or a sweep; ValueError where nothing fits or a name is not known."""
    hardware, shape = device(config.device), shape_of(model, config.context)
    config = _settled(config, model, shape, hardware)
    _check(config, shape, hardware)
    make = _plan_sweep if config.what == "sweep" else _plan_training
    made = make(config, shape, hardware)
    if not hardware.gpu and load() > BUSY:
        made.notes.append("other programs keep this machine busy: alone it would be faster")
    return made


def _settled(config: PlanConfig, model: str, shape: GPTConfig, hardware: Device) -> PlanConfig:
    """What the configuration leaves open, decided."""
    precision, tokens, context = config.precision, config.tokens, shape.context
    preset = PRESETS[model]() if model in PRESETS else None
    rows = preset.batch_size if preset else TrainConfig.batch_size
    batch = rows * context if preset or not hardware.gpu else GPU_BATCH
    if preset and not tokens:
        tokens = preset.steps * batch
    unit = max(1, config.devices) * context
    batch = config.batch_tokens or -(-batch // unit) * unit
    if precision == "auto":
        precision = _precision(config.what, shape, hardware, batch)
    prompt = config.prompt_tokens or max(1, min(256, context // 3, context - config.new_tokens))
    return replace(
        config,
        precision=precision,
        batch_tokens=batch,
        tokens=tokens or 20 * parameter_count(shape),
        prompt_tokens=prompt,
        new_tokens=config.new_tokens or max(1, min(512, context - prompt)),
    )


def _precision(what: str, shape: GPTConfig, hardware: Device, tokens: int) -> Precision:
    """The fastest, as far as is known; a CPU that is to train is asked as the training asks it."""
    gain = hardware.peak.get("bf16", 0.0) / hardware.peak["fp32"]
    if hardware.gpu:
        return "bf16" if gain > 1 else "fp16"
    if what == "sweep":
        return "bf16" if gain > 2 else "fp32"
    from .hardware import bf16_pays_on_cpu

    width, inner = min(shape.n_embd, ASKED[0]), min(shape.n_inner, ASKED[1])
    return "bf16" if bf16_pays_on_cpu(width, inner, tokens) else "fp32"


def _check(config: PlanConfig, shape: GPTConfig, hardware: Device) -> None:
    faults = []
    for name in (
        *("devices", "batch_tokens", "problems", "samples", "prompt_tokens", "new_tokens"),
        *("budgets", "slots"),
    ):
        least = 0 if name in ("budgets", "slots") else 1
        if getattr(config, name) < least:
            faults.append(f"{name} is {getattr(config, name)}; it must be at least {least}")
    if config.devices > hardware.per_node and config.devices % hardware.per_node:
        faults.append(
            f"devices is {config.devices}; a machine has {hardware.per_node} of them, so it must "
            f"be at most {hardware.per_node} or a multiple of {hardware.per_node}"
        )
    if config.shards and (config.shards < 1 or config.devices % config.shards):
        faults.append(f"shards is {config.shards}; it must divide devices, {config.devices}")
    if config.precision not in hardware.peak:
        faults.append(
            f"precision is {config.precision}; {hardware.name} has {', '.join(hardware.peak)}"
        )
    if not 0 <= config.tokens < math.inf:
        faults.append(f"tokens is {config.tokens:g}; it must be 0 or more, and finite")
    if not faults and config.what == "train":
        sequences = config.batch_tokens // shape.context
        if config.batch_tokens % shape.context or sequences % config.devices:
            faults.append(
                f"batch_tokens is {config.batch_tokens}; {config.devices} devices share whole "
                f"sequences of {shape.context} in multiples of {config.devices * shape.context}"
            )
    if not faults and config.what == "sweep":
        if config.prompt_tokens + config.new_tokens > shape.context:
            faults.append(
                f"new_tokens is {config.new_tokens}; the context of {shape.context} must hold them "
                f"and a prompt of {config.prompt_tokens}"
            )
    if faults:
        raise ValueError("; ".join(faults))


def _plan_training(config: PlanConfig, shape: GPTConfig, hardware: Device) -> Plan:
    ways = []
    for layout in layouts(config, shape, hardware):
        step: dict[str, Any] = dict(
            rows=layout.rows,
            accumulation=layout.accumulation,
            precision=config.precision,
            optimizer=config.optimizer,
            shards=layout.shards,
            devices=config.devices,
            recompute=config.recompute,
        )
        memory = training_memory(shape, **step, triton=hardware.gpu)
        ways.append((layout, memory, step_seconds(shape, hardware, **step)))
    fitting = [way for way in ways if sum(way[1].values()) <= hardware.memory]
    if not fitting:
        spread = config.shards or config.devices
        more = "more shards, " if spread < config.devices else ""
        require(
            min((memory for _, memory, _ in ways), key=lambda memory: sum(memory.values())),
            hardware.memory,
            f"even with micro-batches of one sequence, split over {spread} device(s), "
            f"training {parameter_count(shape) / 1e9:.3g}B parameters",
            f"take {more}more devices, devices with more memory, a shorter context, or --recompute",
        )
    roomy = [f for f in fitting if sum(f[1].values()) <= ROOM * hardware.memory]
    # Of equally fast ones the first: the fewest shards, the largest micro-batch.
    best, *others = roomy or fitting
    for other in others:
        if sum(other[2].values()) < 0.98 * sum(best[2].values()):
            best = other
    layout, memory, seconds = best
    share = seconds["update"] / sum(seconds.values())
    notes = []
    if not roomy:
        notes.append(
            f"this fills {sum(memory.values()) / hardware.memory:.0%} of the memory, and the count "
            "may be 10 % off: try --recompute, or more devices"
        )
    if hardware.gpu and sum(seconds.values()) < LAUNCHES:
        notes.append("steps this short wait for kernels to be launched, which is not counted")
    if config.optimizer == "muon" and share > 0.25:
        notes.append(
            f"Muon's update, of whole matrices on every device, is {share:.0%} of the step: see "
            "--optimizer adamw, or a larger batch"
        )
    flops = 3 * shape.flops_per_token(shape.context) * config.batch_tokens
    peak = hardware.peak[config.precision] * config.devices
    return Plan(
        config,
        shape,
        hardware,
        memory,
        seconds,
        steps=max(1, round(config.tokens / config.batch_tokens)),
        mfu=flops / sum(seconds.values()) / peak,
        layout=layout,
        notes=notes,
    )


def _plan_sweep(config: PlanConfig, shape: GPTConfig, hardware: Device) -> Plan:
    """Every device decodes its share of the samples; each step reads the weights and the caches."""
    each = (config.samples + 1) * (config.budgets + 1)  # of a problem: a greedy one, unlimited
    samples = -(-config.problems * each // config.devices)
    prompt, new, a = config.prompt_tokens, config.new_tokens, BYTES[config.precision]

    def need(slots: int) -> dict[str, float]:
        return sampling_memory(
            shape, slots=slots, prompt=prompt, new=new, itemsize=a, triton=hardware.gpu
        )

    slots = min(config.slots or SLOTS, samples)
    while not config.slots and slots > 1 and sum(need(slots).values()) > hardware.memory:
        slots //= 2
    memory = need(slots)
    require(
        memory,
        hardware.memory,
        f"decoding {slots} samples of {prompt} + {new} tokens at once",
        "take fewer slots, shorter samples, or devices with more memory",
    )
    stream = hardware.bandwidth * hardware.stream_efficiency
    rounds = samples / slots
    # On average half of the new tokens stand in the cache; a prompt is read once for its samples.
    position = 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * a
    cache = position * (slots * new / 2 + prompt * slots / min(each, slots))
    reads = (a * parameter_count(shape) + cache) / stream
    flops = slots * decode_flops(shape, prompt, new) / new
    rate = hardware.peak[config.precision] * hardware.matrix_efficiency
    rate *= 1 if hardware.gpu else CPU_SAMPLING
    steps = rounds * new
    # A GPU reads while it computes; a CPU's threads do one and then the other.
    step = max(reads, flops / rate) if hardware.gpu else reads + flops / rate
    read = samples / each * prefill_flops(shape, prompt)  # once for all samples of a prompt
    return Plan(
        config,
        shape,
        hardware,
        memory,
        {"prompts": read / rate, "decoding": steps * step},
        notes=[
            f"{config.problems * each:,} samples of up to {new} tokens, {slots} at once: "
            f"{config.problems} problems × ({config.samples} samples + a greedy one) × "
            f"({config.budgets} budgets + unlimited)"
        ],
    )

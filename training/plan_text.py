"""A plan in words, as `ponder plan` prints it, and the accelerate command of its layout."""

import shlex

from ..models.gpt import GPTConfig
from ..models.memory import GIB, parameter_count
from .config import PRESETS, SHAPE, TrainConfig
from .plan import MODELS, Plan


def describe(plan: Plan, model: str) -> str:
    """The plan as the terminal shows it."""
    P, d, config = parameter_count(plan.model), plan.device, plan.config
    total = sum(plan.memory.values())
    unit, unit_name = (GIB, "GiB") if total >= GIB else (2**20, "MiB")
    hours = plan.total_seconds / 3600 * plan.devices
    many = f"{plan.devices} × " if plan.devices > 1 else ""
    lines = [
        f"{config.what} {model}: {P / 1e6:,.{1 if P > 1e7 else 2}f}M parameters, "
        f"context {plan.model.context}, {config.precision}, on {many}{d.name}",
        *plan.notes,
        "",
        f"memory a device    {total / unit:8.2f} {unit_name} of {d.memory / GIB:.1f} GiB",
        *(f"  {name:17}{size / unit:8.2f}" for name, size in plan.memory.items() if size),
        "",
    ]
    if plan.layout:
        lines += [
            f"step               {1e3 * plan.step_seconds:8.1f} ms, {plan.mfu:.0%} of the peak, "
            f"{plan.batch_tokens / plan.step_seconds:,.0f} tokens/s",
            *(f"  {name:17}{1e3 * s:8.1f}" for name, s in plan.seconds.items()),
            "",
        ]
    lines.append(f"time               {duration(plan.total_seconds)}")
    if not plan.layout:
        lines += [f"  {name:17}{duration(s)}" for name, s in plan.seconds.items()]
    lines.append(f"device-hours       {hours:8,.{1 if hours > 10 else 3}f}")
    if plan.layout:
        lines += [
            f"steps              {plan.steps:,} of {plan.batch_tokens:,} tokens",
            f"layout             {layout_text(plan)}",
            f"launch             {launch(plan, model)}",
        ]
    if d.gpu:
        lines += ["", "GPU times rest on the makers' peaks and common efficiencies, not on a"]
        lines += ["measurement of ponder on that GPU: expect longer (docs/mfu.md)."]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:8.1f} {unit}"
    return f"{seconds:8.1f} s"


def layout_text(plan: Plan) -> str:
    layout = plan.layout
    assert layout is not None
    batch = f"{layout.rows} sequences a micro-batch, accumulation {layout.accumulation}"
    if plan.devices == 1:
        return batch
    if layout.shards == 1:
        return f"DDP over {plan.devices}, {batch}"
    if layout.shards == plan.devices:
        return f"FSDP over {plan.devices}, {batch}"
    return f"FSDP over {layout.shards}, copied {plan.devices // layout.shards} times, {batch}"


def launch(plan: Plan, model: str) -> str:
    """The command that trains what was planned, in this layout; data are for the user to name."""
    layout, config, context = plan.layout, plan.config, plan.model.context
    assert layout is not None
    options = f"--context {context} --batch-size {plan.batch_tokens // context}"
    options += f" --steps {plan.steps} --precision {config.precision}"
    options += f" --optimizer {config.optimizer}"
    options += f" --accumulation {layout.accumulation}{' --recompute' if config.recompute else ''}"
    words = "-m ponder train"
    if model in PRESETS:
        words += f" {model}"
    elif model.lower() in MODELS:
        options = f"--data KIND:PLACE {_shape_flags(plan.model)} {options}"
    else:
        options = f"--data KIND:PLACE --init {shlex.quote(model)} {options}"
    if plan.devices == 1:
        return f"python {words} {options}"
    nodes = -(-plan.devices // plan.device.per_node)
    flags = [f"--num_processes {plan.devices}", f"--num_machines {nodes}"]
    if layout.shards > 1:
        flags += ["--use_fsdp", "--fsdp_version 2", "--fsdp_reshard_after_forward true"]
        if layout.shards < plan.devices:
            flags += [
                "--use_parallelism_config",
                f"--parallelism_config_dp_replicate_size {plan.devices // layout.shards}",
                f"--parallelism_config_dp_shard_size {layout.shards}",
            ]
    return f"accelerate launch {' '.join(flags)} {words} {options}"


def _shape_flags(shape: GPTConfig) -> str:
    """What `ponder train` is to be told of a named model: all that is not its default."""
    words = [f"--tokenizer bpe:{shape.vocab_size}"]
    for name in SHAPE:
        flag, value = name.replace("_", "-"), getattr(shape, name)
        if value == getattr(TrainConfig, name):
            continue
        words.append(
            f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"
        )
    return " ".join(words)

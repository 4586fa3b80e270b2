"""A plan in words, as `ponder plan` prints it, and the accelerate command of its layout."""

from ..models.memory import GIB, parameter_count
from .plan import Plan, PlanConfig


def describe(plan: Plan, config: PlanConfig, model: str) -> str:
    """The plan as the terminal shows it."""
    P, d = parameter_count(plan.model), plan.device
    many = f"{plan.devices} × " if plan.devices > 1 else ""
    lines = [
        f"{config.what} {model}: {P / 1e6:,.1f}M parameters, context {plan.model.context}, "
        f"{config.precision}, on {many}{d.name}",
        *plan.notes,
        "",
        f"memory a device    {sum(plan.memory.values()) / GIB:8.2f} of {d.memory / GIB:.1f} GiB",
        *(f"  {name:17}{size / GIB:8.2f}" for name, size in plan.memory.items() if size),
        "",
    ]
    if plan.layout:
        lines += [
            f"step               {1e3 * plan.step_seconds:8.1f} ms, {plan.mfu:.0%} of the peak, "
            f"{plan.batch_tokens / plan.step_seconds:,.0f} tokens/s",
            *(f"  {name:17}{1e3 * s:8.1f}" for name, s in plan.seconds.items()),
            "",
        ]
    hours = plan.total_seconds / 3600
    lines.append(f"time               {duration(plan.total_seconds)}")
    lines.append(f"device-hours       {hours * plan.devices:8,.1f}")
    if plan.layout:
        lines += [
            f"steps              {plan.steps:,} of {plan.batch_tokens:,} tokens",
            f"layout             {layout_text(plan)}",
            f"launch             {launch(plan)}",
        ]
    if d.gpu:
        lines += ["", "GPU times rest on the makers' peaks and common efficiencies, not on a"]
        lines += ["measurement of ponder on that GPU: take them for a guide."]
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


def launch(plan: Plan) -> str:
    """The accelerate command whose layout this is, up to the options of the training."""
    layout = plan.layout
    assert layout is not None
    options = f"--accumulation {layout.accumulation}{' --recompute' if plan.recompute else ''}"
    words = "-m ponder train"
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

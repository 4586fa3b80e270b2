"""Where the time goes: a training step and some decoding under PyTorch's profiler, as tables.

`python -m ponder.benchmarks.profiles`: the model of train_step.py. With --ncu it is Nsight Compute
that tells how near the three slowest of ponder's kernels in a step come to what the chip can do, in
products and in bytes. Nothing is kept but the output.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from ponder.benchmarks.measure import DEVICE, synchronize
from ponder.benchmarks.train_step import BATCH, CONFIG, CONTEXT, our_step
from ponder.inference.engine import LocalEngine, Request, SamplingParams
from ponder.models import GPT

ROWS = 25
KERNEL = r"_?[a-z_]+_kernel"  # as ponder names them; PyTorch's names have arguments
NCU = ["ncu", "--section", "SpeedOfLight", "--launch-skip", "4", "--launch-count", "1"]


def averages(work: Callable[[], object]) -> EventList:
    """What took how long in a call, after two others."""
    for _ in range(2):
        work()
    activities = [ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        work()
        synchronize()
    return found.key_averages()


def table(title: str, work: Callable[[], object]) -> None:
    """The operations or kernels that took the most time of the device itself."""
    found = averages(work)
    print(f"\n{title}")
    by = f"self_{DEVICE}_time_total"
    print(found.table(sort_by=by, row_limit=ROWS, max_name_column_width=60))


def slowest(found: EventList) -> list[str]:
    """The three of ponder's kernels that took the most time."""
    own = [event for event in found if re.fullmatch(KERNEL, event.key)]
    return [e.key for e in sorted(own, key=lambda e: -e.self_device_time_total)[:3]]


def nsight() -> None:
    """One launch of each of them under ncu, which a step in a process of its own makes."""
    if shutil.which("ncu") is None:
        return print("there is no ncu on the PATH: no kernel is held against the chip")
    for name in slowest(averages(our_step(torch.bfloat16, compiled=False))):
        print(f"\n{name}", flush=True)
        own = [sys.executable, "-m", "ponder.benchmarks.profiles", "--once"]
        subprocess.run([*NCU, "--kernel-name", name, *own], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ncu", action="store_true", help="the slowest kernels under ncu")
    parser.add_argument("--once", action="store_true", help="a training step, and no table")
    args = parser.parse_args()
    if args.ncu:
        return nsight()
    if args.once:
        our_step(torch.bfloat16, compiled=False)()
        return
    for label, compiled in (("eager", False), ("torch.compile", True)):
        step = our_step(torch.bfloat16, compiled)
        table(f"training step, {BATCH} x {CONTEXT} tokens, bf16, {label}", step)
    torch.manual_seed(0)
    model = GPT(CONFIG).to(DEVICE)
    slots, new = (64, 8) if DEVICE == "cpu" else (1024, 64)
    engine = LocalEngine(
        model.eval().to(torch.bfloat16 if DEVICE == "cuda" else torch.float32),
        slots=slots,
        eos=CONFIG.vocab_size - 1,
    )
    params = SamplingParams(max_tokens=new)
    requests = [Request(tuple(range(1, 65)), params, seed=0, index=i) for i in range(slots)]
    table(f"{slots} samples of one prompt, {new} tokens", lambda: list(engine.generate(requests)))


if __name__ == "__main__":
    main()

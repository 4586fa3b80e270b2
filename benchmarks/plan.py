"""The planner against measured training steps: memory at the peak and time a step.

`python -m ponder.benchmarks.plan [--out FILE] [--resume]` writes results/plan.csv, or FILE, case by
case. Each has a process of its own, as the peak of a process's memory never falls. Memory is what a
process takes beyond what it had when it had imported everything and trained a tiny model: on a CPU
its resident set, on a GPU its tensors. With --resume the cases that FILE has stay as they are.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from ponder.benchmarks.measure import DEVICE, RESULTS, machine, measured_here, merge, synchronize
from ponder.models import GPT, GPTConfig
from ponder.models.memory import training_memory
from ponder.training import TrainConfig
from ponder.training.devices import device
from ponder.training.hardware import has_bf16_products
from ponder.training.memory import keep_memory
from ponder.training.optimizer import build_optimizer
from ponder.training.plan import step_seconds

_QWEN = dict(n_layer=6, n_head=8, n_kv_head=4, head_dim=32, n_embd=256, n_inner=768)
_SMALL = dict(n_layer=4, n_head=4, n_kv_head=4, head_dim=32, n_embd=128, n_inner=512)
_LARGE = dict(n_layer=8, n_head=8, n_kv_head=8, head_dim=64, n_embd=512, n_inner=2048)
_RELU2 = dict(gated=False, activation="relu2")
CASES = {
    # name: (shape, rows, precision, optimizer)
    "0.8M, 32x128": (dict(vocab_size=100, context=128, **_SMALL, **_RELU2), 32, "fp32", "muon"),
    # a step of the preset shakespeare
    "0.8M, 16x128, bf16": (
        dict(vocab_size=65, context=128, **_SMALL, **_RELU2),
        16,
        "bf16",
        "muon",
    ),
    "4.85M, 16x256": (dict(vocab_size=512, context=256, **_QWEN), 16, "fp32", "adamw"),
    "4.85M, 16x256, bf16": (dict(vocab_size=512, context=256, **_QWEN), 16, "bf16", "adamw"),
    "25M, 4x256": (dict(vocab_size=512, context=256, **_LARGE, **_RELU2), 4, "fp32", "muon"),
}
# Whose median time counts: what neighbours do on a shared CPU lasts.
PROCESSES = 1 if DEVICE == "cuda" else 3


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def train(shape: GPTConfig, rows: int, precision: str, optimizer: str, steps: int) -> float:
    """The median seconds of a step, warm-up left out."""
    model = GPT(shape).to(DEVICE)
    update = build_optimizer(model, TrainConfig(optimizer=optimizer))  # type: ignore[arg-type]
    tokens = torch.randint(shape.vocab_size, (rows, shape.context), device=DEVICE)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(tokens, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure(what: str, name: str) -> dict:
    """One case, in this process."""
    fields, rows, precision, optimizer = CASES[name]
    shape = GPTConfig(**fields)
    triton = DEVICE == "cuda"
    options = dict(rows=rows, precision=precision, optimizer=optimizer)
    train(GPTConfig(vocab_size=16, context=16, n_layer=1), 1, precision, optimizer, 3)
    if what == "time":
        hardware = device(torch.cuda.get_device_name() if triton else "cpu")
        planned = sum(step_seconds(shape, hardware, **options).values())
        with nullcontext() if triton else keep_memory():  # as `ponder train` does
            seconds = train(shape, rows, precision, optimizer, 9)
        return {
            "ms": round(1e3 * seconds, 1),
            "planned_ms": round(1e3 * planned, 1),
            "peak_tflops": round(hardware.peak[precision] / 1e12, 3),
            "gb_per_s": round(hardware.bandwidth / 1e9, 1),
        }
    if triton:  # cuBLAS has its workspace by now, which is none of the plan's tensors
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if triton else resident()
    train(shape, rows, precision, optimizer, 4)
    peak = (torch.cuda.max_memory_allocated() if triton else resident()) - before
    memory = training_memory(shape, **options, triton=triton)
    for part in ("CUDA context", "fragments"):  # no tensors
        memory.pop(part, None)
    return {
        "peak_mib": round(peak / 2**20, 1),
        "planned_mib": round(sum(memory.values()) / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs=2, metavar=("WHAT", "NAME"), help="memory or time of one")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan.csv")
    parser.add_argument("--resume", action="store_true", help="leave out cases that --out has")
    args = parser.parse_args()
    if args.case:
        return print(json.dumps(measure(*args.case)))
    done = measured_here(args.out, "case") if args.resume else set()
    for name, (*_, precision, _) in CASES.items():
        if name in done:
            continue
        if precision == "bf16" and not has_bf16_products(torch.device(DEVICE)):
            print(f"{name}: left out, this machine has no bf16 products")
            continue
        row: dict = {"case": name}
        for what, times in (("memory", 1), ("time", PROCESSES)):
            # glibc keeps freed blocks below 32 MiB in a heap that fragments, and the resident set
            # then is 1.4 to 1.7 times what is alive. From 64 KiB on it is to give them back.
            env = {"MALLOC_MMAP_THRESHOLD_": "65536"} if what == "memory" else {}
            command = [sys.executable, "-m", "ponder.benchmarks.plan", "--case", what, name]
            runs = [
                subprocess.run(
                    command, env=os.environ | env, capture_output=True, text=True, check=True
                )
                for _ in range(times)
            ]
            found = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
            row |= sorted(found, key=lambda each: each.get("ms", 0))[times // 2]
        memory, seconds = row["planned_mib"] / row["peak_mib"], row["planned_ms"] / row["ms"]
        print(f"{name}: memory {memory:.2f}, time {seconds:.2f} of what was measured", flush=True)
        row |= machine()
        merge(args.out, list(row), [row], ("gpu", "case"))


if __name__ == "__main__":
    main()

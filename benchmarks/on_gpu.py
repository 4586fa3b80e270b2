"""Everything that only a GPU can tell, in one command, stage by stage.

`python -m ponder.benchmarks.on_gpu --out DIR [--seconds N] [--stage NAME ...]` runs each stage as a
process of its own with a time limit and keeps its logs as DIR/NAME.log, the rows of its benchmarks
in DIR/results, and what it measured of attention's tiles in DIR/tiles.json, which the stages after
it adopt. A stage that fails, runs out of time or lacks a package does not stop the rest. A stage
that succeeded is not run again into the same DIR, and one that was cut short keeps the cases that
it has: so what does not fit into N seconds follows in the next call. The last thing printed is a
table of the stages; DIR/summary.md has that and the results, DIR/on_gpu.tar.gz all in one file.
What had its whole turn and failed comes again behind what had none. On another machine, `--after
FILE` goes on from the on_gpu.tar.gz that the one before left.

`--adopt DIR` copies the rows of such a run into benchmarks/results/ and draws the figures.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
PYTHON = [sys.executable, "-u", "-m"]
BENCHMARKS = [*PYTHON, "ponder.benchmarks", "--out", "OUT/results", "--resume"]
TESTED = [*PYTHON, "ponder.benchmarks.isolated"]
COMPILING = str(TESTS / "kernels" / "test_compile.py")  # minutes, and no GPU is needed for it
KERNEL_TESTS = [*TESTED, "--parts", "4", "--skip", COMPILING, "--marked", "not cpu"]
KERNEL_TESTS += ["--first", "test_on_gpu.py", "test_attention_hopper.py"]
KERNEL_TESTS += ["--passed", "OUT/kernel-tests.txt"]
SANITIZER = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
SANITIZER += ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
SAMPLING = [*PYTHON, "ponder.benchmarks.sampling", "--dtype", "bf16"]
TRAIN_124M = [*PYTHON, "ponder.benchmarks.train_124m"]
PATCH = [*PYTHON, "ponder.benchmarks.patch"]
PLAN = [*PYTHON, "ponder.benchmarks.plan"]
PROFILES = [*PYTHON, "ponder.benchmarks.profiles"]
EVERY_KERNEL = [*PYTHON, "ponder.benchmarks.every_kernel"]
CORES = str(max(1, min(15, (os.cpu_count() or 1) - 1)))


@dataclass(frozen=True)
class Stage:
    words: Sequence[str]
    limit: float = 480  # seconds
    least: float = 60  # seconds below which it is not worth a start
    smoke: bool = False  # knows --smoke
    serves: Sequence[str] = ()  # what it makes quicker: in every call it comes before these


# First whether every kernel runs, then numbers: each comparison proves its own results. Then all
# tests, the other numbers, and better tiles than the tables'. What compiles for long does it side
# by side: a first run is compiling, most of its time.
STAGES = {
    "machine": Stage([*PYTHON, "ponder.benchmarks.machine"], 120, 20, smoke=True),
    "every-kernel": Stage([*EVERY_KERNEL, "bf16", "--processes", CORES], 120, 30),
    "warm-up": Stage(
        [*BENCHMARKS, "attention", "mlp", "losses", "pointwise", "--warm-up", CORES],
        120,
        smoke=True,
        serves=("attention-64", "mlp", "losses", "attention-128"),
    ),
    "attention-64": Stage([*BENCHMARKS, "attention", "--only", "D64"], 240, smoke=True),
    "mlp": Stage([*BENCHMARKS, "mlp"], 240, smoke=True),
    "losses": Stage([*BENCHMARKS, "losses", "pointwise"], 180, smoke=True),
    "decode": Stage([*BENCHMARKS, "decode", "overhead"], 120, 30, smoke=True),
    "train_step": Stage([*BENCHMARKS, "train_step"], 240, smoke=True),
    "kernel-tests": Stage([*KERNEL_TESTS, str(TESTS / "kernels")], 270),
    "attention-128": Stage([*BENCHMARKS, "attention", "--only", "D128"], 240, smoke=True),
    "sampling": Stage([*BENCHMARKS, "sampling"], 360, smoke=True),
    "patch": Stage([*PATCH, "--out", "OUT/results/patch.csv", "--resume"], 300),
    "plan": Stage([*PLAN, "--out", "OUT/results/plan.csv", "--resume"], 240),
    "tiles": Stage(
        [*PYTHON, "ponder.benchmarks.tiles", "--out", "OUT/tiles.json"], 400, 240, smoke=True
    ),
    "train-124m": Stage([*TRAIN_124M, "--out", "OUT/results", "--resume"], 420, 150, smoke=True),
    "memcheck": Stage([*SANITIZER, "memcheck", *EVERY_KERNEL, "bf16"], 300),
    "racecheck": Stage([*SANITIZER, "racecheck", *EVERY_KERNEL, "bf16"]),
    "sampling-profile": Stage([*SAMPLING, "--profile", "--batch", "4096", "--each", "64"], 120),
    "profiles": Stage(PROFILES, 240),
    "ncu": Stage([*PROFILES, "--ncu"], 240),
    "demo": Stage([*PYTHON, "ponder", "demo", "--out", "OUT/demo"]),
    "all-tests": Stage([*TESTED, "--skip", str(TESTS / "kernels"), str(TESTS)]),
    "mlp-autotuned": Stage([*BENCHMARKS, "mlp_autotuned"], smoke=True),
}


def run_group(
    words: Sequence[str], seconds: float, log: Path | None = None, **environment: str
) -> tuple[str, str]:
    """(verdict, output) of a command whose child processes, too, end at its time limit."""
    try:
        process = subprocess.Popen(
            words,
            stdout=open(log, "a") if log else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=os.environ | environment,
            start_new_session=True,
        )
    except FileNotFoundError:
        return f"no {words[0]}", ""
    try:
        output = process.communicate(timeout=seconds)[0]
        verdict = "ok" if process.returncode == 0 else f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        end(process)
        verdict, output = f"over {seconds:.0f} s", ""
        with suppress(subprocess.TimeoutExpired):  # a GPU that hangs does not let it go
            output = process.communicate(timeout=20)[0]
    return verdict, output or ""


def end(process: subprocess.Popen) -> None:
    """Kill a process of a group of its own and all below it, in whatever groups those are."""
    os.killpg(process.pid, signal.SIGSTOP)  # it starts no further ones
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def run_stage(name: str, out: Path, seconds: float, smoke: bool) -> dict:
    stage = STAGES[name]
    words = [word.replace("OUT", str(out)) for word in stage.words] + ["--smoke"] * smoke
    tiles = out / "tiles.json"
    adopts = tiles.exists() and name != "tiles" and "ponder.benchmarks.isolated" not in words
    environment = {"PONDER_TILES": str(tiles)} if adopts else {}
    environment["HF_HUB_OFFLINE"] = "1"  # nothing is fetched: without a network it would wait
    start = time.monotonic()
    verdict, _ = run_group(words, min(stage.limit, seconds), out / f"{name}.log", **environment)
    return {"verdict": verdict, "seconds": round(time.monotonic() - start)}


def failed(name: str, state: dict[str, dict]) -> bool:
    """Whether a stage ended by itself, or by its own limit, and not well."""
    found = state.get(name, {"verdict": "not started", "seconds": 0})
    return found["verdict"].startswith("exit") or found["seconds"] >= STAGES[name].limit


def order(names: Sequence[str], state: dict[str, dict]) -> list[str]:
    """Those that are to be run: what failed last, and what serves others before the first."""
    found = []
    for name in sorted(names, key=lambda name: failed(name, state)):
        served = [other for other in STAGES[name].serves if other in names]
        if not served and state.get(name, {}).get("verdict") != "ok":
            found += [n for n in names if name in STAGES[n].serves and n not in found]
            found.append(name)
    return found


def stage_table(state: dict[str, dict]) -> str:
    return "\n".join(
        f"{name:14} {found['verdict']:12} {found['seconds']:5} s" for name, found in state.items()
    )


def keep(out: Path, state: dict[str, dict], packed: Path) -> None:
    """Write down how far it came, so that a run that is killed has all that came before."""
    from ponder.benchmarks.tables import tables

    (out / "stages.json").write_text(json.dumps(state, indent=1))
    machine = out / "machine.log"
    parts = ["# Stages", f"```\n{stage_table(state)}\n```"]
    if machine.exists():
        parts += ["# Machine", f"```\n{machine.read_text().strip()}\n```"]
    (out / "summary.md").write_text("\n\n".join([*parts, tables(out / "results")]) + "\n")
    unfinished = out / "packing"
    with tarfile.open(unfinished, "w:gz") as archive:
        for path in sorted(out.iterdir()):
            if path not in (unfinished, packed, out / "demo"):
                archive.add(path, path.name)
        for path in (out / "demo" / "report", out / "demo" / "train" / "metrics.jsonl"):
            if path.exists():
                archive.add(path, str(path.relative_to(out)))
    shutil.move(unfinished, packed)


def adopt(out: Path, folder: Path) -> None:
    """The rows of a run into a folder of results, in place of the same machine's."""
    from ponder.benchmarks.measure import merge, read, write

    for path in sorted((out / "results").glob("*.csv")):
        found = read(path)
        if found is not None:
            write(found, folder)
            continue
        with open(path, newline="") as file:  # a table of another kind
            table = csv.DictReader(file)
            columns, rows = table.fieldnames or [], list(table)
        # Where a run did not come to a model, or a case, the rows that there are stay.
        key = [name for name in ("gpu", "model", "case") if name in columns]
        merge(folder / path.name, columns, rows, key)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all stages")
    parser.add_argument(
        "--smoke", action="store_true", help="what has tiny shapes, to try the code"
    )
    parser.add_argument("--tar", type=Path, metavar="FILE", help="default: DIR/on_gpu.tar.gz")
    parser.add_argument("--after", type=Path, metavar="FILE", help="an on_gpu.tar.gz to go on from")
    parser.add_argument("--adopt", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.adopt:
        from ponder.benchmarks.figures import draw
        from ponder.benchmarks.measure import RESULTS

        adopt(args.adopt, RESULTS)
        draw()
        return
    if not args.out:
        parser.error("--out DIR is needed")
    end = time.monotonic() + args.seconds
    out = args.out.resolve()
    packed = args.tar.resolve() if args.tar else out / "on_gpu.tar.gz"
    (out / "results").mkdir(parents=True, exist_ok=True)
    state_file = out / "stages.json"
    if args.after and not state_file.exists():
        with tarfile.open(args.after) as archive:
            archive.extractall(out, filter="data")
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    names = [name for name in args.stage if not args.smoke or STAGES[name].smoke]
    for name in order(names, state):
        left = end - time.monotonic() - 10  # for packing
        if left < STAGES[name].least:
            state.setdefault(name, {"verdict": "not started", "seconds": 0})
            continue
        state[name] = run_stage(name, out, left, args.smoke)
        keep(out, state, packed)
        print(f"{name}: {state[name]['verdict']}, {state[name]['seconds']} s", flush=True)
        if state[name]["verdict"] != "ok":
            log = (out / f"{name}.log").read_text(errors="replace")
            print("\n".join(log.splitlines()[-15:]), flush=True)
    keep(out, state, packed)
    print(stage_table(state))


if __name__ == "__main__":
    main()

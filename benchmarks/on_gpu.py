"""Everything that only a GPU can tell, in one command, stage by stage.

`python -m ponder.benchmarks.on_gpu --out DIR [--stage NAME ...]` runs each stage as a process of
its own with a time limit, keeps its log as DIR/NAME.log and copies the CSV files of
benchmarks/results/ to DIR. A stage that succeeded is not run again into the same DIR; the last
thing printed is a table of the stages.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
LIMIT = 480  # seconds a stage

PYTHON = [sys.executable, "-m"]
PYTEST = [*PYTHON, "pytest", "-q", "--maxfail=20"]
if importlib.util.find_spec("xdist"):
    PYTEST += ["-n", "8"]  # Triton compiles for minutes
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
SAMPLING = [*PYTHON, "ponder.benchmarks.sampling", "--dtype", "bf16"]
STAGES: dict[str, list[str]] = {
    "kernel-tests": [*PYTEST, str(ROOT / "tests" / "kernels")],
    "memcheck": [*SANITIZER, "memcheck", *PYTHON, "ponder.benchmarks.every_kernel"],
    "racecheck": [*SANITIZER, "racecheck", *PYTHON, "ponder.benchmarks.every_kernel"],
    "attention-64": [*PYTHON, "ponder.benchmarks", "attention", "--only", "D64"],
    "attention-128": [*PYTHON, "ponder.benchmarks", "attention", "--only", "D128"],
    "tiles": [*PYTHON, "ponder.benchmarks", "tiles"],
    "mlp": [*PYTHON, "ponder.benchmarks", "mlp"],
    "rest": [*PYTHON, "ponder.benchmarks", "losses", "pointwise", "decode", "overhead"],
    "train_step": [*PYTHON, "ponder.benchmarks", "train_step"],
    "patch": [*PYTHON, "ponder.benchmarks.patch"],
    "profiles": [*PYTHON, "ponder.benchmarks.profiles"],
    "sampling": [*SAMPLING, "--batch", "4096", "--each", "64"],  # 64 samples of 64 prompts
    "sampling-profile": [*SAMPLING, "--profile", "--batch", "4096", "--each", "64"],
    "sampling-few": [*SAMPLING, "--batch", "1", "16", "64", "256", "--each", "1"],
    "sampling-few-16": [*SAMPLING, "--batch", "16", "64", "256", "--each", "16"],
    "sampling-many": [*SAMPLING, "--batch", "1024", "4096", "--each", "1", "16"],
    "all-tests": [*PYTEST, "--ignore", str(ROOT / "tests" / "kernels"), str(ROOT / "tests")],
    "demo": [*PYTHON, "ponder", "demo", "--out", "OUT/demo"],
}


def run_stage(name: str, out: Path) -> dict:
    words = [word.replace("OUT", str(out)) for word in STAGES[name]]
    start = time.monotonic()
    with open(out / f"{name}.log", "w") as log:
        try:
            status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT)
            verdict = "ok" if status.returncode == 0 else f"exit {status.returncode}"
        except subprocess.TimeoutExpired:
            verdict = f"over {LIMIT} s"
        except FileNotFoundError:
            verdict = f"no {words[0]}"
    for path in (*RESULTS.glob("*.csv"), *FIGURES.glob("*.png")):
        shutil.copy(path, out / path.name)
    return {"verdict": verdict, "seconds": round(time.monotonic() - start)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "stages.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    for name in args.stage:
        if state.get(name, {}).get("verdict") != "ok":
            state[name] = run_stage(name, args.out)
            state_file.write_text(json.dumps(state, indent=1))
            if state[name]["verdict"] != "ok":
                print("\n".join((args.out / f"{name}.log").read_text().splitlines()[-15:]))
    for name, found in state.items():
        print(f"{name:16} {found['verdict']:12} {found['seconds']:5} s")


if __name__ == "__main__":
    main()

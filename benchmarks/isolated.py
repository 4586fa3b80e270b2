"""The tests, each file in processes of its own, several at a time.

`python -m ponder.benchmarks.isolated [--seconds N] [--skip PATH] [--parts N] FOLDER`. A kernel that
writes where it must not, or never ends, spoils the GPU for its whole process: so it takes down one
file's tests, or one of its parts, and no others. The last line counts what passed and failed; a
process that dies, or is stopped at its time limit, is a failure. With what failed come the last
lines that it printed.
"""

import argparse
import importlib.util
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ponder.benchmarks.on_gpu import run_group

WORKERS = max(1, min(15, (os.cpu_count() or 1) - 1))  # they compile more than they compute


def pytest_command(path: Path) -> list[str]:
    words = [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        # By a thread: a signal does not end a wait for the GPU.
        words += ["--timeout=120", "--timeout-method=thread"]
    return [*words, str(path)]


def test_file(path: Path, seconds: float, part: int, parts: int) -> tuple[str, int, int]:
    """(what to show, passed, failed)."""
    name = path.name if parts == 1 else f"{path.name}, part {part + 1} of {parts}"
    verdict, output = run_group(pytest_command(path), seconds, PONDER_TESTS=f"{part}/{parts}")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", output)}
    passed = counts.get("passed", 0)
    failed = counts.get("failed", 0) + counts.get("error", 0)
    lines = output.splitlines()
    show = f"{name}: {lines[-1] if lines else 'no output'}"
    # 5: no test was collected, as where all of a file is skipped, or it has fewer than parts.
    if verdict not in ("ok", "exit 5") or failed:
        failed = max(failed, 1)
        show = "\n".join([*lines[-60:], f"FAILED {name}: {verdict}"])
    return show, passed, failed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--skip", type=Path)
    parser.add_argument("--seconds", type=float, default=200, help="limit of a process")
    parser.add_argument("--parts", type=int, default=1, help="processes of a file")
    args = parser.parse_args()
    paths = [p for p in args.folder.rglob("test_*.py") if args.skip not in (p, *p.parents)]
    # The largest first, so that no long one ends alone.
    paths.sort(key=lambda p: -p.stat().st_size)
    total = [0, 0]
    with ThreadPoolExecutor(WORKERS) as pool:
        started = [
            pool.submit(test_file, path, args.seconds, part, args.parts)
            for path in paths
            for part in range(args.parts)
        ]
        for done in as_completed(started):
            show, *counts = done.result()
            print(show, flush=True)
            total = [a + b for a, b in zip(total, counts, strict=True)]
    print(f"{total[0]} passed, {total[1]} failed")
    return int(total[1] > 0)


if __name__ == "__main__":
    sys.exit(main())

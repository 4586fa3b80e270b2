"""Each test file in a process of its own, several at a time.

`python -m ponder.benchmarks.isolated [--seconds N] [--skip PATH] FOLDER`. A kernel that writes
where it must not, or never ends, spoils the GPU for its whole process: so it takes down one file's
tests and no others. The last line counts what passed and failed; a file that dies, or is stopped at
its time limit, is a failure. With what failed come the last lines that its file printed.
"""

import argparse
import importlib.util
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ponder.benchmarks.on_gpu import run_group

WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))


def pytest_command(path: Path) -> list[str]:
    words = [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        words += ["--timeout=300"]
    return [*words, str(path)]


def test_file(path: Path, seconds: float) -> tuple[str, int, int]:
    """(what to show, passed, failed)."""
    verdict, output = run_group(pytest_command(path), seconds)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", output)}
    passed = counts.get("passed", 0)
    failed = counts.get("failed", 0) + counts.get("error", 0)
    lines = output.splitlines()
    show = f"{path.name}: {lines[-1] if lines else 'no output'}"
    # 5: no test was collected, as where all of a file is skipped.
    if verdict not in ("ok", "exit 5") or failed:
        failed = max(failed, 1)
        show = "\n".join([*lines[-60:], f"FAILED {path.name}: {verdict}"])
    return show, passed, failed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--skip", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="limit of a file")
    args = parser.parse_args()
    paths = [p for p in args.folder.rglob("test_*.py") if args.skip not in (p, *p.parents)]
    # The largest first, so that no long one ends alone.
    paths.sort(key=lambda p: -p.stat().st_size)
    total = [0, 0]
    with ThreadPoolExecutor(WORKERS) as pool:
        for done in as_completed([pool.submit(test_file, p, args.seconds) for p in paths]):
            show, *counts = done.result()
            print(show, flush=True)
            total = [a + b for a, b in zip(total, counts, strict=True)]
    print(f"{total[0]} passed, {total[1]} failed")
    return int(total[1] > 0)


if __name__ == "__main__":
    sys.exit(main())

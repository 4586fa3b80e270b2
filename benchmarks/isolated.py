"""The tests, each file in processes of its own, several at a time.

`python -m ponder.benchmarks.isolated [--seconds N] [--skip PATH] [--first NAME ...]
[--marked EXPR] [--parts N] [--passed FILE] FOLDER`. A kernel that writes where it must not, or
never ends, spoils the GPU for its whole process: so it takes down one file's tests, or one of its
parts, and no others. The last line counts what passed and failed; a process that dies, or is
stopped at its time limit, is a failure. With what failed come the last lines that it printed. FILE
gets the names of what passed, as it passes; what it names already is not run again.
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


def pytest_command(path: Path, marked: str) -> list[str]:
    words = [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        # By a thread: a signal does not end a wait for the GPU.
        words += ["--timeout=120", "--timeout-method=thread"]
    return [*words, "-m", marked, str(path)]


def name_of(path: Path, part: int, parts: int) -> str:
    return path.name if parts == 1 else f"{path.name}, part {part + 1} of {parts}"


def test_file(
    path: Path, marked: str, seconds: float, part: int, parts: int
) -> tuple[str, str, int, int]:
    """(name, what to show, passed, failed)."""
    name, words = name_of(path, part, parts), pytest_command(path, marked)
    verdict, output = run_group(words, seconds, PONDER_TESTS=f"{part}/{parts}")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", output)}
    passed = counts.get("passed", 0)
    failed = counts.get("failed", 0) + counts.get("error", 0)
    lines = output.splitlines()
    show = f"{name}: {lines[-1] if lines else 'no output'}"
    # 5: no test was collected, as where none has the mark, or a file has fewer than parts.
    if verdict not in ("ok", "exit 5") or failed:
        failed = max(failed, 1)
        show = "\n".join([*lines[-60:], f"FAILED {name}: {verdict}"])
    return name, show, passed, failed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--skip", type=Path)
    parser.add_argument(
        "--first", nargs="*", default=[], metavar="NAME", help="files to begin with"
    )
    parser.add_argument("--marked", default="", metavar="EXPR", help="pytest's -m")
    parser.add_argument("--passed", type=Path, metavar="FILE", help="to go on from")
    parser.add_argument("--seconds", type=float, default=200, help="limit of a process")
    parser.add_argument("--parts", type=int, default=1, help="processes of a file")
    args = parser.parse_args()
    paths = [p for p in args.folder.rglob("test_*.py") if args.skip not in (p, *p.parents)]
    # The largest first, so that no long one ends alone.
    paths.sort(key=lambda p: (p.name not in args.first, -p.stat().st_size))
    before = args.passed.read_text().splitlines() if args.passed and args.passed.exists() else []
    if before:
        print(f"{len(before)} passed before: {', '.join(before)}")
    total = [0, 0]
    with ThreadPoolExecutor(WORKERS) as pool:
        started = [
            pool.submit(test_file, path, args.marked, args.seconds, part, args.parts)
            for path in paths
            for part in range(args.parts)
            if name_of(path, part, args.parts) not in before
        ]
        for done in as_completed(started):
            name, show, *counts = done.result()
            print(show, flush=True)
            if args.passed and not counts[1]:
                with open(args.passed, "a") as file:
                    file.write(f"{name}\n")
            total = [a + b for a, b in zip(total, counts, strict=True)]
    print(f"{total[0]} passed, {total[1]} failed")
    return int(total[1] > 0)


if __name__ == "__main__":
    sys.exit(main())

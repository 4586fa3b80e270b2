"""What made a run folder: `run.json`, and the refusal to mix two runs in one folder."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("ponder", "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers")


def versions() -> dict[str, str]:
    """The installed versions of Python and of what results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


CODE = "*.py", "*.c", "*.toml"  # not results, which a run itself writes


def commit() -> str:
    """The commit that ponder runs from, with `+` where code differs; empty outside a checkout."""
    here = Path(__file__).parent
    if not (here / ".git").exists():
        return ""

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", *CODE) else "")
    except OSError:
        return ""


def command() -> str:
    """The command line that this process runs, as a shell would take it again."""
    program, package = Path(sys.argv[0]), Path(__file__).parent.resolve()
    name = "ponder" if program.resolve() == package / "__main__.py" else program.name  # python -m
    return shlex.join([name, *sys.argv[1:]])


# What /proc/cpuinfo calls the vectors of x86-64's CPUs, the widest first.
VECTORS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 and bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB and GPU."""
    system = f"{platform.system()} {platform.machine()}"
    facts: dict[str, Any] = {"system": system, "cores": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(x.split(":", 1) for x in cpuinfo.read_text().splitlines() if ":" in x)
        known = {name.strip(): value.strip() for name, value in lines.items()}
        # A cloud's CPUs of one name differ in these, and so by factors in speed.
        width = next((w for w in VECTORS if w in known.get("flags", "").split()), None)
        name = known.get("model name", platform.machine())
        if "cpu family" in known:
            name += f" of family {known['cpu family']}"
        facts["processor"] = f"{name} with {VECTORS[width]}" if width else name
    else:
        facts["processor"] = platform.processor() or platform.machine()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        facts["memory_gib"] = round(total / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(aside, path)


def read_run(out: Path) -> dict[str, Any]:
    """What `run.json` says, by command; ValueError where there is none, or a damaged one."""
    file = out / "run.json"
    if not file.is_file():
        raise ValueError(f"{out} holds no run.json; give a folder that a ponder command left")
    try:
        runs = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is not readable JSON; take another folder") from None
    known = runs.values() if isinstance(runs, dict) else [None]
    if not all(isinstance(run, dict) and "configuration" in run for run in known):
        raise ValueError(f"{file} does not hold the configuration of each run; take another folder")
    return runs


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes' runs out of a folder; ValueError where one is in it. The lock of a
    process that is killed is gone with it; on Windows there is none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is at work in {folder}; wait for its end, or take another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def open_run(
    out: Path,
    kind: str,
    configuration: dict[str, Any],
    *,
    resume: bool,
    grows: Collection[str] = (),
) -> bool:
    """Claim `out` for a run; write `run.json`; True where it goes on with the same run.

    `kind` is the command ("train", "sweep"); grows: fields in which a run may go on with another
    value, the command that said the earlier one being kept. ValueError where the folder holds a run
    of another configuration, or the same one and `resume` was not asked for.
    """
    file = out / "run.json"
    runs = read_run(out) if file.exists() else {}
    plain = json.loads(json.dumps(configuration, default=str))
    before = runs.get(kind)
    if before is not None:
        old = before["configuration"]
        fixed = {*old, *plain} - {*grows}
        changed = [k for k in sorted(fixed) if old.get(k) != plain.get(k)]
        if changed:
            was = ", ".join(f"{k} {old.get(k)!r} (now {plain.get(k)!r})" for k in changed[:4])
            raise ValueError(f"{out} holds another {kind} run, with {was}; take another --out")
        if not resume:
            raise ValueError(
                f"{out} holds this {kind} run already; say --resume to go on, or take another --out"
            )
        if any(old.get(k) != plain.get(k) for k in grows):
            earlier = [*before.get("earlier_commands", []), before.get("command", "")]
            before["earlier_commands"] = earlier
    runs[kind] = (before or {}) | {
        "command": command(),
        "configuration": plain,
        "seed": plain.get("seed"),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_aside(file, json.dumps(runs, indent=1) + "\n")
    return before is not None


def note(out: Path, kind: str, facts: dict[str, Any]) -> None:
    """Add what a run found out to its part of `run.json`, in place of what it said before."""
    runs = read_run(out)
    runs[kind] |= facts
    write_aside(out / "run.json", json.dumps(runs, indent=1) + "\n")

"""The cache: whole or not there, whoever dies while building it and whoever else wants it."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from ponder.training.cache import MANIFEST, cached


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path))
    return tmp_path


def builder(built: list, content: bytes = b"tokens"):
    def build(folder):
        built.append(folder)
        (folder / "tokens.bin").write_bytes(content)
        return {"bytes": len(content)}

    return build


def test_built_once_for_each_identity(root):
    built = []
    one, facts = cached("tokens", ["a", 1], builder(built))
    assert facts == {"bytes": 6} and (one / "tokens.bin").read_bytes() == b"tokens"
    assert cached("tokens", ["a", 1], builder(built)) == (one, facts)
    assert len(built) == 1
    others = [cached(*key, builder(built))[0] for key in (("tokens", ["a", 2]), ("rows", ["a", 1]))]
    assert len(built) == 3 and len({one, *others}) == 3


@pytest.mark.parametrize("harm", ["truncated", "missing", "no manifest", "half a manifest"])
def test_what_is_not_whole_is_built_again(harm):
    built = []
    folder, _ = cached("tokens", "a", builder(built))
    file, manifest = folder / "tokens.bin", folder / MANIFEST
    match harm:
        case "truncated":
            file.write_bytes(b"tok")
        case "missing":
            file.unlink()
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_bytes(manifest.read_bytes()[:30])
    assert cached("tokens", "a", builder(built)) == (folder, {"bytes": 6})
    assert len(built) == 2 and file.read_bytes() == b"tokens"


def test_a_build_that_fails_leaves_nothing(root):
    def fails(folder):
        (folder / "tokens.bin").write_bytes(b"tok")
        raise ValueError("line 3 is not JSON")

    with pytest.raises(ValueError, match="line 3"):
        cached("tokens", "a", fails)
    assert [path.name for path in root.iterdir()] == ["locks"]


def test_a_build_that_is_killed_is_done_again(root):
    code = """
import sys, time
from ponder.training.cache import cached
def build(folder):
    (folder / "tokens.bin").write_bytes(b"tok")
    print("half", flush=True)
    time.sleep(60)
cached("tokens", "a", build)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert any(path.name.endswith(".building") for path in root.iterdir())
    folder, _ = cached("tokens", "a", builder([]))
    assert (folder / "tokens.bin").read_bytes() == b"tokens"
    assert sorted(path.name for path in root.iterdir()) == ["locks", folder.name]


def test_of_several_processes_one_builds(tmp_path):
    code = """
import os, time
from ponder.training.cache import cached
def build(folder):
    with open(os.environ["LOG"], "a") as log:
        log.write("built ")
    time.sleep(0.3)
    (folder / "tokens.bin").write_bytes(b"tokens")
    return {"bytes": 6}
folder, facts = cached("tokens", "a", build)
assert (folder / "tokens.bin").read_bytes() == b"tokens" and facts == {"bytes": 6}
"""
    log = tmp_path / "log"
    environment = os.environ | {"LOG": str(log)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert log.read_text() == "built "


def test_of_several_threads_one_builds():
    built = []
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cached("tokens", "a", builder(built)), range(8)))
    assert len(built) == 1 and all(one == found[0] for one in found)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cannot be written: .*PONDER_CACHE can name another"):
        cached("tokens", "a", builder([]))

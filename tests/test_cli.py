"""The command as a user meets it: what it says of bad input, and that help is light."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ponder import cli, provenance


def ponder(*words: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ponder", *words], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("words", [["--help"], ["train", "nope"], ["sweep", "--help"]])
def test_help_and_argument_errors_import_no_torch(words):
    code = (
        "import sys; from ponder import cli\n"
        "try:\n    cli.run(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_help_names_every_command():
    run = ponder("--help")
    assert run.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in run.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", "parquet:FILES or hub:NAME; several are mixed. FILES is one"),
        ("sweep", "GPT is, or the URL of an OpenAI-compatible server"),
        ("sweep", "Monte Carlo tree search, attempts one after the other"),  # of a group
    ],
)
def test_help_breaks_its_lines_where_the_terminal_ends(command, words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "700")
    with pytest.raises(SystemExit):
        cli.run([command, "--help"])
    assert words in capsys.readouterr().out


def test_a_terminal_that_is_not_utf_8_gets_what_it_can_show():
    words = [sys.executable, "-m", "ponder", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and "samples ? thinking budgets" in run.stdout


@pytest.mark.parametrize("terminal, seconds", [(True, "0.1"), (False, "10.0")])
def test_a_log_is_not_filled_with_progress(terminal, seconds):
    script = (
        "import sys; from ponder.cli import run\n"
        f"sys.stderr.isatty = lambda: {terminal}\n"
        "run(['--version'])\n"
        "from tqdm import tqdm; print(tqdm(range(1)).mininterval)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TQDM_")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split()[-1] == seconds, done.stderr


def test_the_repository_root_as_current_folder_hides_nothing():
    from pathlib import Path

    root = Path(cli.__file__).parent
    run = ponder("info", cwd=root)
    assert run.returncode == 0, run.stderr
    assert "attention" in run.stdout and "torch" in run.stdout
    for name in ("rms_norm", "sampling on a CPU"):
        assert f"{name:22}in C, compiled by" in run.stdout
    for name, part in (("gated_mlp", "activations"), ("linear_cross_entropy", "losses")):
        assert f"{name:22}PyTorch's products, {part} in C, compiled by" in run.stdout


BAD = [
    ("dance", "no command is named 'dance'; there are demo, train"),
    ("train huge", "no preset is named 'huge'; there are tiny, demo"),
    ("train tiny --data task:chess", "last_digit"),
    ("train tiny --data poem", "data is 'poem'; it must be task:NAME"),
    ("train tiny --data text:missing.txt", "there is no text file missing.txt"),
    ("train tiny --data text:empty.txt", "empty.txt is empty"),
    ("train tiny --data text:latin.txt", "latin.txt is not UTF-8: byte 3"),
    ("train tiny --n-head 3 --n-kv-head 2", "n_head 3 is not a multiple of n_kv_head 2"),
    ("train tiny --steps 0", "steps is 0; it must be at least 1"),
    ("train tiny --activation swish9", "activation"),
    ("sweep --model missing --samples 0", "samples is [0]; each must be from 1 to 2"),
    ("sweep --model missing --samples 99999999999", "each must be from 1 to 2147483647"),
    ("sweep --model missing --problems 200000", "problems is 200000; it must be from 1 to 100000"),
    ("sweep --model missing --lines 99999999999", "lines is [99999999999]; each must be from 1 to"),
    ("sweep --model missing --width 99999999999", "width is 99999999999; it must be from 1 to"),
    ("sweep --model missing --budgets -1", "budgets is [-1]; each must be at least 0"),
    ("sweep --model missing", "missing"),
    ("sweep --model missing --task chess", "last_digit"),
    ("report nowhere", "nowhere holds no run.json"),
    ("generate --model missing 1+1=", "missing"),
    ("generate --model missing --samples 0 1+1=", "samples is 0; it must be from 1 to 2"),
    ("generate --model missing --samples 99999999999 1+1=", "it must be from 1 to 2147483647"),
    ("generate --model missing --budget -2 1+1=", "budget is -2; it must be at least 0"),
    ("generate --model missing --temperature inf 1+1=", "temperature is inf; it must be at least"),
    (
        "generate --model missing --samples 3 1+1=",
        "samples is 3 and temperature 0: all of a prompt",
    ),
    ("sweep --model missing --temperature inf", "temperature is inf; votes need a finite one"),
    ("sweep --model missing --seed -1", "seed is -1; it must be from 0 to 9223372036854775807"),
    ("sweep --model missing --top-k 99999999999", "top_k is 99999999999; it must be from 0 to 2"),
    ("sweep --model missing --slots 0", "slots is 0; it must be from 1 to 2147483647"),
    ("sweep --model http://x/v1 --server.timeout inf", "server.timeout is inf; it must be above 0"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    status = cli.run([*words.split(), *(["--out", "o"] if words.startswith("train") else [])])
    error = capsys.readouterr().err
    assert status == 2, error
    assert message in error and error.startswith("ponder: ")
    assert error.count("\n") == 1 and "Traceback" not in error


def test_what_a_disk_refuses_is_one_sentence(monkeypatch, capsys):
    def refuse(words):
        raise OSError(errno.EROFS, "Read-only file system", "/data/report.html")

    monkeypatch.setitem(cli.COMMANDS, "report", refuse)
    assert cli.run(["report", "x"]) == 2
    assert capsys.readouterr().err == "ponder: /data/report.html: Read-only file system\n"

    def fail(words):
        raise OSError(errno.ENOTCONN, "no fault of a disk")

    monkeypatch.setitem(cli.COMMANDS, "report", fail)
    with pytest.raises(OSError, match="no fault of a disk"):
        cli.run(["report", "x"])


def test_what_no_memory_holds_is_one_sentence(monkeypatch, capsys):
    def fail(words):
        np.empty(1 << 50, dtype=np.int64)

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert cli.run(["train"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ponder: there is not enough memory: Unable to allocate 8.00 PiB")


@pytest.mark.parametrize(
    "path, says",
    [
        ("file", "File exists"),
        ("file/below", "Not a directory"),
        ("long" * 999, "File name too long"),
        ("loop/below", "Too many levels of symbolic links"),
    ],
)
def test_a_path_that_cannot_be_is_one_sentence(path, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "sweep", lambda words: (tmp_path / words[0]).mkdir())
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert cli.run(["sweep", path]) == 2
    assert capsys.readouterr().err == f"ponder: {tmp_path / path}: {says}\n"


@pytest.mark.parametrize(
    "text, says",
    [
        (b"", "is not readable JSON"),
        (b"\xff", "is not readable JSON"),
        (b"[" * 200_000, "is not readable JSON"),
        (b"[1]", "does not hold the configuration of each run"),
        (b'{"sweep": 3}', "does not hold the configuration of each run"),
        (b'{"sweep": {}}', "does not hold the configuration of each run"),
    ],
)
def test_a_damaged_run_json_is_one_sentence(text, says, tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_bytes(text)
    assert cli.run(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"ponder: {file} {says}; take another folder\n"


def test_a_sweep_without_all_of_its_configuration_is_one_sentence(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"sweep": {"configuration": {"model": "m"}}}')
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "run.json lacks samples, seed of its configuration" in capsys.readouterr().err


def test_a_report_of_a_ladder_says_where_its_figure_is(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"scale": {"configuration": {}}}')
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "has no law yet; go on with ponder scale --resume" in capsys.readouterr().err
    figure = tmp_path / "scaling" / "scaling.png"
    figure.parent.mkdir()
    figure.touch()
    assert cli.run(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"law: {figure}\n"


def test_only_sweeps_are_compared(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"train": {"configuration": {}}}')
    assert cli.run(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert "a holds no sweep, and only sweeps are compared; its run.json knows train\n" in error


def test_a_demo_stopped_while_it_trains_measures_nothing_and_goes_on(tmp_path, monkeypatch, capsys):
    from ponder import training
    from ponder.inference import sweep
    from ponder.training import loop

    class Stopped(loop.Stop):
        def __enter__(self):
            self.asked = True
            return super().__enter__()

    tiny = training.preset("tiny", steps=2, samples=0, out=tmp_path, resume=True)
    swept = []
    monkeypatch.setattr(training, "preset", lambda name, **fields: tiny)
    monkeypatch.setattr(sweep, "sweep", lambda config: swept.append(config) or config.out)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Stop", Stopped)
        assert cli.run(["demo", "--out", str(tmp_path)]) == 130
    assert not swept and "interrupted; what was finished is kept" in capsys.readouterr().err
    assert cli.run(["demo", "--out", str(tmp_path)]) == 0
    assert [c.model for c in swept] == [str(tmp_path / "model")]


def test_an_unknown_field_is_named():
    run = ponder("train", "tiny", "--colour", "blue")
    assert run.returncode == 2
    assert "--colour" in run.stderr and "Traceback" not in run.stderr


ENDLESS = """
import sys
from pathlib import Path
from ponder import cli, provenance
cli.COMMANDS["info"] = lambda words: [print("x" * 999) for _ in range(9999)]
sys.exit(cli.run(["info"]))
"""


def test_a_reader_that_has_enough_is_no_error():
    words = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    "program", ["/somewhere/bin/ponder", str(Path(cli.__file__).with_name("__main__.py"))]
)
def test_a_run_s_command_is_what_a_shell_would_take_again(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "sweep", "--cue", "Wait, no;"])
    assert provenance.command() == "ponder sweep --cue 'Wait, no;'"

"""`ponder generate`: what it prints, streams, reads and refuses."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ponder.cli import run
from ponder.inference import Unfinished
from ponder.inference.config import GenerateConfig, ServerOptions
from ponder.inference.engine import SamplingParams
from ponder.inference.local import LocalSpeaker
from ponder.inference.shell import DIM, PLAIN, Screen, _read, generate
from ponder.inference.speaker import Ask

from .mock_server import MockServer


@pytest.fixture(scope="module")
def config(model) -> GenerateConfig:
    return GenerateConfig(("3+8=",), str(model), precision="fp32", seed=4, temperature=1.0)


@pytest.fixture(scope="module")
def speaker(model) -> LocalSpeaker:
    return LocalSpeaker(str(model), slots=8, precision="fp32")


def completions(speaker, prompt: str, samples: int, *, most: int = 59, budget: int | None = None):
    params = SamplingParams(max_tokens=most, budget=budget)
    asks = [Ask(prompt, params, 4, i) for i in range(samples)]
    return sorted(speaker.generate(asks), key=lambda c: c.ask.index)


def test_samples_are_printed_in_order_with_what_they_cost(config, speaker, capsys):
    generate(replace(config, samples=3, budget=1))
    shown = capsys.readouterr()
    expected = completions(speaker, "3+8=", 3, budget=1)
    assert shown.out.splitlines() == [c.text for c in expected]
    sampled = sum(c.sampled_tokens for c in expected)
    forced = sum(c.forced_tokens for c in expected)
    assert f"5 prompt + {sampled} sampled + {forced} forced tokens, " in shown.err
    flops = float(re.search(r"([\d.e+]+) FLOPs, [\d.]+ s", shown.err)[1])
    # Two per weight and token, and a little attention.
    weights = speaker.model.config.layer_weights
    assert 2 * weights * sampled < flops < 3 * weights * (5 + sampled + forced) * 2


def test_one_sample_is_shown_token_by_token(config, speaker, monkeypatch):
    written = []
    monkeypatch.setattr("sys.stdout.write", written.append)
    monkeypatch.setattr("sys.stdout.flush", lambda: written.append("|"))
    generate(replace(config, budget=2))
    (whole,) = completions(speaker, "3+8=", 1, budget=2)
    shown = "".join(written).removesuffix("|\n|")
    assert shown.replace("|", "").rstrip("\n") == whole.text
    # Every token but <eos> was shown before the next one was drawn.
    pieces = [piece for piece in shown.replace("\n", "").split("|") if piece]
    tokens = whole.sampled_tokens + whole.forced_tokens
    assert len(pieces) == tokens - (whole.finish == "stop")


def test_a_model_that_learned_no_thoughts_is_given_none(text_model, capsys, monkeypatch):
    words = f"generate 3+8= --model {text_model} --max-tokens 4 --precision fp32"
    for samples in (1, 2):  # streamed, and whole
        assert run(f"{words} --samples {samples} --temperature 0.01".split()) == 0
        shown = capsys.readouterr()
        assert "think" not in shown.out
        assert f"4 prompt + {4 * samples} sampled + 0 forced tokens" in shown.err
    assert run([*words.split(), "--budget", "2"]) == 2
    assert "has no tokens <think> and </think>" in capsys.readouterr().err


def test_several_prompts_stand_above_their_samples(config, speaker, capsys):
    generate(replace(config, prompts=("3+8=", "4*2="), samples=2))
    expected = []
    for prompt in ("3+8=", "4*2="):
        expected += [prompt, *(c.text for c in completions(speaker, prompt, 2))]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("kind", ["txt", "jsonl", "-"])
def test_prompts_come_from_a_file_or_standard_input(
    model, config, tmp_path, monkeypatch, capsys, kind
):
    lines = ["4*2=", "", "5-1="]
    if kind == "jsonl":
        lines = [json.dumps({"prompt": line}) for line in lines if line]
    path = tmp_path / f"prompts.{kind}"
    if kind == "-":
        path = "-"
        # As piped on from another system, where the locale knows ASCII alone.
        piped = io.BytesIO("\r\n".join(lines).encode("utf-8-sig"))
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(piped, encoding="ascii"))
    else:
        path.write_text("\n".join(lines) + "\n")
    words = f"generate 3+8= --model {model} --file {path} --samples 1 --max-tokens 4"
    assert run(words.split()) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[::2] == ["3+8=", "4*2=", "5-1="]
    assert len(shown) == 6


def test_files_of_other_editors_are_read(config, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "3+8=\u2028"}', "", '{"prompt": "\\u20281="}']  # U+2028 ends no line
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert _read(replace(config, file=path)) == ["3+8=\u2028", "\u20281="]
    path.write_text("\n\n" + lines[0] + "\n7\n")
    with pytest.raises(ValueError, match="line 4 is no"):
        _read(replace(config, file=path))


def test_what_is_no_text_on_standard_input_gets_one_sentence(config, monkeypatch):
    piped = io.TextIOWrapper(io.BytesIO(b"\xff\xfebad"), errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", piped)
    with pytest.raises(ValueError, match="- cannot be read as text: .* can't decode byte 0xff"):
        _read(replace(config, file=Path("-")))


def test_a_console_that_cannot_write_a_character_is_told_it_in_ascii(config, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", console)
    monkeypatch.setattr(LocalSpeaker, "encode", lambda self, prompt: (7, 5))
    generate(replace(config, prompts=("3 → 8", "4"), max_tokens=2))
    console.flush()
    shown = console.buffer.getvalue().decode("cp1252")
    assert shown.splitlines()[0] == "3 \\u2192 8"


@pytest.mark.parametrize(("terminal", "no_color", "dim"), [(1, "", 1), (1, "1", 0), (0, "", 0)])
def test_thinking_is_dimmed_on_a_terminal_unless_colours_are_unwanted(
    config, monkeypatch, terminal, no_color, dim
):
    written = io.StringIO()
    written.isatty = lambda: bool(terminal)  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.setenv("NO_COLOR", no_color)
    generate(replace(config, max_tokens=3))
    assert (DIM in written.getvalue()) == bool(dim)


def test_ctrl_c_leaves_the_terminal_as_it_was(config, monkeypatch, capsys):
    written = io.StringIO()
    written.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show, pieces = Screen.show, []

    def interrupted(self, text):
        show(self, text)
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "show", interrupted)
    words = f"generate 3+8= --model {config.model} --temperature 1 --seed 4 --precision fp32"
    assert run(words.split()) == 130
    assert len(pieces) == 2 and written.getvalue().startswith(f"{DIM}<think>")
    assert written.getvalue().endswith(f"{PLAIN}\n")
    assert "interrupted" in capsys.readouterr().err


def text_of(*pieces: str, dim: bool) -> str:
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", written)
        screen = Screen(dim=dim)
        for piece in pieces:
            screen.show(piece)
        screen.end()
    return written.getvalue()


def test_thinking_is_dimmed_however_its_tags_are_cut():
    text = "<think>a<b</think>4<"
    expected = f"{DIM}<think>a<b</think>{PLAIN}4<{PLAIN}\n"
    for cut in range(len(text)):
        assert text_of(text[:cut], text[cut:], dim=True) == expected
    assert text_of(*text, dim=True) == expected
    assert text_of(*text, dim=False) == text + "\n"
    assert text_of("<think>cut", dim=True).endswith(f"cut{PLAIN}\n")


def test_no_control_character_reaches_the_terminal():
    hostile = "\x1b[31m\x9b2J\r\x07\u202e\x00\x7f"
    shown = text_of("<think>\t" + hostile, dim=True)
    inner = shown.removeprefix(DIM).removesuffix(f"{PLAIN}\n")
    assert all(c.isprintable() or c == "\t" for c in inner)
    assert inner == "<think>\t\\x1b[31m\\x9b2J\\r\\x07\\u202e\\x00\\x7f"


def test_samples_that_were_cut_are_counted(config, capsys):
    generate(replace(config, max_tokens=1, samples=4))
    assert "4 of 4 samples cut at their last token" in capsys.readouterr().err


def test_a_server_answers_from_the_shell_and_what_is_missing_is_said(capsys):
    with MockServer() as server:
        generate(GenerateConfig(("3+8=",), server.url))
        one = capsys.readouterr()
        assert re.fullmatch(r"<think>[a-f]+</think>\d\n", one.out)
        assert "8 prompt + " in one.err and "FLOPs unknown" in one.err
        options = ServerOptions(concurrency=1, retries=0)
        server.fault = lambda n: "error" if n == 2 else None
        with pytest.raises(Unfinished, match=r"1 of 3 samples did not arrive \(HTTP 503 1 times"):
            generate(GenerateConfig(("1=", "2=", "3="), server.url, server=options))
        assert capsys.readouterr().out.splitlines()[::2] == ["1=", "3="]
        server.fault = lambda n: "error" if n == 6 else None  # the second prompt's first
        with pytest.raises(Unfinished, match="1 of 4 samples did not arrive"):
            generate(GenerateConfig(("1=", "2="), server.url, samples=2, server=options))
        shown = capsys.readouterr().out.splitlines()
        assert [line for line in shown if "<think>" not in line] == ["1=", "2="]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompts=("",)), "the prompt is empty"),
        (dict(prompts=("3+\udce9",)), r"the prompt has '\\udce9', which is no character"),
        (dict(prompts=("3+x=",)), "the prompt has 'x', which the tokenizer"),
        (dict(prompts=("1+" * 40,)), "81 tokens as the model reads it; its context of 64"),
        (dict(max_tokens=60), "max_tokens is 60; after 5 prompt tokens"),
        (dict(budget=80), "a budget of 80 does not fit"),
        (dict(system="Be brief."), "no chat template to put it into"),
        (dict(file="nowhere.txt"), "nowhere.txt cannot be read"),
        (dict(file="empty"), "holds no prompt"),
        (dict(file="bad.jsonl"), r"line 2 is no \{\"prompt\""),
    ],
)
def test_what_cannot_be_answered_gets_one_sentence(config, tmp_path, changes, message):
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1="}\n{"prompt": 7}\n')
    if "file" in changes:
        changes["file"] = tmp_path / changes["file"]
    with pytest.raises(ValueError, match=message) as error:
        generate(replace(config, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model m", "there is no prompt"),
        ("1= --model m --temperature -1", "temperature is -1.0"),
        ("1= --model m --top-p 0", "top_p is 0.0"),
        ("1= --model m --samples 0", "samples is 0"),
        ("1= --model m --budget -1", "budget is -1"),
        ("1= --model m --max-tokens 0", "max_tokens is 0"),
        ("1= --model m --tokenizer t", "a model of this machine has its own"),
        ("1= --model http://x --server.concurrency 0", "server.concurrency is 0"),
        ("1= --model http://x --server.timeout 0", "server.timeout is 0"),
        ("1= --model http://x --server.retries -1", "server.retries is -1"),
        ("1= --model http://x --engine transformers", "a server is its own engine"),
        ("1= --model http://x --precision bf16", "that is the server's affair"),
        ("1= --model http://x --invariant", "only ponder's own engine promises that"),
        ("1= --model m --engine transformers --invariant", "only ponder's own engine"),
    ],
)
def test_options_that_cannot_be_get_one_sentence(capsys, words, message):
    assert run(["generate", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

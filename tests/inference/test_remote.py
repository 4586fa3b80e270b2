"""A served model, measured through a server that may drop, delay, garble and limit its answers."""

import csv
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from ponder import tasks
from ponder.cli import run
from ponder.inference import Unfinished, remote
from ponder.inference import server as server_module
from ponder.inference.config import GenerateConfig, ServerOptions, SweepConfig
from ponder.inference.engine import SamplingParams
from ponder.inference.redraw import redraw
from ponder.inference.remote import RemoteSpeaker
from ponder.inference.shell import generate
from ponder.inference.speaker import Ask
from ponder.inference.sweep import sweep

from .mock_server import TOKENIZER, MockServer, continuation

KEY = "sk-planted/0123456789+secret"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in server_module.KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits between attempts are a hundredth of what they are in earnest."""
    monkeypatch.setattr(server_module, "LONGEST_WAIT", 0.01)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """The folder of the mock model's tokenizer, which has no chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "<unk>",
                "eos_token": "<eos>",
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    return str(folder)


@pytest.fixture(scope="module")
def no_report():
    """From the first test that asks for it, no report is drawn: it takes longer than a sweep."""

    def write_report(folder: Path, results, *_, **__) -> Path:
        assert results
        return folder / "index.html"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ponder.inference.sweep.write_report", write_report)
        yield


@pytest.fixture(scope="module")
def calm(tokenizer, no_report, tmp_path_factory) -> list[tuple]:
    """What a server without faults leaves in the store."""
    out = tmp_path_factory.mktemp("calm")
    with MockServer() as mock:
        sweep(config_of(mock, tokenizer, out))
    return stored(out)


@pytest.fixture
def server():
    with MockServer() as mock:
        yield mock


def config_of(mock: MockServer, tokenizer: str | None, out: Path, **changes) -> SweepConfig:
    values = dict(
        model=mock.url,
        out=out,
        samples=(1, 3),
        budgets=(0, 2) if tokenizer else (),
        problems=6,
        tokenizer=tokenizer,
        server=ServerOptions(concurrency=8, timeout=20, retries=8),
    )
    return SweepConfig(**values | changes)  # type: ignore[arg-type]


def stored(out: Path) -> list[tuple]:
    """Everything of the samples but their seconds."""
    with sqlite3.connect(out / "sweep" / "samples.sqlite") as db:
        return db.execute(
            "SELECT problem, budget, params, seed, sample, text, answer, correct, prompt_tokens, "
            "sampled_tokens, forced_tokens, think_tokens, logprob, finish FROM sample "
            "ORDER BY 3, 1, 2, 5"
        ).fetchall()


def test_a_served_model_is_swept_with_budgets(server, tokenizer, tmp_path):
    page = sweep(config_of(server, tokenizer, tmp_path / "out"))
    rows = stored(tmp_path / "out")
    assert len(rows) == 6 * 3 * (1 + 3)
    with sqlite3.connect(tmp_path / "out" / "sweep" / "samples.sqlite") as db:
        prompts = dict(db.execute("SELECT id, prompt FROM problem"))
    cut = 0
    for problem, budget, _, _, _, text, _, _, prompt, sampled, forced, think, logprob, _ in rows:
        thinking, _, answer = text.removeprefix("<think>").partition("</think>")
        # The mock's answer depends on the thinking that it was shown, to the letter.
        assert answer == continuation(prompts[problem] + f"<think>{thinking}</think>", 0)
        assert think == len(thinking) and prompt == len(prompts[problem]) + 1
        # The letters, </think> where the model wrote it itself, the digit, the end.
        assert sampled == len(thinking) + (1 - forced) + 2
        assert logprob is None
        if budget is not None:
            assert think <= budget and forced == (think == budget)
            cut += forced
        else:
            assert forced == 0
    assert 0 < cut < len(rows)
    results = list(csv.DictReader((tmp_path / "out" / "report" / "results.csv").open()))
    assert {row["think_budget"] for row in results} == {"0", "2", "inf"}
    assert all(row["flops_per_problem"] == "" for row in results)
    assert "Tokens per problem" in page.read_text()
    assert redraw(tmp_path / "out") == page


def test_remote_text_is_data(tokenizer, tmp_path, capsys):
    with MockServer() as server:
        server.echo = "\x1b]0;owned\x07<script>alert(1)</script>\u202e\ud800"
        page = sweep(config_of(server, tokenizer, tmp_path / "out"))
        generate(GenerateConfig(("3+8=", "4*2="), server.url))
    assert "<script" not in page.read_text()
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "owned" in shown


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_the_key_is_sent_and_stays_nowhere(tokenizer, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    with MockServer(key=KEY) as server:
        server.echo = f" you said {KEY}"
        sweep(config_of(server, tokenizer, tmp_path / "out"))
        generate(GenerateConfig(("3+8=",), server.url))
        server.status = 400
        with pytest.raises(ValueError, match=r"refuses \(HTTP 400\): no such thing.*\[key\]") as e:
            sweep(config_of(server, tokenizer, tmp_path / "refused"))
        said = str(e.value)
        assert "\x1b" not in said
        server.key = "another"
        with pytest.raises(ValueError, match="refuses the key in OPENAI_API_KEY") as e:
            sweep(config_of(server, tokenizer, tmp_path / "other"))
        said += str(e.value) + "".join(capfd.readouterr())
    files = everything(tmp_path)
    assert b"[key]" in files and b"you said" in files
    for secret in (KEY, KEY[3:], json.dumps(KEY)[1:-1], KEY.replace("/", "\\/"), "planted"):
        assert secret not in said and secret.encode() not in files


def with_key(status: int, body: bytes | None = None, **headers: str):
    """What answers a question with the key, wherever an answer has room for it."""

    def answer(handler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        said = json.dumps({"error": {"message": f"{KEY} is wrong"}}).encode()
        handler.send_response(status, f"No {KEY}")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(said if body is None else body)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        with_key(400),
        with_key(401, WWW_Authenticate=f"Bearer {KEY}"),
        with_key(404, f"<p>{KEY}</p>".encode()),
        with_key(429, Retry_After=KEY),
        with_key(500),
        with_key(302, Location=f"http://127.0.0.1:9/{KEY}"),
        with_key(200, f'{{"choices": [{{"text": "{KEY}'.encode()),
        with_key(200, f'data: {{"error": "{KEY}"}}\n\ndata: [DONE]\n\n'.encode()),
        with_key(200, b"", Content_Length=KEY),
    ],
)
@pytest.mark.parametrize("where", ["get", "post"])
def test_no_trouble_tells_the_key(answer, where, no_report, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PONDER_API_KEY", KEY)
    with MockServer(key=KEY) as server:
        setattr(server, where, answer)
        words = f"--model {server.url} --server.retries 1 --server.concurrency 1".split()
        sweeping = ["sweep", *words, "--problems", "2", "--budgets", "--out", str(tmp_path / "out")]
        assert run(sweeping) in (1, 2)
        assert run(["generate", *words, "3+8="]) in (1, 2)
        assert run(["generate", *words, "3+8=", "4*2="]) in (1, 2)
    said = "".join(capfd.readouterr())
    assert said.count("ponder: ") == 3 and "Traceback" not in said
    assert "planted" not in said and b"planted" not in everything(tmp_path)


def test_a_model_named_like_the_key_and_a_proxy_with_a_password_are_not_told(
    no_report, monkeypatch, tmp_path, capfd
):
    monkeypatch.setenv("PONDER_API_KEY", KEY)
    with MockServer(key=KEY) as server:
        server.models = [f"of {KEY}", "other"]
        assert run(["generate", "--model", server.url, "1="]) == 2
        server.models = server.models[:1]
        sweep(config_of(server, None, tmp_path / "out"))
        proxy = server.url.replace("http://", "http://me:planted@").removesuffix("/v1")
    monkeypatch.setenv("http_proxy", proxy)
    assert run(["generate", "--model", "http://example.invalid/v1", "1="]) == 2
    said = "".join(capfd.readouterr())
    assert "of [key], other" in said and "no server answers at http://example.invalid/v1" in said
    assert "planted" not in said and b"planted" not in everything(tmp_path)
    assert b"of [key]" in everything(tmp_path)


FAULTS = ("drop", "late", "garble", "strange", "deep", "cut", "limit", "error")


def test_a_third_of_all_answers_lost_loses_no_sample_and_stores_none_twice(
    calm, tokenizer, tmp_path
):
    dice = random.Random(0)
    hits: Counter[str] = Counter()

    def fault(n: int) -> str | None:
        kind = dice.choice(FAULTS) if dice.random() < 0.3 else None
        hits[str(kind)] += 1
        return kind

    with MockServer(fault=fault) as wild:
        options = ServerOptions(concurrency=8, timeout=2, retries=20)
        sweep(config_of(wild, tokenizer, tmp_path / "wild", server=options))
        asked = len(wild.requests)
    assert all(hits[kind] for kind in FAULTS)
    assert stored(tmp_path / "wild") == calm
    # What was answered in time was not asked for again.
    assert set(wild.answered.values()) == {1}
    assert asked == sum(hits.values())
    assert wild.answered.total() + wild.lost == hits["None"]


def test_what_a_failing_server_kept_back_is_drawn_by_resume(calm, tokenizer, tmp_path, capsys):
    with MockServer(fault=lambda n: None if n % 3 else "error") as server:
        options = ServerOptions(concurrency=4, timeout=20, retries=0)
        config = config_of(server, tokenizer, tmp_path / "out", server=options)
        with pytest.raises(Unfinished, match=r"\d+ samples did not arrive \(HTTP 503 \d+ times"):
            sweep(config)
        before = stored(config.out)
        assert 0 < len(before) < 72
        words = f"sweep --model {server.url} --tokenizer {tokenizer} --out {config.out} --samples 1"
        words += " 3 --budgets 0 2 --problems 6 --server.retries 0 --resume"
        assert run(words.split()) == 1
        assert "ponder: " in capsys.readouterr().err
        server.fault = lambda n: None
        sweep(replace(config, resume=True))
        assert stored(config.out) == calm
        asked = len(server.requests)
        sweep(replace(config, resume=True))
        assert len(server.requests) == asked


KILLED = """
import sys
from ponder.cli import run
from ponder.inference import server, sweep
server.LONGEST_WAIT = 0.01
sweep.KEEP_EVERY_SECONDS = 0
sys.exit(run(sys.argv[1:]))
"""


def test_killed_amid_faults_it_loses_nothing_and_asks_for_nothing_twice(calm, tokenizer, tmp_path):
    dice = random.Random(1)
    process: subprocess.Popen | None = None

    def fault(n: int) -> str | None:
        if n == 60:
            assert process
            process.kill()
        return dice.choice(FAULTS) if dice.random() < 0.3 else None

    with MockServer(fault=fault) as server:
        options = ServerOptions(concurrency=8, timeout=2, retries=20)
        config = config_of(server, tokenizer, tmp_path / "out", server=options)
        words = f"sweep --model {server.url} --tokenizer {tokenizer} --out {config.out} --problems"
        words += " 6 --samples 1 3 --budgets 0 2 --server.timeout 2 --server.retries 20"
        process = subprocess.Popen([sys.executable, "-c", KILLED, *words.split()])
        assert process.wait(60) == -signal.SIGKILL
        before = stored(config.out)
        assert 0 < len(before) < 60 and set(before) < set(calm)
        server.fault = lambda n: None
        asked = len(server.requests)
        sweep(replace(config, resume=True))
        assert stored(config.out) == calm
        # A budget takes two questions, the thinking and the answer behind it.
        lacking = set(calm) - set(before)
        assert len(server.requests) - asked == sum(2 if row[1] else 1 for row in lacking)


def test_sigterm_ends_a_sweep_as_ctrl_c_does(tmp_path):
    process: subprocess.Popen | None = None

    def fault(n: int) -> str | None:
        if n == 20:
            assert process
            process.terminate()
        return "late" if n >= 20 else None

    with MockServer(fault=fault) as server:
        words = f"sweep --model {server.url} --out {tmp_path} --budgets --server.concurrency 1"
        code = KILLED.replace("KEEP_EVERY_SECONDS = 0", "KEEP_EVERY_SECONDS = 1000")
        process = subprocess.Popen([sys.executable, "-c", code, *words.split()])
        assert process.wait(60) == 130
    assert 0 < len(stored(tmp_path)) <= 20


def test_a_signal_that_another_thread_gets_interrupts_too(server):
    """As the system may have it; the answer is not waited for, which would be asked for again."""

    def fault(n: int) -> str:
        if n == 0:
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        return "late"

    server.fault = fault
    speaker = RemoteSpeaker(server.url, ServerOptions(concurrency=1, timeout=8, retries=2))
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(speaker.generate([ask()]))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(server.requests) == 1


def test_a_prompt_that_is_refused_stops_no_other(no_report, tmp_path):
    with MockServer() as server:
        options = ServerOptions(concurrency=1)
        config = config_of(server, None, tmp_path / "out", samples=(9,), problems=3, server=options)
        prompts = [p.prompt for p in tasks.get(config.task).problems("test", 3, config.seed)]
        server.refused = f'"{prompts[0]}"'
        missing = r"10 samples .* refuses \(HTTP 400\): too long 10 times"
        with pytest.raises(Unfinished, match=missing):  # more in a row than a server's end takes
            sweep(config)
        assert {row[0] for row in stored(config.out)} == {1, 2}
        assert len(server.requests) == 3 * 10  # a refusal is not asked again
        with pytest.raises(Unfinished, match=missing):  # where nothing else is lacking
            sweep(replace(config, resume=True))
        server.refused = "nothing"
        sweep(replace(config, resume=True))
        assert len(stored(config.out)) == len(server.requests) - 20 == 30


def test_a_server_that_refuses_all_is_told_of_before_all_is_asked(server):
    server.status = 400
    speaker = RemoteSpeaker(server.url, ServerOptions(concurrency=1))

    def asks():
        yield from [ask()] * 20
        assert told

    with pytest.warns(UserWarning, match="nothing arrived so far: .* no such thing") as told:
        with pytest.raises(ValueError, match="no such thing"):
            list(speaker.generate(asks()))
    assert len(server.requests) == 20


def test_a_server_that_refuses_the_key_is_not_asked_for_the_rest(server):
    speaker = RemoteSpeaker(server.url, ServerOptions(concurrency=1))
    server.key = "another"
    with pytest.raises(ValueError, match="asks for a key"):
        list(speaker.generate([ask()] * 60))
    assert len(server.requests) < 20


def test_a_server_that_goes_away_is_not_asked_for_the_rest(no_report, tokenizer, tmp_path):
    with MockServer(fault=lambda n: "error" if n >= 30 else None) as server:
        options = ServerOptions(concurrency=2, timeout=20, retries=1)
        config = config_of(server, tokenizer, tmp_path / "out", problems=60, server=options)
        with pytest.raises(Unfinished, match="samples did not arrive"):
            sweep(config)
        assert len(stored(config.out)) >= 10
        assert len(server.requests) < 60  # of some 1,200


@pytest.mark.parametrize("answers", [0, 1])
def test_a_server_that_answers_next_to_nothing_loses_nothing(no_report, tmp_path, answers):
    with MockServer(fault=lambda n: "error" if n >= answers else None) as server:
        options = ServerOptions(concurrency=1, retries=0)
        config = config_of(server, None, tmp_path / "out", server=options)
        with pytest.raises(Unfinished, match=f"{24 - answers} samples did not arrive"):
            sweep(config)
        assert len(stored(config.out)) == answers


def test_no_more_requests_at_once_than_allowed(server, no_report, tokenizer, tmp_path):
    options = ServerOptions(concurrency=3, timeout=20)
    server.gather(3)
    sweep(config_of(server, tokenizer, tmp_path / "out", server=options))
    assert server.most_at_once == 3


def ask(prompt: str = "3+8=", seed: int = 0, **params) -> Ask:
    return Ask(prompt, SamplingParams(max_tokens=40, **params), seed, 0)


def test_retry_after_is_honoured_by_every_request(server, monkeypatch):
    server.fault = lambda n: "limit" if n == 0 else None  # Retry-After: 0.05
    speaker = RemoteSpeaker(server.url, ServerOptions(retries=1))
    waits: list[float] = []
    monkeypatch.setattr(speaker.server, "_pause", waits.append)
    (_,) = speaker.generate([ask()])
    before, wait, again = waits
    assert before <= 0 and wait == 0.05 and 0 < again <= 0.05
    speaker.server.ask("/models", None, lambda answer: answer)
    assert 0 < waits[-1] <= 0.05


@pytest.mark.parametrize("count", [10**30, -1, True, 3.5, "7", None])
def test_numbers_of_tokens_that_cannot_be_are_garbage(count):
    choice = {"message": {"content": "7"}, "finish_reason": "stop"}
    for wrong in ("prompt_tokens", "completion_tokens"):
        usage = {"prompt_tokens": 3, "completion_tokens": 1} | {wrong: count}
        with pytest.raises(server_module.Failed, match="a garbled answer"):
            server_module.Answer.of({"choices": [choice], "usage": usage})


def test_retry_after_is_seconds_or_a_date():
    assert server_module._retry_after("7") == 7.0
    assert 50 < server_module._retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    for nothing in (None, "-3", "soon", "inf", "nan", formatdate(0)):
        assert server_module._retry_after(nothing) == 0.0


@pytest.mark.parametrize(("reasoning", "counts"), [(True, True), (True, False), (False, False)])
def test_chat_is_spoken_where_there_are_no_budgets(no_report, server, tmp_path, reasoning, counts):
    server.reasoning = reasoning  # or the text holds <think> … </think>
    server.counts = counts
    sweep(config_of(server, None, tmp_path / "out", system="Be brief.", problems=3))
    rows = stored(tmp_path / "out")
    assert len(rows) == 3 * 4 and all(row[1] is None for row in rows)
    for path, body in server.requests:
        assert path == "/v1/chat/completions"
        assert [m["role"] for m in body["messages"]] == ["system", "user"]
        # Nothing that only some servers know, and no bound that nobody asked for.
        assert set(body) == {"model", "messages", "temperature", "top_p", "seed"}
    prompts = {body["messages"][1]["content"] for _, body in server.requests}
    for row in rows:
        texts = {
            continuation(p + "<think>", b["seed"]) for p in prompts for _, b in server.requests
        }
        assert row[5].removeprefix("<think>") in texts
        thinking = row[5].removeprefix("<think>").partition("</think>")[0]
        assert row[11] == len(thinking)


@pytest.mark.parametrize("budget", [None, 0, 2])
def test_a_streamed_sample_is_the_whole_one(server, tokenizer, budget):
    speaker = RemoteSpeaker(server.url, ServerOptions(), tokenizer=tokenizer, budgets=True)
    pieces: list[str] = []
    (streamed,) = speaker.generate([ask(budget=budget)], watch=lambda _, text: pieces.append(text))
    (whole,) = speaker.generate([ask(budget=budget)])
    assert replace(streamed, seconds=0, ask=whole.ask) == replace(whole, seconds=0)
    assert "".join(pieces) == whole.text
    assert len(pieces) >= len(whole.text) - len("<think></think>")  # a character at a time
    assert all(body["stream"] for _, body in server.requests[: len(server.requests) // 2])


def test_a_stop_string_that_comes_with_the_text_is_shown_once(server, tokenizer):
    server.echo = "</think>"
    speaker = RemoteSpeaker(server.url, ServerOptions(), tokenizer=tokenizer, budgets=True)
    pieces: list[str] = []
    (streamed,) = speaker.generate([ask(budget=9)], watch=lambda _, text: pieces.append(text))
    assert "".join(pieces) == streamed.text


def test_a_budget_that_is_named_twice_is_drawn_once(server, tokenizer, no_report, tmp_path):
    sweep(config_of(server, tokenizer, tmp_path / "out", budgets=(2, 0, 2), problems=2))
    assert set(server.answered.values()) == {1}


def test_a_thought_with_more_tokens_than_were_drawn_stays_within_the_context(server, tokenizer):
    server.echo = "abc"  # what the server does not count
    speaker = RemoteSpeaker(server.url, ServerOptions(), tokenizer=tokenizer, budgets=True)
    most = speaker.fit(["3+8="], budgets=[2], max_tokens=None)
    list(speaker.generate([Ask("3+8=", SamplingParams(max_tokens=most, budget=2), 0, 0)]))
    assert [len(b["prompt"]) + b["max_tokens"] for _, b in server.requests] == [5 + 2, 64]


def test_a_streamed_chat_shows_its_thinking_between_tags(server):
    speaker = RemoteSpeaker(server.url, ServerOptions())
    pieces: list[str] = []
    (streamed,) = speaker.generate([ask()], watch=lambda _, text: pieces.append(text))
    (whole,) = speaker.generate([ask()])
    assert "".join(pieces) == streamed.text == whole.text
    assert streamed.sampled_tokens == whole.sampled_tokens


def test_seconds_are_shared_among_the_answers_under_way(monkeypatch):
    now = 0.0
    monkeypatch.setattr(remote.time, "perf_counter", lambda: now)
    clock = remote._Clock()
    now = 5.0  # nobody's
    first = clock.tick(+1)
    now = 6.0
    second = clock.tick(+1)
    now = 10.0
    assert clock.tick(-1) - first == 1 + 4 / 2
    now = 11.0
    assert clock.tick(-1) - second == 4 / 2 + 1


def test_the_own_key_comes_first_and_a_redirect_gets_none(server, monkeypatch):
    monkeypatch.setenv("PONDER_API_KEY", "own")
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    server.key = "own"
    RemoteSpeaker(server.url, ServerOptions())
    with MockServer() as elsewhere:
        get = server.get
        server.get = lambda handler: server.send(handler, 302, b"", Location=elsewhere.url)
        with pytest.raises(ValueError, match=r"sends its visitors elsewhere \(HTTP 302\)"):
            RemoteSpeaker(server.url, ServerOptions())
        server.get = get


def test_a_placeholder_of_a_key_is_no_secret(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    server.key = "EMPTY"
    server.echo = " EMPTY"
    (completion,) = RemoteSpeaker(server.url, ServerOptions()).generate([ask()])
    assert completion.text.endswith(" EMPTY")


def test_a_key_that_no_header_can_carry_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("PONDER_API_KEY", "planted\nkey")
    with pytest.raises(ValueError, match="PONDER_API_KEY holds characters") as error:
        RemoteSpeaker(server.url, ServerOptions())
    assert "planted" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://me:planted@host/v1", "http://host/v1?api-key=planted", "http://me:planted@[::1"]
)
def test_a_url_with_a_secret_is_refused_without_saying_it(tmp_path, url):
    with pytest.raises(ValueError, match="leave them out") as error:
        sweep(SweepConfig(model=url, out=tmp_path / "out"))
    assert "planted" not in str(error.value) and not (tmp_path / "out").exists()


def down() -> str:
    with MockServer() as server:
        return server.url


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="down"), "no server answers at http://127.0.0.1:.*refused"),
        (dict(model="http:///v1"), "a server is http://HOST:PORT/v1"),
        (dict(model="http://[::1"), r"model is 'http://\[::1'; a server is http://HOST:PORT/v1"),
        (dict(model="http://localhost:abc/v1"), "model is 'http://localhost:abc/v1'; a server is"),
        (dict(model="http://localhost:1/ä"), "'http://localhost:1/ä'; .* in ASCII and without"),
        (dict(path="/elsewhere"), r"refuses \(HTTP 404\)"),
        (dict(key="needed"), "asks for a key .* PONDER_API_KEY or OPENAI_API_KEY"),
        (dict(models=["a", "b"]), r"lists 2 models \(a, b\); say which, as in --model .*#NAME"),
        (dict(models=[]), r"lists 0 models \(none\)"),
        (dict(budgets=(2,)), "thinking budgets of mock need the chat template"),
        (dict(tokenizer="nowhere"), "there is no folder nowhere with a tokenizer"),
        (dict(tokenizer=True, context=None), "does not say how long the context of mock is"),
        (dict(tokenizer=True, context=5), "its context of 5 leaves room for at most 4"),
        (dict(tokenizer=True, max_tokens=60), "max_tokens is 60; after .* the context of 64"),
        (dict(tokenizer=True, budgets=(70,)), "a budget of 70 does not fit"),
        (dict(tokenizer=True, system="x"), "has no chat template to put it into"),
        (dict(engine="transformers"), "a server is its own engine"),
    ],
)
def test_a_server_that_cannot_be_swept_gets_one_sentence(
    server, tokenizer, tmp_path, changes, message
):
    for name in ("key", "models", "context"):
        if name in changes:
            setattr(server, name, changes.pop(name))
    changes["model"] = changes.get("model", server.url).replace("down", down())
    changes["model"] = changes["model"].replace("/v1", changes.pop("path", "/v1"))
    given = changes.pop("tokenizer", None)
    given = tokenizer if given is True else given
    with pytest.raises(ValueError, match=message) as error:
        sweep(config_of(server, given, tmp_path / "out", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_dialect_gets_one_sentence(no_report, server, tmp_path):
    server.get = lambda handler: server.send(handler, 200, b"<html>hello</html>")
    with pytest.raises(ValueError, match="something else than a list of models"):
        sweep(config_of(server, None, tmp_path / "out"))
    del server.get
    server.usage = False  # an answer that does not say what it cost
    config = config_of(server, None, tmp_path / "out", server=ServerOptions(retries=1))
    with pytest.raises(Unfinished, match=r"did not arrive \(a garbled answer"):
        sweep(config)


@pytest.mark.parametrize(
    "status", [404, 500, 503]
)  # Transformers': 500 where the Hub's cache lacks
def test_a_server_without_a_list_of_models_is_asked_by_name(server, status):
    server.get = lambda handler: server.send(handler, status, b"")
    if status >= 500:
        with pytest.raises(ValueError, match=rf"to list its models \(HTTP {status}\); .*#NAME"):
            RemoteSpeaker(server.url, ServerOptions())
    speaker = RemoteSpeaker(server.url + "#mine", ServerOptions())
    assert speaker.identity["model"] == "served as mine" and speaker.context is None
    list(speaker.generate([ask()]))
    assert server.requests[0][1]["model"] == "mine"


@pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp"])
def test_a_model_that_a_server_does_not_have_is_refused(server, owner):
    server.listed = {"owned_by": owner}  # llama.cpp would answer all the same, with what it has
    with pytest.raises(ValueError, match="serves no model 'mok'; what it serves: mock"):
        RemoteSpeaker(server.url + "#mok", ServerOptions())
    server.listed = {"owned_by": "openai"}  # its list may be of some, as Transformers' is
    assert RemoteSpeaker(server.url + "#mok", ServerOptions()).name == "mok"


def test_half_a_character_is_not_sent(server):
    speaker = RemoteSpeaker(server.url, ServerOptions())
    with pytest.raises(ValueError, match="the prompt has .* which is no character of Unicode"):
        speaker.fit(["fine", "half \udcff"], budgets=[None], max_tokens=4)


def test_filters_are_sent_where_they_filter(server):
    speaker = RemoteSpeaker(server.url, ServerOptions())
    list(speaker.generate([ask(top_k=5, top_p=0.9, min_p=0.1)]))
    list(speaker.generate([ask(top_k=5, top_p=0.9, min_p=0.1, temperature=0.0)]))
    (_, hot), (_, greedy) = server.requests
    assert (hot["top_k"], hot["top_p"], hot["min_p"]) == (5, 0.9, 0.1)
    assert greedy["top_p"] == 1.0 and not {"top_k", "min_p"} & set(greedy)
    assert hot["max_tokens"] == 40


@pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp"])
def test_servers_that_fill_in_what_is_left_open_are_told_all(server, owner):
    server.listed = {"owned_by": owner}
    speaker = RemoteSpeaker(server.url, ServerOptions())
    kinds = [{}, {"top_k": 5, "min_p": 0.1}, {"top_k": 5, "min_p": 0.1, "temperature": 0.0}]
    for kind in kinds:
        list(speaker.generate([ask(**kind)]))
    told = [(b["top_k"], b["min_p"], b["repetition_penalty"]) for _, b in server.requests]
    assert told == [(-1, 0.0, 1.0), (5, 0.1, 1.0), (-1, 0.0, 1.0)]


def test_whoever_continues_tokens_is_told_all(server, tokenizer):
    speaker = RemoteSpeaker(server.url, ServerOptions(), tokenizer=tokenizer, budgets=True)
    list(speaker.generate([ask(budget=2)]))
    for path, body in server.requests:
        assert path == "/v1/completions" and body["skip_special_tokens"] is False
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("listed", "context"),
    [
        ({"meta": {"n_ctx": 48, "n_ctx_train": 512}}, 48),  # llama.cpp: what a sample may have
        ({"max_model_len": 40}, 40),
        ({"meta": None}, None),
        ({"meta": {"n_ctx": "48"}}, None),
        ({"max_model_len": -1}, None),
    ],
)
def test_the_context_is_what_the_list_of_models_says(server, listed, context):
    server.context, server.listed = None, listed
    assert RemoteSpeaker(server.url, ServerOptions()).context == context


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_may_end_without_done(server, tokenizer, chat):
    server.done = False
    more = {} if chat else dict(tokenizer=tokenizer, budgets=True)
    speaker = RemoteSpeaker(server.url, ServerOptions(retries=0), **more)
    (streamed,) = speaker.generate([ask(budget=None)], watch=lambda _, text: None)
    (whole,) = speaker.generate([ask(budget=None)])
    assert replace(streamed, seconds=0, ask=whole.ask) == replace(whole, seconds=0)


def test_a_stream_that_breaks_off_is_no_sample(server):
    server.done = False
    server.usage = False  # as where the last chunk is missing
    speaker = RemoteSpeaker(server.url, ServerOptions(retries=0))
    assert not list(speaker.generate([ask()], watch=lambda _, text: None))
    assert speaker.failures == Counter(["broken off (no [DONE])"])


def test_a_server_that_does_not_sample_is_noticed(server, monkeypatch):
    speaker = RemoteSpeaker(server.url, ServerOptions())
    asks = [Ask(f"{i % 5}=", SamplingParams(max_tokens=40), 0, i) for i in range(30)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(speaker.generate(asks))
        cold = [replace(a, params=SamplingParams(temperature=0.0, max_tokens=40)) for a in asks]
        monkeypatch.setattr("ponder.inference.remote.stream_key", lambda *_: 7)
        list(speaker.generate(cold))
        list(speaker.generate(asks[:28]))  # too few to tell
        # Problems with one prompt ask for one sample.
        list(speaker.generate([replace(a, prompt="1=", index=0) for a in asks]))
    with pytest.warns(UserWarning, match="same text each time, 25 times, .* not to sample"):
        list(speaker.generate(asks))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "no", "code": 400}}, "no"),
        ({"error": "no"}, "no"),
        ({"object": "error", "message": "no"}, "no"),
        ({"detail": "no"}, "no"),  # FastAPI, as Transformers' server
        ({"detail": [{"loc": ["body"], "msg": "no"}, {"msg": "not"}]}, "no; not"),
        ({"error": {"code": 7}}, ""),
        ([], ""),
        (None, ""),
    ],
)
def test_a_refusal_says_why_in_every_dialect(body, said):
    assert server_module._complaint(body) == said


@pytest.mark.parametrize("status", [429, 500])  # it may be for good: a quota that is spent, say
def test_what_a_failing_server_says_is_told(server, status):
    server.status = status
    speaker = RemoteSpeaker(server.url, ServerOptions(retries=1))
    assert not list(speaker.generate([ask()]))
    assert speaker.failures == Counter([rf"HTTP {status}: no such thing\x1b[31m"])
    assert len(server.requests) == 2


def test_a_refusal_that_never_ends_is_late(server):
    over, ended = threading.Event(), threading.Event()

    def drip(handler, *_, **__):
        handler.send_response(503)
        handler.send_header("Content-Length", "10000")
        handler.over()
        handler.end_headers()
        with suppress(OSError):
            for _ in range(1000):
                handler.wfile.write(b" ")
                if over.wait(0.05):
                    return
        ended.set()

    speaker = RemoteSpeaker(server.url, ServerOptions(retries=0, timeout=0.2))
    server.send = drip
    assert not list(speaker.generate([ask()]))
    assert speaker.failures == Counter(["HTTP 503"]) and not ended.is_set()
    over.set()


def test_a_thought_that_never_ends_is_cut(server, tokenizer):
    speaker = RemoteSpeaker(server.url, ServerOptions(), tokenizer=tokenizer, budgets=True)
    seeds = [Ask("3+8=", SamplingParams(max_tokens=1), seed, 0) for seed in range(8)]
    cut = [c for c in speaker.generate(seeds) if "</think>" not in c.text]
    assert cut
    for completion in cut:
        assert completion.finish == "length" and completion.sampled_tokens == 1
        assert len(completion.text) == len("<think>") + 1 and completion.think_tokens == 1

"""Searches as part of a sweep: kept, resumed, evaluated on the same axes as samples."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ponder import tasks
from ponder.inference import report
from ponder.inference.chat import known_shape
from ponder.inference.config import SearchOptions, SweepConfig
from ponder.inference.curves import Curves
from ponder.inference.engine import SamplingParams
from ponder.inference.evaluation import evaluate
from ponder.inference.findings import search_rows
from ponder.inference.redraw import redraw
from ponder.inference.report import csv_text
from ponder.inference.search_sweep import Judging, Searches
from ponder.inference.search_table import Line, Searched
from ponder.inference.speaker import open_speaker
from ponder.inference.store import Store
from ponder.inference.strategies import Outcome
from ponder.inference.sweep import sweep
from ponder.tasks.last_digit import LastDigit

SEARCHES = ("beam", "dvts", "rebase", "mcts", "revise")
# The model has learned little. So the last digit that it writes is its answer here, and even ones
# are right: about half of them.
ANSWER = "lambda self, text: next((c for c in reversed(text) if c.isdigit()), None)"
VERIFY = "lambda self, problem, text: (self.answer(text) or '?') in '02468'"


@pytest.fixture(scope="module", autouse=True)
def even_digits_are_right():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastDigit, "answer", eval(ANSWER))
        patch.setattr(LastDigit, "verify", eval(VERIFY))
        yield


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory) -> SweepConfig:
    """A small sweep with every search, done."""
    config = SweepConfig(
        model=str(model),
        out=tmp_path_factory.mktemp("searched") / "out",
        samples=(1, 4),
        budgets=(),
        problems=5,
        slots=8,
        max_tokens=14,
        precision="fp32",
        searches=SearchOptions(search=SEARCHES, lines=(2, 4), width=2, step=4),
    )
    with pytest.MonkeyPatch.context() as patch:  # of the figures only that of the searches
        patch.setattr(report, "png", lambda results: b"")
        patch.setattr(report, "svg", lambda *_, **__: "")
        drawn = report.wide_and_narrow

        def only_searches(draw, name, *of, **size):
            return drawn(draw, name, *of, **size) if name == "searches" else ("", "")

        patch.setattr(report, "wide_and_narrow", only_searches)
        sweep(config)
    return config


def stored(out: Path, columns="problem, search, params, seed, text, lines, pruned_tokens, flops"):
    with sqlite3.connect(out / "sweep" / "samples.sqlite") as db:
        return db.execute(f"SELECT {columns} FROM search ORDER BY 1, 2").fetchall()


def rows_of(out: Path) -> list[dict]:
    with open(out / "report" / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_search_of_the_grid_is_kept(swept):
    found = stored(swept.out)
    assert len(found) == 5 * len(SEARCHES) * 2
    task, problems = tasks.get("last_digit"), tasks.get("last_digit").problems("test", 5, 0)
    for problem, _, params, seed, text, lines, _, _ in found:
        assert (params, seed) == ("temperature=1.0", 0) and text.startswith("<think>")
        best = json.loads(lines)[0]
        assert best[:2] == [task.answer(text), task.verify(problems[problem], text)]
        assert best[2] == max(value for *_, value in json.loads(lines))
    right = sum(json.loads(row[5])[0][1] for row in found)
    assert 10 < right < 40  # of 50: what follows is told apart


def test_rows_stand_beside_those_of_samples(swept):
    rows = rows_of(swept.out)
    assert {row["strategy"] for row in rows} >= {"self-consistency", "beam", "beam-vote", *SEARCHES}
    for row in rows:
        whole = float(row["sampled_tokens"]) + float(row["forced_tokens"])
        assert 0 <= float(row["pruned_tokens"]) <= whole
        assert float(row["judge_flops_per_problem"]) == 0 < float(row["flops_per_problem"])
        assert (row["setting"] == "") == (row["strategy"].removesuffix("-vote") not in SEARCHES)
    (beam,) = [r for r in rows if r["strategy"] == "beam" and r["samples"] == "4"]
    assert beam["setting"] == "width=2 step=4 judge=confidence" and beam["think_budget"] == "inf"
    kept = [row for row in stored(swept.out) if row[1].startswith("beam lines=4 ")]
    assert float(beam["accuracy"]) == sum(json.loads(r[5])[0][1] for r in kept) / 5
    assert float(beam["pruned_tokens"]) == pytest.approx(sum(r[6] for r in kept) / 5, rel=1e-5)
    assert float(beam["flops_per_problem"]) == pytest.approx(sum(r[7] for r in kept) / 5, rel=1e-5)


@pytest.fixture
def no_report(monkeypatch):
    """Figures take seconds; `results` is what they would have been drawn of."""
    drawn = []
    for module in ("sweep", "redraw"):
        monkeypatch.setattr(
            f"ponder.inference.{module}.write_report",
            lambda folder, results, store, run: drawn.append(results),
        )
    return drawn


def test_slots_and_company_change_no_search(swept, no_report, tmp_path):
    """Another number of slots, other searches beside them, another order: the same bits."""
    alone = replace(
        swept,
        out=tmp_path,
        slots=64,
        searches=replace(swept.searches, search=("rebase", "beam"), lines=(4,)),
    )
    sweep(alone)
    mine = stored(tmp_path)
    names = {row[1] for row in mine}
    assert mine == [row for row in stored(swept.out) if row[1] in names] and len(mine) == 10


def test_redraw_knows_the_searches(swept, no_report):
    redraw(swept.out)
    (results,) = no_report
    assert csv_text(results) == (swept.out / "report" / "results.csv").read_text()


def test_the_page_sets_searches_beside_as_much_sampling(swept):
    page = (swept.out / "report" / "index.html").read_text()
    assert "Search and longer thoughts against independent samples" in page
    assert page.count("<svg") == 2 and "dvts</" in page  # for wide screens and for narrow ones
    with Store(swept.out / "sweep" / "samples.sqlite", identity=None) as store:
        results = evaluate(store, shape=known_shape(swept.model), samples=(1, 4))
        rows = search_rows(Curves.of(results), store)
        assert len(rows) == 2 * 2 * len(SEARCHES)  # sizes, and the vote of the lines
        one, four = (
            next(r for r in results if r.strategy == s and r.samples == k and r.temperature)
            for s, k in (("sampling", 1), ("self-consistency", 4))
        )
        for row in rows:
            r, vote = row["r"], row["rivals"]["self-consistency"]
            first, more = (
                one.flops_per_problem,
                (four.flops_per_problem - one.flops_per_problem) / 3,
            )
            assert row["cost"] == r.flops_per_problem
            paid = first + more * (vote.samples - 1)  # between two numbers of samples too
            assert vote.dearer == (row["cost"] - first < -0.02 * more)
            assert vote.fewer == (row["cost"] > first + more * 3)
            if not vote.dearer and not vote.fewer:
                assert paid == pytest.approx(row["cost"], rel=0.02)
            assert vote.better.mean == pytest.approx(r.accuracy - vote.accuracy)
            if vote.samples == 4:
                assert vote.accuracy == pytest.approx(four.accuracy)
            greedy = next(r for r in results if r.strategy == "greedy")
            cheap = greedy.flops_per_problem <= 1.02 * row["cost"]
            assert ("greedy" in row["rivals"]) == cheap
            best = max(rival.accuracy for rival in row["rivals"].values())
            assert row["rivals"][row["best"]].accuracy == best


def test_a_killed_search_goes_on_and_draws_none_twice(swept, no_report, tmp_path):
    words = (
        f"sweep --model {swept.model} --out {tmp_path} --samples 1 4 --budgets --problems 5 "
        "--slots 8 --max-tokens 14 --precision fp32 --search beam dvts rebase mcts revise "
        "--lines 2 4 --width 2 --step 4"
    ).split()
    code = (
        "import sys, ponder.inference.sweep as s; s.KEEP_EVERY_SECONDS = 0\n"
        "from ponder.tasks.last_digit import LastDigit\n"
        f"LastDigit.answer, LastDigit.verify = {ANSWER}, {VERIFY}\n"
        "from ponder.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline, count = time.monotonic() + 120, 0
    while count < 8:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            count = len(stored(tmp_path))
        except sqlite3.OperationalError:
            time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = stored(tmp_path, "problem, search, seconds")
    assert 8 <= len(before) < 50, "it was to be killed half-way"
    sweep(replace(swept, out=tmp_path, resume=True))
    assert stored(tmp_path) == stored(swept.out)
    assert set(before) <= set(stored(tmp_path, "problem, search, seconds"))  # not drawn again


def test_more_searches_join_a_sweep(swept, no_report, tmp_path):
    """On all problems, old and new, as if they had been asked for at once."""
    options = swept.searches
    first = replace(options, search=("beam", "revise"), lines=(4,))
    sweep(replace(swept, out=tmp_path, problems=3, searches=first))
    before = stored(tmp_path, "problem, search, seconds")
    sweep(replace(swept, out=tmp_path, resume=True, searches=replace(options, lines=(2,))))
    assert stored(tmp_path) == stored(swept.out)
    assert set(before) < set(stored(tmp_path, "problem, search, seconds"))
    sweep(replace(swept, out=tmp_path, resume=True, searches=SearchOptions()))  # none besides
    assert stored(tmp_path) == stored(swept.out)
    with pytest.raises(ValueError, match="holds another sweep run, with searches .*'width': 2"):
        sweep(replace(swept, out=tmp_path, resume=True, searches=replace(options, width=1)))


def test_extended_thoughts_are_rows_of_their_own(swept, no_report, tmp_path):
    config = replace(swept, out=tmp_path, searches=SearchOptions(), extend=(1, 3), cue="=")
    sweep(config)
    with sqlite3.connect(tmp_path / "sweep" / "samples.sqlite") as db:
        kept = db.execute(
            "SELECT params, problem, sample, text, forced_tokens FROM sample"
        ).fetchall()
    texts = {(*row[:3],): row[3] for row in kept}
    extended = 0
    for params, problem, sample, text, forced in kept:
        most = {"extend=1": 1, "extend=3": 3}.get(params.partition(" ")[2], 0)
        assert 0 <= forced <= most
        thought = text.removeprefix("<think>").partition("</think>")[0]
        assert forced <= thought.count("=")
        plain = texts[params.partition(" ")[0], problem, sample]
        if forced:  # the plain sample up to where it would have closed its thought
            extended += 1
            assert text.startswith(plain.partition("</think>")[0] + "=")
        else:
            assert text == plain
    assert extended > 10
    (results,) = no_report
    names = {(r.strategy, r.setting) for r in results}
    for setting in ("", "extend=1", "extend=3"):
        assert names >= {("greedy", setting), ("sampling", setting), ("self-consistency", setting)}
    curves = Curves.of(results)  # drawn are the plain ones
    assert len(curves.greedy) == 1 and all(r.setting == "" for r in curves.votes[4])


def test_steps_of_the_task(swept, no_report, tmp_path):
    """A line is judged where the task's steps end, and nowhere else but at its own end."""
    options = replace(swept.searches, search=("beam", "rebase"), step="task")
    with pytest.raises(ValueError, match="task, and last_digit has no steps of its own") as error:
        sweep(replace(swept, out=tmp_path, searches=options))
    for name in tasks.names()[:4]:  # the built-in ones
        assert (name in str(error.value).partition("own")[2]) == bool(tasks.get(name).step_end)
    assert not (tmp_path / "sweep").exists()
    judged = []

    class Stepped(LastDigit):
        step_end = "3"

    def judge(prompt, completions):
        judged.extend(completions)
        return [1 / (1 + len(tokens)) for tokens in completions]

    config = replace(swept, searches=options)
    speaker = open_speaker(config, slots=8, budgets=True)
    searches = Searches(config, Stepped(), speaker, SamplingParams(max_tokens=14))
    searches.judging = Judging("mine", judge)
    with Store(tmp_path / "samples.sqlite", identity={}) as store:
        keys = searches.wanted(store, range(5))
    assert all(" step=task judge=mine" in key.search for key in keys) and len(keys) == 20
    found = list(searches.run(keys, Stepped().problems("test", 5, 0)))
    assert len(found) == 20
    end = speaker.tokenizer.token_to_id("3")
    cut = [tokens for tokens in judged if tokens[-1] not in speaker.ends and len(tokens) < 14]
    assert len(cut) > 10 and all(tokens[-1] == end for tokens in cut)
    assert any(end in tokens[:-1] for tokens in judged)  # they went on behind it


def test_what_cannot_be_searched_or_extended_is_named(swept, tmp_path):
    wrong = replace(swept, out=tmp_path)
    with pytest.raises(ValueError, match="lines is .2, 3.; for beam and dvts each must be a mult"):
        replace(wrong, searches=replace(swept.searches, lines=(2, 3))).check()
    with pytest.raises(ValueError, match="width is 0; .*step is 0; it must be from 1 to"):
        replace(wrong, searches=SearchOptions(width=0, step=0)).check()
    with pytest.raises(
        ValueError, match="extend is .0.; each must be from 1 to 2147483647; cue is empty"
    ):
        replace(wrong, extend=(0,), cue="").check()
    with pytest.raises(ValueError, match="the cue has 'W', which the tokenizer of"):
        sweep(replace(wrong, extend=(1,), cue="Wait"))
    with pytest.raises(ValueError, match="cue is '=</think>'; it may hold neither </think> nor"):
        sweep(replace(wrong, extend=(1,), cue="=</think>"))
    with pytest.raises(ValueError, match="a server does not let thoughts be drawn out"):
        sweep(replace(wrong, model="http://localhost:1/v1", precision="auto", extend=(1,)))
    config = replace(wrong, searches=replace(swept.searches, search=("beam",)))
    with pytest.raises(ValueError, match="search is beam; searches go on from tokens that pond"):
        Searches(config, tasks.get("last_digit"), object(), SamplingParams())
    assert not (tmp_path / "sweep").exists()


def test_samples_of_one_token_cost_their_prompt_alone(swept, tmp_path):
    """As many of them as there are cost what a search does."""
    searches = replace(swept.searches, search=("beam", "revise"), lines=(2,))
    config = replace(swept, out=tmp_path / "out", max_tokens=1, searches=searches)
    sweep(config)
    told = json.loads((config.out / "report" / "findings.json").read_text())["searches"]
    assert told
    for row in told:
        vote = row["rivals"]["self-consistency"]
        assert vote["samples"] == 4 and (vote["fewer"] or row["cost"] == 0)


def test_the_vote_of_the_lines_is_weighted_by_value():
    def score(*lines):
        of_one = tuple(Line(*answer, value) for answer, value in lines)
        spent = Outcome(*[np.zeros(1)] * 9)
        return Searched("", "", 0, np.zeros(1), (of_one,), spent).vote()[0]

    a, b, none = ("a", True), ("b", False), (None, False)
    assert score((b, 0.9), (a, 0.5), (a, 0.5)) == 1.0
    assert score((b, 0.9), (a, 0.5), (a, 0.3)) == 0.0
    assert score((b, 0.8), (a, 0.5), (a, 0.3)) == 0.5  # a tie
    assert score((none, 0.9), (a, 0.1)) == 1.0
    assert score((none, 0.9)) == 0.0
    wrong_a = ("a", False)  # by a verifier that looks at more than the answer
    for order in ((a, wrong_a, a, a), (a, a, a, wrong_a)):
        assert score(*[(line, 0.5) for line in order], (b, 0.9)) == 0.75

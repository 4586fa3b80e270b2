import csv
import json
import multiprocessing
import re
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from random import Random

import pytest
import torch
import tyro
from tokenizers import Tokenizer, models
from tqdm import tqdm

from ponder import tasks
from ponder.inference import Unfinished
from ponder.inference.config import SearchOptions, SweepConfig, growing, grown
from ponder.inference.local import LocalSpeaker
from ponder.inference.redraw import compare, redraw
from ponder.inference.sweep import _cue, _keep, _terminable, own_budgets, sweep
from ponder.models import hub
from ponder.provenance import alone_in
from ponder.tasks.last_digit import LastDigit


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory) -> SweepConfig:
    """A small sweep, done; tests that change its folder take a copy."""
    config = SweepConfig(
        model=str(model),
        out=tmp_path_factory.mktemp("swept") / "out",
        samples=(1, 3),
        budgets=(0, 2),
        problems=6,
        slots=8,
        precision="fp32",
    )
    assert sweep(config) == config.out / "report" / "index.html"
    return config


@pytest.fixture
def config(swept, tmp_path) -> SweepConfig:
    """The same sweep, not begun."""
    return replace(swept, out=tmp_path / "out")


def samples(out: Path) -> list[tuple]:
    with sqlite3.connect(out / "sweep" / "samples.sqlite") as db:
        return db.execute(
            "SELECT problem, budget, params, seed, sample, text, answer, correct, sampled_tokens, "
            "forced_tokens, think_tokens, logprob FROM sample ORDER BY 3, 1, 2, 5"
        ).fetchall()


@pytest.mark.parametrize(
    ("asker", "message"),
    [
        ("engine", r"drawing \d samples at a time of up to .* needs .* fewer slots"),
        ("local", r"the model .* needs .*\(weights .*\) and there are 0.00; take a smaller one"),
    ],
)
def test_what_cannot_fit_is_refused_before_the_folder_is_there(config, asker, message, monkeypatch):
    monkeypatch.setattr(f"ponder.inference.{asker}.available", lambda device: 1000)
    with pytest.raises(ValueError, match=message):
        sweep(config)
    assert not config.out.exists()


def test_a_sweep_fills_its_grid_and_enforces_its_budgets(swept):
    config, page = swept, swept.out / "report" / "index.html"
    found = samples(config.out)
    assert len(found) == 6 * 3 * (1 + 3)  # problems × budgets (one unlimited) × (greedy + samples)
    for _, budget, _, _, _, text, _, _, sampled, forced, think, _ in found:
        assert text.startswith("<think>")
        if budget is not None:
            assert think <= budget and forced in (0, 1)
            assert "</think>" in text
        else:
            assert forced == 0
        assert sampled + forced <= 64
    zero = [row for row in found if row[1] == 0]
    assert all(row[10] == 0 and row[9] == 1 for row in zero)
    rows = list(csv.DictReader((config.out / "report" / "results.csv").open()))
    assert {row["strategy"] for row in rows} >= {"greedy", "sampling", "self-consistency"}
    assert {row["think_budget"] for row in rows} == {"0", "2", "inf"}
    assert all(row["problems"] == "6" and row["model"] == config.model for row in rows)
    assert page.read_text().count("<html") == 1
    run = json.loads((config.out / "run.json").read_text())["sweep"]
    assert run["configuration"]["problems"] == 6
    assert run["slots"] == [8]


def test_what_is_stored_agrees_with_the_verifier(swept):
    task = tasks.get("last_digit")
    problems = task.problems("test", 6, 0)
    for row in samples(swept.out):
        assert bool(row[7]) == task.verify(problems[row[0]], row[5])
        assert row[6] == task.answer(row[5])


def stored(out: Path) -> int:
    """How many samples there are; none before the first process has made the table."""
    try:
        with closing(sqlite3.connect(out / "sweep" / "samples.sqlite")) as db:
            return db.execute("SELECT count(*) FROM sample").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def rows(out: Path) -> list[dict[str, str]]:
    """results.csv, timings aside."""
    with (out / "report" / "results.csv").open(newline="") as file:
        return [row | {"seconds_per_problem": ""} for row in csv.DictReader(file)]


# Run in a process that knows no test's module by its name. Samples come no faster than one in 5 ms:
# all of them would be there before a busy machine gets round to the kill.
IN_SMALL_BATCHES = """
import time
from importlib import import_module
module = import_module("ponder.inference.sweep")
module.KEEP_EVERY_SECONDS = 0.02
record = module._record
module._record = lambda *given: time.sleep(0.005) or record(*given)
module.sweep(config)
"""


def test_a_sweep_killed_twenty_times_ends_with_the_same_samples(config, tmp_path, no_figures):
    """Killed with SIGKILL at a random moment between two stored batches, or within one."""
    kills = 20
    config = replace(config, problems=24, samples=(2, 8), slots=16)
    sweep(config)
    whole = samples(config.out)
    killed = replace(config, out=tmp_path / "killed", resume=True)
    # Forked from a process that has imported what takes long: 20 starts take the time of one.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ponder.inference.sweep", "ponder.inference.local"])
    random = Random(0)
    deadline = time.monotonic() + 240
    before = 0
    for left in range(kills, 0, -1):
        process = context.Process(target=exec, args=[IN_SMALL_BATCHES, {"config": killed}])
        process.start()
        target = before + random.randint(0, (len(whole) - before) // (left + 1))
        while stored(killed.out) < target:
            assert process.is_alive() and time.monotonic() < deadline, process.exitcode
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        before = stored(killed.out)
    assert 0 < before < len(whole), "it was to be killed half-way"
    with pytest.raises(ValueError, match="say --resume"):
        sweep(replace(killed, resume=False))
    sweep(killed)
    assert samples(killed.out) == whole
    assert rows(killed.out) == rows(config.out)


def test_what_is_finished_is_kept_while_the_next_is_long_in_coming(monkeypatch):
    monkeypatch.setattr("ponder.inference.sweep.KEEP_EVERY_SECONDS", 0.01)
    kept: list[int] = []
    first = threading.Event()

    def records():
        yield from (1, 2)
        assert first.wait(60)
        yield 3

    def add(_, batch: list[int]):
        kept.extend(batch)
        if {1, 2} <= {*kept}:
            first.set()

    _keep(records(), nullcontext, add, tqdm(disable=True))  # type: ignore[arg-type]
    assert kept == [1, 2, 3]


def test_samples_that_cannot_be_kept_end_the_sweep(monkeypatch):
    monkeypatch.setattr("ponder.inference.sweep.KEEP_EVERY_SECONDS", 0)

    def add(*_):
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        _keep(count(), nullcontext, add, tqdm(disable=True))  # type: ignore[arg-type]


def test_a_sweep_ends_at_sigterm_as_at_ctrl_c_and_no_longer():
    before, ran = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(KeyboardInterrupt), _terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere():  # where Python lets no handler be set
        with _terminable():
            ran.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ran == [True]


def test_a_folder_where_a_sweep_is_at_work_is_left_alone(swept, config, no_figures):
    shutil.copytree(swept.out, config.out)
    with alone_in(config.out / "sweep"):
        with pytest.raises(ValueError, match="another process is at work in .*; wait for its end"):
            sweep(replace(config, resume=True))
    sweep(replace(config, resume=True))


def test_samples_that_are_lacking_for_no_known_reason_are_counted(config, monkeypatch):
    monkeypatch.setattr(LocalSpeaker, "generate", lambda *_, **__: iter(()))
    with pytest.raises(Unfinished, match="72 samples did not arrive; what arrived is in"):
        sweep(config)


def test_a_resumed_sweep_keeps_the_precision_that_was_measured(config, monkeypatch, no_figures):
    config = replace(config, precision="auto")
    measured = iter((True, False))
    monkeypatch.setattr("ponder.inference.local.bf16_pays", lambda *_: next(measured))
    sweep(config)
    before = samples(config.out)
    sweep(replace(config, resume=True))
    run = json.loads((config.out / "run.json").read_text())["sweep"]
    assert run["configuration"]["precision"] == "bf16"
    assert samples(config.out) == before
    with pytest.raises(ValueError, match="holds this sweep run already; say --resume"):
        sweep(config)
    sweep(replace(config, out=config.out / "other"))  # the next measurement counts for a new one
    assert samples(config.out / "other") != before
    with pytest.raises(ValueError, match="precision 'bf16' .now 'fp32'."):
        sweep(replace(config, precision="fp32", resume=True))


def test_a_sweep_that_was_killed_before_it_had_a_store_goes_on(swept, config, no_figures):
    shutil.copytree(swept.out, config.out)
    for file in (config.out / "sweep").glob("samples.sqlite*"):
        file.unlink()
    sweep(replace(config, resume=True))
    assert samples(config.out) == samples(swept.out)


def test_another_model_or_task_is_refused_and_nothing_is_lost(swept, config, model, tmp_path):
    shutil.copytree(swept.out, config.out)
    before = samples(config.out)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    gpt = hub.load(other)
    with torch.no_grad():
        gpt.norm.weight += 1
    hub.save(gpt, other, tokenizer=hub.load_tokenizer(other))
    for changed in (
        replace(config, model=str(other), resume=True),
        replace(config, seed=1, resume=True),
        replace(config, temperature=0.5, samples=(9,), resume=True),
        replace(config, max_tokens=9, resume=True),
    ):
        with pytest.raises(ValueError, match="holds another sweep run"):
            sweep(changed)
    with pytest.raises(ValueError, match="permute|tokenizer|does not know"):
        sweep(replace(config, task="permute", out=tmp_path / "permute"))
    assert samples(config.out) == before


def test_redraw_writes_the_same_results(swept, config, no_figures):
    shutil.copytree(swept.out, config.out)
    before = (config.out / "report" / "results.csv").read_text()
    shutil.rmtree(config.out / "report")
    assert redraw(config.out) == config.out / "report" / "index.html"
    assert (config.out / "report" / "results.csv").read_text() == before
    with pytest.raises(ValueError, match="holds no run.json"):
        redraw(config.out / "report")


def test_the_end_of_a_sweep_says_how_accurate_it_was(
    swept, config, no_figures, capsys, monkeypatch
):
    shutil.copytree(swept.out, config.out)
    sweep(replace(config, resume=True))
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "last_digit, 6 problems, unlimited thinking, 95 % intervals:"
    found = {
        (r["strategy"], r["samples"]): r for r in rows(config.out) if r["think_budget"] == "inf"
    }
    keys = [("greedy", "1"), ("sampling", "1"), ("self-consistency", "3")]
    for line, key in zip(lines[:3], keys, strict=True):
        numbers = [float(n) for n in re.findall(r"\d+\.\d", line)]
        told = [100 * float(found[key][name]) for name in ("accuracy", "ci_low", "ci_high")]
        assert numbers == pytest.approx(told, abs=0.06)
    assert [line[:14].strip() for line in lines] == [
        "greedy",
        "one sample",
        "vote of 3",
        "fixed guess",
    ]
    redraw(config.out)
    assert capsys.readouterr().out.splitlines() == [title, *lines]
    with sqlite3.connect(config.out / "sweep" / "samples.sqlite") as db:  # not all arrived
        db.execute("DELETE FROM sample WHERE budget IS NULL AND params LIKE '%1.0' AND problem = 0")
        db.execute("DELETE FROM sample WHERE budget IS NULL AND params LIKE '%0.0' AND problem < 4")
    page = redraw(config.out)
    title, *lines, lacking = capsys.readouterr().out.splitlines()
    said = "nfinished: 65 of 72 samples; what finishes first is short, so costs and accuracies are"
    assert said in lacking and said in page.read_text()
    assert "2 problems" in title and [line.endswith("   5 problems") for line in lines[1:3]] == [
        1,
        1,
    ]
    monkeypatch.setattr("ponder.inference.redraw.write_comparison", lambda out, *_, **__: out)
    compare([swept.out, config.out], config.out)
    assert capsys.readouterr().out == f"{config.out} is {lacking.strip()}\n"


def test_a_report_needs_no_model(config, tmp_path, no_figures):
    """FLOPs stand in it also when the model is gone."""
    gone = tmp_path / "gone"
    shutil.copytree(config.model, gone)
    sweep(replace(config, model=str(gone)))
    before = (config.out / "report" / "results.csv").read_text()
    shutil.rmtree(gone)
    redraw(config.out)
    assert (config.out / "report" / "results.csv").read_text() == before
    assert all(float(row["flops_per_problem"]) > 0 for row in csv.DictReader(before.splitlines()))


def test_a_budget_beyond_the_context_names_what_fits(config):
    with pytest.raises(ValueError, match=r"a budget of 90 does not fit: .* room for \d+"):
        sweep(replace(config, budgets=(90,)))


def test_budgets_with_no_number_leave_unlimited_thinking_alone(config, no_figures):
    words = ["--model", config.model, "--budgets"]
    assert tyro.cli(SweepConfig, args=words).budgets == ()
    sweep(replace(config, budgets=(), samples=(1,), problems=2))
    assert [row[1] for row in samples(config.out)] == [None] * 4


@pytest.mark.parametrize(
    "name, most, budgets",
    [
        ("last_digit", 60, (0, 2, 4, 7, 9)),  # of 11 steps
        ("last_digit", 10, (0, 2, 3, 5, 6)),  # of 8, the longest with </think> and an answer
        ("permute", 62, (0, 12, 24, 36, 48)),  # a word and its semicolon are one step
        ("permute:length=2-3", 60, (0, 6, 12)),  # 3 steps
    ],
)
def test_budgets_fit_the_task_unless_they_are_given(name, most, budgets):
    task = tasks.get(name)
    assert own_budgets(task, task.problems("test", 200, 0), len, most) == budgets


def test_a_task_without_chains_of_thought_wants_budgets_named():
    task = tasks.get("last_digit")
    with pytest.raises(ValueError, match="no worked chain of thought of at most 1 tokens"):
        own_budgets(task, task.problems("test", 20, 0), len, most=3)


def test_a_thought_is_taken_up_again_with_the_cue_that_is_given_or_the_task_s():
    config, task = SweepConfig("m"), LastDigit()
    assert _cue(config, task) is None
    revising = replace(config, searches=SearchOptions(("beam", "revise")))
    for asked in (revising, replace(config, extend=(1,))):
        assert (_cue(asked, task), _cue(replace(asked, cue="So"), task)) == ("=", "So")


def test_a_sweep_goes_on_with_the_budgets_it_began_with(swept, config, no_figures):
    shutil.copytree(swept.out, config.out)
    sweep(replace(config, budgets=None, resume=True))
    assert samples(config.out) == samples(swept.out)
    fresh = replace(config, budgets=None, problems=3, samples=(1,), out=config.out / "fresh")
    sweep(fresh)
    chosen = json.loads((fresh.out / "run.json").read_text())["sweep"]["configuration"]["budgets"]
    assert len(chosen) == 5 and {row[1] for row in samples(fresh.out)} == {None, *chosen}


def kept(out: Path) -> dict:
    """What run.json says of the sweep."""
    return json.loads((out / "run.json").read_text())["sweep"]


def test_a_sweep_grows_into_the_larger_one(config, no_figures, capsys):
    """More problems, samples, budgets and extensions draw what is lacking, and nothing anew."""
    small = replace(config, problems=9, samples=(1,), budgets=(2,))
    sweep(small)
    before = samples(small.out)
    whole = replace(config, problems=12, samples=(1, 3), budgets=(0, 2), extend=(1,), cue="=")
    page = sweep(replace(whole, resume=True))
    assert "nfinished" not in page.read_text() and "nfinished" not in capsys.readouterr().out
    at_once = replace(whole, out=config.out / "at_once", budgets=(2, 0))
    sweep(at_once)
    assert set(before) < set(samples(whole.out)) and samples(whole.out) == samples(at_once.out)
    # What is drawn out is not cut, too.
    assert {row[1] for row in samples(whole.out) if "extend=1" in row[2]} == {None}
    assert rows(whole.out) == rows(at_once.out)
    assert {row["problems"] for row in rows(whole.out)} == {"12"}
    configuration = kept(whole.out)["configuration"]
    assert configuration == kept(at_once.out)["configuration"] | {"budgets": [0, 2]}
    assert len(kept(whole.out)["earlier_commands"]) == 1
    sweep(replace(config, samples=None, budgets=None, problems=None, resume=True))  # as it is
    assert samples(whole.out) == samples(at_once.out)
    assert kept(whole.out)["configuration"] == configuration
    assert len(kept(whole.out)["earlier_commands"]) == 1


def test_a_sweep_that_is_asked_for_less_keeps_all_and_says_so(swept, config, no_figures, capsys):
    shutil.copytree(swept.out, config.out)
    fewer = dict(samples=(1,), budgets=(2,), problems=4)
    sweep(replace(config, **fewer, resume=True))
    assert samples(config.out) == samples(swept.out) and rows(config.out) == rows(swept.out)
    assert kept(config.out)["configuration"] == kept(swept.out)["configuration"]
    said = "has samples 1 3, budgets 0 2, problems 6: what was asked before counts"
    assert said in capsys.readouterr().err


def test_a_growth_that_has_not_begun_can_be_taken_back(config, no_figures, monkeypatch):
    small = replace(config, problems=7, samples=(1,), budgets=())
    sweep(small)
    before, drawn = kept(config.out)["configuration"], samples(config.out)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ponder.inference.sweep._draw", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep(replace(small, samples=(4000,), problems=8, resume=True))
    asked = kept(config.out)["configuration"]
    assert asked["samples"] == [1, 4000] and asked["problems"] == 8
    sweep(replace(small, resume=True))
    assert kept(config.out)["configuration"] == before and samples(config.out) == drawn


def test_problems_that_are_not_what_they_were_leave_the_folder_as_it_was(config, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\n\n"
        "from ponder.tasks.last_digit import LastDigit\n\n\n"
        "class Mine(LastDigit):\n    name = 'mine'\n\n"
        "    def problems(self, split, count, seed):\n"
        f"        return super().problems(split, count, int(Path({str(tmp_path / 'seed')!r})"
        ".read_text()))\n"
    )
    mine = replace(config, task=f"{file}:Mine", samples=(1,), budgets=())
    (tmp_path / "seed").write_text("1")
    sweep(mine)
    before = kept(config.out)["configuration"]
    (tmp_path / "seed").write_text("2")
    with pytest.raises(ValueError, match="problem 0 is .* in the store and .* in this run"):
        sweep(replace(mine, problems=9, resume=True))
    assert kept(config.out)["configuration"] == before
    (tmp_path / "seed").write_text("1")
    sweep(replace(mine, resume=True))


def test_problems_of_one_prompt_are_told(config, monkeypatch, no_figures, capsys):
    own = LastDigit.problems
    monkeypatch.setattr(LastDigit, "problems", lambda *given: own(*given)[:2] * 3)
    sweep(replace(config, samples=(1,), budgets=()))
    assert "4 of the 6 problems have the prompt of another" in capsys.readouterr().err


def test_longer_prompts_that_come_later_do_not_shorten_samples(config, no_figures):
    first = replace(config, problems=7, samples=(1,))  # of at most 22 characters, and <think>
    sweep(first)
    assert kept(config.out)["most_new_tokens"] == 64 - 23
    sweep(replace(first, problems=8, resume=True))
    before = samples(config.out)
    with pytest.raises(
        ValueError, match="max_tokens is 41; after 25 .*were drawn with that max_tokens: give this"
    ):
        sweep(replace(first, problems=9, resume=True))
    assert samples(config.out) == before and kept(config.out)["configuration"]["problems"] == 8


BEAM = SearchOptions(("beam",), (4,), 2)
REVISE = SearchOptions(("revise",), (4,))


@pytest.mark.parametrize(
    "before, now, grows, whole",
    [
        (dict(cue="a"), dict(cue="b"), "budgets cue searches", dict(cue="b")),  # it was never used
        (dict(cue="a", extend=(1,)), dict(), "budgets searches", dict(cue="a")),
        (dict(extend=(1,)), dict(extend=(2,)), "budgets searches", dict(extend=(1, 2))),
        (dict(budgets=()), dict(budgets=(2,)), "cue searches", dict(budgets=(2,))),
        (
            dict(searches=BEAM),
            dict(searches=SearchOptions(("mcts",), (2, 4), 2)),
            "budgets cue searches",
            dict(searches=SearchOptions(("beam", "mcts"), (2, 4), 2)),
        ),
        (dict(searches=BEAM), dict(), "budgets cue searches", dict(searches=BEAM)),
        (
            dict(searches=BEAM),
            dict(searches=replace(BEAM, width=4)),
            "budgets cue",
            dict(searches=replace(BEAM, width=4)),
        ),
        (
            dict(searches=REVISE),
            dict(searches=SearchOptions(("beam",), (8,))),
            "budgets searches",
            dict(searches=SearchOptions(("revise", "beam"), (4, 8))),
        ),
    ],
)
def test_what_a_sweep_may_grow_by(before, now, grows, whole):
    config = SweepConfig("m", budgets=(0,), problems=5)
    told = json.loads(json.dumps(asdict(replace(config, **before)), default=str))
    assert growing(replace(config, **now), told) == {"samples", "problems", "extend"} | {
        *grows.split()
    }
    found = grown(replace(config, **now), told)
    assert all(getattr(found, name) == value for name, value in whole.items())


def test_a_task_of_one_s_own_is_swept(config, tmp_path, monkeypatch, no_figures):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ponder.tasks.last_digit import LastDigit\n\n\n"
        "class Mine(LastDigit):\n    name = 'mine'\n"
    )
    monkeypatch.chdir(tmp_path)
    mine = replace(config, task="mine.py:Mine:operands=3-4")
    sweep(mine)
    with sqlite3.connect(config.out / "sweep" / "samples.sqlite") as db:
        asked = [prompt for (prompt,) in db.execute("SELECT prompt FROM problem ORDER BY id")]
    assert asked == [p.prompt for p in tasks.get(mine.task).problems("test", 6, 0)]
    assert all(len(prompt) <= 8 for prompt in asked)
    assert {row["task"] for row in rows(config.out)} == {mine.task}
    sweep(replace(mine, problems=8, resume=True))
    assert {row["problems"] for row in rows(config.out)} == {"8"}


OWN = """
from ponder.tasks.last_digit import LastDigit


class Mine(LastDigit):
    name, cue = "mine", {cue!r}

    def answer(self, text):
        return {answer}

    def verify(self, problem, text):
        {verify}
"""
RIGHT = "return self.answer(text) == problem.answer"


def own_task(file: Path, *, answer="super().answer(text)", verify=RIGHT, cue="?") -> str:
    """The name of a task whose file now says that."""
    file.write_text(OWN.format(answer=answer, verify=verify, cue=cue))
    return f"{file}:Mine"


def test_a_verifier_that_raised_is_mended_and_what_was_drawn_is_judged_again(
    config, tmp_path, no_figures, capsys
):
    file, often = tmp_path / "mine.py", "if next(self.often) > 30: raise KeyError('gone')"
    raising = f"{often}\n        return True\n\n    often = __import__('itertools').count()"
    mine = replace(config, task=own_task(file, answer="'3'", verify=raising))
    with pytest.raises(ValueError, match="mine: its verifier failed on .*KeyError: 'gone'"):
        sweep(mine)
    before, told = samples(config.out), (config.out / "run.json").read_text()
    assert 0 < len(before) <= 31 and {row[6:8] for row in before} == {("3", 1)}
    own_task(file)
    with pytest.raises(ValueError, match="holds this sweep run already; say --resume"):
        sweep(mine)
    own_task(file, verify="raise KeyError('still')")  # mended wrongly
    with pytest.raises(ValueError, match="KeyError: 'still'"):
        sweep(replace(mine, resume=True))
    assert samples(config.out) == before and (config.out / "run.json").read_text() == told
    own_task(file)
    capsys.readouterr()
    sweep(replace(mine, resume=True))
    said = f"has changed: the {len(before)} samples of {config.out} were judged again"
    assert said in capsys.readouterr().err
    after = samples(config.out)
    assert {row[:6] for row in before} < {row[:6] for row in after} and len(after) == 72
    fresh = replace(mine, out=tmp_path / "fresh")
    sweep(fresh)
    assert after == samples(fresh.out) and rows(config.out) == rows(fresh.out)
    assert kept(config.out)["configuration"] == kept(fresh.out)["configuration"]
    sweep(replace(mine, resume=True))
    assert "judged again" not in capsys.readouterr().err


def test_what_killed_processes_left_is_judged_again(config, tmp_path, no_figures, monkeypatch):
    file = tmp_path / "mine.py"
    mine = replace(config, task=own_task(file, answer="'3'"), samples=(1,), budgets=())
    sweep(mine)
    store = config.out / "sweep" / "samples.sqlite"
    shutil.copy(store, store.with_name("samples-1.sqlite"))
    with closing(sqlite3.connect(store)) as db, db:
        db.execute("DELETE FROM sample WHERE problem > 2")
    own_task(file, answer="'4'")
    with pytest.raises(ValueError, match="samples of 6 problems, .* judge again: say --problems 6"):
        sweep(replace(mine, problems=4, resume=True))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ponder.inference.sweep._judge_again", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(replace(mine, resume=True))
    sweep(replace(mine, resume=True))
    assert {row[6] for row in samples(config.out)} == {"4"} and len(samples(config.out)) == 12


def test_what_a_verifier_reads_is_part_of_its_task_where_the_task_says_so(
    config, tmp_path, no_figures
):
    file, read = tmp_path / "mine.py", tmp_path / "read"
    mine = replace(config, task=own_task(file, answer="self.content"), samples=(1,), budgets=())
    says = f"return open({str(read)!r}).read()\n"
    file.write_text(f"{file.read_text()}\n    @property\n    def content(self):\n        {says}")
    for text in "34":
        read.write_text(text)
        sweep(replace(mine, resume=True))
        assert {row[6] for row in samples(config.out)} == {text}


def test_a_changed_task_of_other_problems_or_another_cue_is_refused(config, tmp_path, no_figures):
    file = tmp_path / "mine.py"
    mine = replace(config, task=own_task(file, cue="+"), samples=(1,), budgets=(), extend=(1,))
    sweep(mine)
    before = samples(config.out)
    own_task(file, cue="-")
    with pytest.raises(ValueError, match=r"another sweep run, with task_cue '\+' .now '-'."):
        sweep(replace(mine, resume=True))
    own_task(file, cue="+")
    others = "def problems(self, *of):\n        return super().problems(*of)[::-1]\n"
    file.write_text(f"{file.read_text()}\n    {others}")
    with pytest.raises(ValueError, match="problem 0 .*: give this run another folder"):
        sweep(replace(mine, resume=True))
    assert samples(config.out) == before


def test_searches_of_a_task_that_changed_are_drawn_again(config, tmp_path, no_figures, capsys):
    file = tmp_path / "mine.py"
    beam = replace(SearchOptions(("beam",), (2,), 2), step=4)
    mine = replace(config, task=own_task(file, answer="'3'"), samples=(1,), budgets=())
    mine = replace(mine, searches=beam)
    sweep(mine)

    def searches(out):
        with closing(sqlite3.connect(out / "sweep" / "samples.sqlite")) as db:
            return db.execute("SELECT problem, search, text, lines FROM search").fetchall()

    before = searches(config.out)
    own_task(file)
    with closing(sqlite3.connect(config.out / "sweep" / "samples.sqlite")) as db, db:
        db.execute("UPDATE search SET search = replace(search, 'confidence', 'abc')")
    with pytest.raises(ValueError, match="searches of another judge, such as 'beam .* --verifier"):
        sweep(replace(mine, resume=True))
    assert len(searches(config.out)) == 6
    with closing(sqlite3.connect(config.out / "sweep" / "samples.sqlite")) as db, db:
        db.execute("UPDATE search SET search = replace(search, 'abc', 'confidence')")
    sweep(replace(mine, resume=True))
    assert "judged again, and 6 searches will be drawn again" in capsys.readouterr().err
    fresh = replace(mine, out=tmp_path / "fresh")
    sweep(fresh)
    assert searches(config.out) == searches(fresh.out) != before


def test_searches_that_do_not_go_together_are_named():
    searches = SearchOptions(("rebase",), (3,), 2)
    told = asdict(SweepConfig("m", searches=searches))
    with pytest.raises(ValueError, match="lines is .3, 4.; for beam and dvts each must be a mult"):
        grown(SweepConfig("m", searches=replace(searches, search=("beam",), lines=(4,))), told)


def test_a_task_that_has_fewer_problems_is_asked_all_of_them(config, no_figures):
    few = replace(config, task="last_digit:operands=2-2", problems=None, samples=(1,), budgets=())
    sweep(few)
    count = json.loads((few.out / "run.json").read_text())["sweep"]["configuration"]["problems"]
    assert 5 < count < 100 and len(samples(few.out)) == 2 * count
    with pytest.raises(ValueError, match=f"test holds {count} distinct problems"):
        sweep(replace(few, problems=500, out=few.out / "more"))


def test_a_model_without_think_tokens_is_named(model, config, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(model, folder)
    plain = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    plain.save(str(folder / "tokenizer.json"))
    with pytest.raises(
        ValueError, match="has no tokens <think> and </think>, which budgets and longer"
    ):
        sweep(replace(config, model=str(folder)))

"""A verifier whose value after each token is known: the token's own number."""

import csv
import json
import shutil
import sqlite3
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ponder import tasks
from ponder.inference import scores
from ponder.inference.config import SweepConfig
from ponder.inference.evaluation import evaluate
from ponder.inference.local import LocalSpeaker
from ponder.inference.redraw import redraw
from ponder.inference.scores import Scores, score, scores_of
from ponder.inference.strategies import STRATEGIES, spend
from ponder.inference.sweep import sweep
from ponder.inference.verifier import Scorer, open_verifier
from ponder.models import GPTConfig, hub
from ponder.models.flops import verifier_flops
from ponder.models.verifier import Reading, save_verifier
from ponder.training.tokenizer import character_tokenizer

from ..models.test_flops import SMALL, counted, masked_away
from ..models.test_verifier import random_verifier
from .test_strategies import HOT, by_name, make_store

WORDS = character_tokenizer("0123456789;=ab")
SHAPE = replace(SMALL, vocab_size=WORDS.get_vocab_size(), context=64)
DIGITS = {WORDS.token_to_id(str(d)): d / 10 for d in range(1, 10)}
EOS, SEMICOLON = WORDS.token_to_id("<eos>"), WORDS.token_to_id(";")


class Known:
    """After a digit d the value is d / 10; after any other token it is that of the digit before."""

    def __init__(self, reading):
        self.reading, self.config, self.shapes = reading, SHAPE, []
        self.score = SimpleNamespace(weight=torch.zeros(1))

    def eval(self):
        return self

    def __call__(self, tokens):
        self.shapes.append(tuple(tokens.shape))
        values = torch.zeros(tokens.shape)
        for row, ids in enumerate(tokens.tolist()):
            value = 0.5
            for place, token in enumerate(ids):
                values[row, place] = value = DIGITS.get(token, value)
        return torch.logit(values)


def known(labels="process", step_end=";", end=True, name="v"):
    return Scorer(Known(Reading(labels, step_end, end)), WORDS, eos=EOS, hash=name)


TEXT = "<think>3;9;2;7</think>4;6"  # steps end after 3, 9 and 2


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (("outcome", ";", True), (0.6, None, None)),
        (("value", ";", True), (0.6, 0.2, 0.2)),
        (("process", ";", True), (0.6, 0.2, 0.2)),
        (("process", ";", False), (None, 0.2, 0.2)),
        (("value", "", True), (0.6, None, None)),  # steps that nobody knows
    ],
)
def test_scores_are_read_where_they_mean_something(reading, expected):
    [found] = known(*reading).score([("8=", TEXT, True)])
    assert [None if x is None else round(x, 6) for x in found[:3]] == list(expected)
    length = 2 + 1 + 7 + 1 + 3 + 1
    assert found.flops == verifier_flops(SHAPE, length) and found.seconds > 0


def test_the_worst_step_and_solutions_without_one():
    worst, none = known().score([("8=", "<think>1;9;</think>5", True), ("8=", "<think>4", False)])
    assert (round(worst.last, 6), round(worst.least, 6), round(worst.end, 6)) == (0.9, 0.1, 0.5)
    assert round(none.last, 6) == round(none.least, 6) == 0.4
    with pytest.raises(ValueError, match="have 74 tokens; the verifier has a context of 64"):
        known().score([("8=", "<think>" + "1" * 70 + ";", False)])


def test_a_judge_values_what_is_there_so_far():
    prompt = tuple(WORDS.encode("8=").ids) + (WORDS.token_to_id("<think>"),)

    def judged(text, *, ended=False, **reading):
        judge = known(**reading).judge(WORDS)
        line = tuple(WORDS.encode(text, add_special_tokens=False).ids) + (EOS,) * ended
        [value] = judge(prompt, [line])
        return round(value, 6)

    assert judged("3;9;2;7") == 0.2
    assert judged("3") == 0.3  # no step is finished yet
    assert judged("3;2;</think>6", ended=True) == 0.6
    assert judged("3;2;</think>6", ended=True, end=False) == 0.2
    assert judged("3;9;2;7", labels="value") == judged("3;9;2;7", labels="outcome") == 0.7
    with pytest.raises(ValueError, match="the verifier's tokenizer is not the model's"):
        known().judge(character_tokenizer("0123"))


def test_values_are_the_models_and_know_no_companions():
    verifier = random_verifier(SHAPE)
    scorer = Scorer(verifier, WORDS, eos=EOS, hash="v")
    draw = np.random.default_rng(0)
    rows = [tuple(draw.integers(4, 16, n).tolist()) for n in (3, 40, 31, 64, 5, 33, *[20] * 12)]
    found = scorer.values(rows)
    for row, values in zip(rows, found, strict=True):
        with torch.no_grad():
            truth = verifier(torch.tensor([row]))[0].sigmoid()
        torch.testing.assert_close(torch.tensor(values), truth, rtol=1e-5, atol=1e-6)
    assert scorer.values(rows[::-1]) == found[::-1]
    assert scorer.values(rows[3:4]) == found[3:4]
    assert scorer.values([]) == []


def test_its_operations_are_those_of_the_flop_counter():
    config = GPTConfig(vocab_size=31, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=96)
    verifier = random_verifier(config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = counted(lambda: verifier(torch.zeros((1, 40), dtype=torch.int64)))
    assert verifier_flops(config, 40) == pytest.approx(found - masked_away(config, 40), rel=0.01)


def test_samples_are_scored_once_and_a_killed_scoring_goes_on(tmp_path, monkeypatch):
    texts = [f"{a}{b}" for a in range(1, 4) for b in range(1, 5)]
    store = make_store(tmp_path / "s", [texts[:6], texts[6:]], greedy="12")
    monkeypatch.setattr(scores, "BATCH", 5)
    scorer, asked = known(end=True), []
    plain = scorer.score

    def dies(solutions):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(solutions))
        return plain(solutions)

    monkeypatch.setattr(scorer, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        score(store, scorer)
    pool = store.pool(budget=8, params=HOT, seed=0)
    assert scores_of(store, pool, "v") is None  # not all of them yet
    monkeypatch.setattr(scorer, "score", lambda s: (asked.append(len(s)), plain(s))[1])
    assert score(store, scorer) == 14 - 5
    assert score(store, scorer) == 0 and asked == [5, 5, 4]
    found = scores_of(store, pool, "v")
    assert found.end.shape == (2, 6)
    # A text of two digits has the value of the second.
    truth = [[int(text[-1]) / 10 for text in row] for row in (texts[:6], texts[6:])]
    np.testing.assert_allclose(found.end, truth, atol=1e-6)
    assert scores_of(store, pool, "other") is None
    other = known("outcome", name="other")
    assert score(store, other) == 14
    assert np.isnan(scores_of(store, pool, "other").last).all()
    assert scores.latest(store) == "other"


def test_a_verifier_chooses_and_weighs(tmp_path):
    """Samples "1" to "4"; "4", the best by the value at the end, is wrong by the store."""
    store = make_store(tmp_path / "s", ["aabb"], greedy="a")
    pool = store.pool(budget=8, params=HOT, seed=0)
    flops = np.array([[10.0, 20, 30, 40]])
    given = Scores(
        verifier="v",
        end=np.array([[0.9, 0.1, 0.2, 0.3]]),
        last=np.array([[0.1, 0.2, 0.9, 0.3]]),
        least=np.full((1, 4), np.nan),
        flops=flops,
        seconds=np.ones((1, 4)),
    )
    judged = replace(pool, scores=given)

    def run(name, k):
        return STRATEGIES[name].run(judged, k)

    # Of six pairs, three hold the best sample, a; of the others (.1 .2 .3) b wins.
    assert run("verifier-best-of-n", 2).scores.tolist() == [0.5]
    assert run("verifier-best-of-n", 4).scores.tolist() == [1]
    assert run("last-step-best-of-n", 4).scores.tolist() == [0]
    assert run("verifier-vote", 4).scores.tolist() == [1]  # 1.0 against 0.5
    assert run("last-step-vote", 4).scores.tolist() == [0]  # 0.3 against 1.2
    assert run("verifier-vote", 3).scores.tolist() == [0.75]  # b wins only without the .9
    assert STRATEGIES["worst-step-best-of-n"].sizes(judged, [4]) == []
    assert STRATEGIES["verifier-vote"].sizes(judged, [1, 4, 9]) == [4]
    assert STRATEGIES["verifier-vote"].sizes(pool, [4]) == []
    # A vote's weights are the values themselves, and a value of 0 is one.
    doubted = replace(pool, scores=replace(given, end=np.array([[0.9, 0.0, 0.5, 0.45]])))
    assert STRATEGIES["verifier-vote"].sizes(doubted, [4]) == [4]
    assert STRATEGIES["verifier-vote"].run(doubted, 4).scores.tolist() == [0]  # 0.9 against 0.95

    chosen, plain = (spend(judged, run(name, 2), SMALL) for name in ("verifier-vote", "best-of-n"))
    assert chosen.judge_flops.tolist() == [50.0] and plain.judge_flops.tolist() == [0]  # 2 of 25
    assert (chosen.flops - plain.flops).tolist() == pytest.approx([50.0])
    assert (chosen.seconds - plain.seconds).tolist() == pytest.approx([2.0])

    score(store, known())
    rows = by_name(evaluate(store, samples=[2], shape=SMALL))
    assert ("worst-step-best-of-n", 2) in rows and ("verifier-best-of-n", 2) in rows
    length = len(WORDS.encode("0a").ids) + 1
    row = rows["verifier-vote", 2]
    assert row.judge_flops_per_problem == 2 * verifier_flops(SHAPE, length)
    assert rows["self-consistency", 2].judge_flops_per_problem == 0


@pytest.fixture
def config(model, tmp_path) -> SweepConfig:
    """A sweep, and a verifier that knows the model's words."""
    tokenizer = hub.load_tokenizer(model)
    shape = replace(hub.load_config(model), n_layer=1)
    save_verifier(random_verifier(shape), tmp_path / "verifier", tokenizer=tokenizer)
    return SweepConfig(
        model=str(model),
        out=tmp_path / "out",
        samples=(1, 3),
        budgets=(2,),
        problems=5,
        slots=8,
        precision="fp32",
    )


def test_a_sweep_is_scored_when_it_is_done_or_later(config, tmp_path, no_figures, monkeypatch):
    sweep(config)
    monkeypatch.undo()
    results = config.out / "report" / "results.csv"
    assert "verifier-vote" not in results.read_text()
    page = sweep(replace(config, verifier=str(tmp_path / "verifier"), resume=True))
    rows = {(r["strategy"], r["think_budget"]): r for r in csv.DictReader(results.open())}
    assert {"verifier-vote", "verifier-best-of-n"} <= {strategy for strategy, _ in rows}
    judged = rows["verifier-best-of-n", "inf"]
    assert 0 < float(judged["judge_flops_per_problem"]) < float(judged["flops_per_problem"])
    assert rows["greedy", "inf"]["judge_flops_per_problem"] == "0"
    assert "<small>verifier " in page.read_text()
    with sqlite3.connect(config.out / "sweep" / "samples.sqlite") as db:
        stored = db.execute(
            "SELECT prompt, text, finish, end FROM score JOIN sample USING"
            " (problem, params, seed, sample) JOIN problem ON problem.id = problem"
            " WHERE score.budget IS sample.budget"
        ).fetchall()
    assert len(stored) == 5 * 2 * (1 + 3)
    scorer = open_verifier(tmp_path / "verifier", on="cpu")
    again = scorer.score([(prompt, text, end == "stop") for prompt, text, end, _ in stored])
    assert [s.end for s in again] == [value for *_, value in stored]
    before = results.read_text()
    shutil.rmtree(config.out / "report")
    redraw(config.out)
    assert results.read_text() == before


def test_a_verifier_that_cannot_read_the_samples_is_told(config, model, tmp_path, no_figures):
    with pytest.raises(ValueError, match="holds no verifier, but Qwen3ForCausalLM"):
        sweep(replace(config, verifier=str(model)))
    assert not config.out.exists()  # told before anything is sampled
    other = tmp_path / "other"
    words = character_tokenizer("01")
    shape = replace(SHAPE, vocab_size=words.get_vocab_size())
    save_verifier(random_verifier(shape), other, tokenizer=words)
    with pytest.raises(ValueError, match="the verifier's tokenizer does not know '.', which is in"):
        sweep(replace(config, verifier=str(other)))
    assert not config.out.exists()


def test_a_verifier_tells_before_what_it_could_not_read():
    """<think> stands behind a prompt, as it does in what is scored."""
    scorer = known()
    read = len(WORDS.encode("12=").ids) + 1
    scorer.check(["1=", "12="], SHAPE.context - read)
    message = f"up to {read} tokens and .* up to {65 - read}; the verifier has a context of 64: "
    with pytest.raises(ValueError, match=message):
        scorer.check(["1=", "12="], SHAPE.context - read + 1)
    with pytest.raises(ValueError, match=r"tokenizer does not know '\+', which is in '1\+'"):
        scorer.check(["1+"], 1)


def test_a_verifier_with_the_model_s_context_reads_whatever_the_model_writes(config, tmp_path):
    prompts = [p.prompt for p in tasks.get(config.task).problems("test", 5, 0)]
    speaker = LocalSpeaker(config.model, slots=8, precision="fp32", budgets=True)
    most = speaker.fit(prompts, budgets=[None], max_tokens=None)
    scorer = open_verifier(tmp_path / "verifier", on="cpu")
    scorer.check(prompts, most)
    [longest] = scorer.score([(max(prompts, key=len), "<think>" + "1" * most, False)])
    assert 0 < longest.end < 1
    assert longest.flops == verifier_flops(scorer.shape, scorer.shape.context)
    with pytest.raises(ValueError, match="the verifier has a context of 64"):
        scorer.check(prompts, most + 1)


def test_training_problems_are_sampled_where_that_is_asked_for(config, no_figures):
    sweep(replace(config, split="train"))
    with sqlite3.connect(config.out / "sweep" / "samples.sqlite") as db:
        identity = dict(db.execute("SELECT name, value FROM identity"))
        prompts = [prompt for (prompt,) in db.execute("SELECT prompt FROM problem ORDER BY id")]
    problems = tasks.get("last_digit").problems("train", 5, 0)
    assert prompts == [p.prompt for p in problems] and identity["split"] == '"train"'
    run = json.loads((config.out / "run.json").read_text())["sweep"]["configuration"]
    assert run["split"] == "train"
    with pytest.raises(ValueError, match="holds another sweep run"):
        sweep(replace(config, resume=True))

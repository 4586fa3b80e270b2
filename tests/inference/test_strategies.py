from dataclasses import dataclass
from math import comb, isnan

import numpy as np
import pytest

from ponder.inference import cost
from ponder.inference.store import Key, Record, Store
from ponder.inference.strategies import (
    STRATEGIES,
    Outcome,
    evaluate,
    paired_difference,
    spend,
)

from .test_cost import SMALL

COLD, HOT = "temperature=0.0", "temperature=1.0"


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    difficulty: int


def make_store(path, answers, *, greedy, budget=8, seed=0):
    """answers: per problem, the stored samples' answers ("-" for none); the right one is "a"."""
    store = Store(path, identity={"model": "m", "task": "t"})
    store.add_problems([Problem(str(i), "a", i) for i in range(len(answers))])

    def record(problem, params, sample, answer):
        return Record(
            key=Key(problem, budget, params, seed, sample),
            text=answer,
            answer=None if answer == "-" else answer,
            correct=answer == "a",
            prompt_tokens=10 + problem,
            sampled_tokens=4 + sample,
            forced_tokens=1,
            think_tokens=3,
            logprob=-1.0,
            finish="stop",
            seconds=0.5,
        )

    store.add(record(p, COLD, 0, g) for p, g in enumerate(greedy))
    store.add(record(p, HOT, s, a) for p, row in enumerate(answers) for s, a in enumerate(row))
    return store


def by_name(results):
    return {(r.strategy, r.samples): r for r in results}


def test_scores_and_costs_of_every_strategy(tmp_path):
    store = make_store(tmp_path / "s", ["aabb", "bbbb", "-ba-"], greedy="aba")
    shape = SMALL
    rows = by_name(evaluate(store, shape=shape, samples=[1, 2, 4, 16], model="tiny"))
    assert set(rows) == {
        ("greedy", 1),
        ("sampling", 1),
        *(("self-consistency", k) for k in (2, 4)),
        *(("pass@k", k) for k in (2, 4)),
    }
    assert rows["greedy", 1].scores.tolist() == [1, 0, 1]
    assert rows["sampling", 1].scores.tolist() == [0.5, 0, 0.25]
    # "aabb": ties go to the first, "a". "-ba-": a tie of b and a, b was first.
    assert rows["self-consistency", 4].scores.tolist() == [1, 0, 0]
    # Pairs of "aabb": all but (b, b) have "a" first. Pairs of "-ba-": (-, a), (a, -).
    np.testing.assert_allclose(rows["self-consistency", 2].scores, [5 / 6, 0, 2 / 6])
    np.testing.assert_allclose(rows["pass@k", 2].scores, [5 / 6, 0, 1 - comb(3, 2) / comb(4, 2)])
    assert rows["pass@k", 4].accuracy == pytest.approx(2 / 3)

    vote = rows["self-consistency", 2]
    mean_new = [4, 5, 6, 7]
    assert vote.prompt_tokens == 11  # once, not once per sample
    assert vote.sampled_tokens == 2 * np.mean(mean_new) and vote.forced_tokens == 2
    assert vote.seconds_per_problem == 1.0
    expected = np.mean(
        [
            cost.prefill_flops(shape, p)
            + 2 * np.mean([cost.decode_flops(shape, p, n) for n in mean_new])  # n + 1 - 1 fed
            for p in (10, 11, 12)
        ]
    )
    assert vote.flops_per_problem == pytest.approx(expected)
    assert (vote.task, vote.model, vote.think_budget, vote.temperature) == ("t", "tiny", 8, 1.0)
    assert vote.ci_low <= vote.accuracy <= vote.ci_high and vote.problems == 3
    assert vote.guess_accuracy == 1.0


def test_pareto_marks_what_competes(tmp_path):
    store = make_store(tmp_path / "s", ["aaab", "abaa", "bbab"], greedy="aab")
    rows = by_name(evaluate(store, samples=[1, 2, 4]))
    assert all(isnan(r.flops_per_problem) for r in rows.values())  # tokens decide then
    assert rows["greedy", 1].pareto
    assert not rows["self-consistency", 4].pareto  # as right as greedy, for four times as much
    assert rows["pass@k", 4].accuracy > rows["greedy", 1].accuracy
    assert not rows["pass@k", 4].pareto  # an oracle does not compete


def test_a_new_strategy_is_a_class_and_an_entry(tmp_path, monkeypatch):
    class Longest:
        """Of k samples, the one with the longest text."""

        name = "longest"
        oracle = False

        def sizes(self, pool, samples):
            return [k for k in samples if k <= pool.samples and pool.temperature > 0]

        def run(self, pool, k, shape) -> Outcome:
            choice = pool.sampled_tokens[:, :k].argmax(1)[:, None]
            return spend(pool, np.take_along_axis(pool.correct, choice, 1)[:, 0] * 1.0, k, shape)

    monkeypatch.setitem(STRATEGIES, "longest", Longest())
    store = make_store(tmp_path / "s", ["ba", "ab"], greedy="aa")
    rows = by_name(evaluate(store, samples=[2], strategies=["longest"]))
    assert list(rows) == [("longest", 2)]
    assert rows["longest", 2].scores.tolist() == [1, 0]


def test_incomplete_stores(tmp_path):
    store = make_store(tmp_path / "s", ["aaaa", "ab"], greedy="a")
    rows = by_name(evaluate(store))
    assert rows["self-consistency", 4].problems == 1
    assert rows["greedy", 1].problems == 1


def test_paired_difference_uses_the_problems_that_both_hold(tmp_path):
    store = make_store(tmp_path / "s", ["aaba", "bbbb", "abab"], greedy="ab")
    rows = by_name(evaluate(store, samples=[4]))
    difference = paired_difference(rows["self-consistency", 4], rows["greedy", 1])
    assert difference.mean == 0
    difference = paired_difference(rows["self-consistency", 4], rows["sampling", 1])
    assert difference.mean == pytest.approx((0.25 + 0 + 0.5) / 3)


def test_bad_requests_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no samples: run the sweep"):
        evaluate(Store(tmp_path / "empty", identity={}))
    store = make_store(tmp_path / "s", ["aa"], greedy="a")
    with pytest.raises(ValueError, match="unknown strategy 'oracle'; known are greedy"):
        evaluate(store, strategies=["oracle"])
    with pytest.raises(ValueError, match=r"samples are \[0, 4\]"):
        evaluate(store, samples=[0, 4])
    with pytest.raises(ValueError, match="no samples of seed 5"):
        evaluate(store, seed=5)
    store.close()
    store = make_store(tmp_path / "s", ["aa"], greedy="a", seed=1)
    with pytest.raises(ValueError, match=r"seeds \[0, 1\]: choose one"):
        evaluate(store)
    assert evaluate(store, seed=1)

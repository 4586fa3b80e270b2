from dataclasses import replace
from math import comb, isnan

import numpy as np
import pytest

from ponder.inference import search_table
from ponder.inference.evaluation import evaluate, mark_pareto, paired_difference
from ponder.inference.search_table import Line, SearchKey, SearchRecord
from ponder.inference.store import Key, Record, Store, StoredProblem
from ponder.inference.strategies import STRATEGIES, Choice, evenly, mean_log_probability
from ponder.models.flops import decode_flops, prefill_flops

from ..models.test_flops import SMALL

COLD, HOT = "temperature=0.0", "temperature=1.0"


def make_store(
    path, answers, *, greedy, budget=8, seed=0, logprobs=None, hot=HOT, tokens=4, prompt=""
):
    """answers: per problem, the stored samples' answers ("-" for none); the right one is "a".
    logprobs: of the samples at a temperature, -1 by default. tokens: of the first sample."""
    store = Store(path, identity={"model": "m", "task": "t"})
    store.add_problems([StoredProblem(f"{prompt}{i}", "a", i) for i in range(len(answers))])

    def record(problem, params, sample, answer):
        return Record(
            key=Key(problem, budget, params, seed, sample),
            text=answer,
            answer=None if answer == "-" else answer,
            correct=answer == "a",
            prompt_tokens=10 + problem,
            sampled_tokens=tokens + sample,
            forced_tokens=1,
            think_tokens=3,
            logprob=logprobs[sample] if logprobs else -1.0,
            finish="stop",
            seconds=0.5,
        )

    store.add(record(p, COLD, 0, g) for p, g in enumerate(greedy))
    store.add(record(p, hot, s, a) for p, row in enumerate(answers) for s, a in enumerate(row))
    return store


def by_name(results):
    return {(r.strategy, r.samples): r for r in results}


def test_scores_and_costs_of_the_plain_strategies(tmp_path):
    store = make_store(tmp_path / "s", ["aabb", "bbbb", "-ba-"], greedy="aba")
    shape = SMALL
    plain = ["greedy", "sampling", "self-consistency", "pass@k"]
    rows = by_name(
        evaluate(store, shape=shape, samples=[1, 2, 4, 16], model="tiny", strategies=plain)
    )
    assert set(rows) == {
        ("greedy", 1),
        ("sampling", 1),
        *(("self-consistency", k) for k in (2, 4)),
        *(("pass@k", k) for k in (2, 4)),
    }
    assert rows["greedy", 1].scores.tolist() == [1, 0, 1]
    assert rows["sampling", 1].scores.tolist() == [0.5, 0, 0.25]
    assert rows["self-consistency", 4].scores.tolist() == [0.5, 0, 0.5]  # ties are shared
    # Pairs of "aabb": one (a, a), four (a, b). Pairs of "-ba-": one (a, b), two (-, a).
    pairs = rows["self-consistency", 2]
    np.testing.assert_allclose(pairs.scores, [(1 + 4 / 2) / 6, 0, (2 + 1 / 2) / 6])
    np.testing.assert_allclose(rows["pass@k", 2].scores, [5 / 6, 0, 1 - comb(3, 2) / comb(4, 2)])
    assert rows["pass@k", 4].accuracy == pytest.approx(2 / 3)
    assert len(evaluate(store, samples=[4, 2, 4], strategies=["pass@k"])) == 2

    vote = rows["self-consistency", 2]
    mean_new = [4, 5, 6, 7]
    assert vote.prompt_tokens == 11  # once, not once per sample
    assert vote.sampled_tokens == 2 * np.mean(mean_new) and vote.forced_tokens == 2
    assert vote.outcome.tokens.tolist() == [10 + 13, 11 + 13, 12 + 13]
    assert vote.seconds_per_problem == 1.0 and vote.drawn == 2
    expected = np.mean(
        [
            prefill_flops(shape, p)
            + 2 * np.mean([decode_flops(shape, p, n) for n in mean_new])  # n + 1 - 1 fed
            for p in (10, 11, 12)
        ]
    )
    assert vote.flops_per_problem == pytest.approx(expected)
    assert (vote.task, vote.model, vote.think_budget, vote.temperature) == ("t", "tiny", 8, 1.0)
    assert vote.ci_low <= vote.accuracy <= vote.ci_high and vote.problems == 3
    assert vote.guess_accuracy == 1.0


def test_confidence_decides_weighted_votes_and_the_best_of_n(tmp_path):
    """Two samples say b, one says a, and a is far more probable; samples have 4, 5 and 6 tokens."""
    store = make_store(tmp_path / "s", ["abb"], greedy="a", logprobs=[-0.4, -4.0, -4.2])
    rows = by_name(evaluate(store, samples=[3]))
    assert rows["self-consistency", 3].accuracy == 0
    # e^-0.4 beats e^-4 + e^-4.2; e^-0.1 loses to e^-0.8 + e^-0.7; a softmax sharpens it again.
    assert rows["probability-vote", 3].accuracy == 1
    assert rows["mean-probability-vote", 3].accuracy == 0
    assert rows["confidence-vote", 3].accuracy == 1
    assert rows["best-of-n", 3].accuracy == 1
    assert all(rows[name, 3].sampled_tokens == 15 for name in ("probability-vote", "best-of-n"))
    pool = store.pool(budget=8, params=HOT, seed=0)
    assert mean_log_probability(pool).tolist() == [[-0.4 / 4, -4.0 / 5, -4.2 / 6]]  # none forced
    silent = replace(pool, logprob=0 * pool.logprob, sampled_tokens=0 * pool.sampled_tokens)
    assert mean_log_probability(silent).tolist() == [[0, 0, 0]]


def test_stopping_pays_for_what_it_drew(tmp_path):
    store = make_store(tmp_path / "s", ["aaaaaa"], greedy="a", logprobs=[-0.5] * 6)
    rows = by_name(evaluate(store, samples=[6], shape=SMALL))
    # Four agreeing samples: 1 - 2^-5 >= 0.95, and a window of four.
    for name in ("adaptive-consistency", "early-stopping"):
        assert rows[name, 6].drawn == pytest.approx(4) and rows[name, 6].samples == 6
        assert rows[name, 6].seconds_per_problem == pytest.approx(4 * 0.5)
        assert rows[name, 6].sampled_tokens == pytest.approx(4 * np.mean([4, 5, 6, 7, 8, 9]))
    # With fewer samples they cannot stop early: they would be the plain vote.
    pool = store.pool(budget=8, params=HOT, seed=0)
    for name in ("adaptive-consistency", "early-stopping"):
        assert STRATEGIES[name].sizes(pool, [2, 4, 5, 6]) == [5, 6]
    # One text of probability 0.61 leaves too little for any other answer.
    assert rows["certain-mode", 6].drawn == pytest.approx(1)
    flops = [rows[n, 6].flops_per_problem for n in ("self-consistency", "early-stopping")]
    prompt = prefill_flops(SMALL, 10)
    assert (flops[1] - prompt) / (flops[0] - prompt) == pytest.approx(4 / 6)


def test_strategies_leave_out_what_the_pool_does_not_hold(tmp_path):
    silent = make_store(tmp_path / "a", ["aabbaa"], greedy="a", logprobs=[None] * 6)
    rows = by_name(evaluate(silent, samples=[6]))
    assert {"self-consistency", "adaptive-consistency"} <= {name for name, _ in rows}
    assert not {name for name, _ in rows} & {"probability-vote", "best-of-n", "certain-mode"}
    # Sampled colder than the log-probabilities are: they do not add up to one.
    cold = make_store(tmp_path / "b", ["aabbaa"], greedy="a", hot="temperature=0.7")
    rows = by_name(evaluate(cold, samples=[6]))
    assert ("best-of-n", 6) in rows and ("certain-mode", 6) not in rows
    greedy = make_store(tmp_path / "c", ["aabbaa"], greedy="a", hot=COLD)
    assert list(by_name(evaluate(greedy, samples=[1, 6]))) == [("greedy", 1)]


def test_pareto_marks_what_competes(tmp_path):
    store = make_store(tmp_path / "s", ["aaab", "abaa", "bbab"], greedy="aab")
    rows = by_name(evaluate(store, samples=[1, 2, 4]))
    assert all(isnan(r.flops_per_problem) for r in rows.values())  # tokens decide then
    assert rows["greedy", 1].pareto
    assert not rows["self-consistency", 4].pareto  # as right as greedy, for four times as much
    assert rows["pass@k", 4].accuracy > rows["greedy", 1].accuracy
    assert not rows["pass@k", 4].pareto  # an oracle does not compete


def test_what_costs_about_as_much_or_lacks_problems_is_no_step_of_the_frontier(tmp_path):
    [row] = evaluate(make_store(tmp_path / "s", ["a"], greedy="a"), strategies=["greedy"])
    row = replace(row, sampled_tokens=0.0, forced_tokens=0.0, problems=100)

    def marked(*changes):
        return [r.pareto for r in mark_pareto([replace(row, **c) for c in changes])]

    worse = dict(accuracy=0.5, prompt_tokens=1000.0)
    assert marked(worse, dict(accuracy=0.6, prompt_tokens=1019.0)) == [False, True]
    assert marked(worse, dict(accuracy=0.6, prompt_tokens=1030.0)) == [True, True]
    for problems, counts in ((89, False), (90, True)):
        few = worse | dict(accuracy=1.0, problems=problems)
        assert marked(worse, few) == [not counts, counts]
    # Where one row's FLOPs are unknown, all are compared by their tokens.
    cheap = dict(flops_per_problem=1.0, prompt_tokens=9.0)
    assert marked(cheap, dict(flops_per_problem=np.nan, prompt_tokens=5.0)) == [False, True]
    assert marked(cheap, dict(flops_per_problem=2.0, prompt_tokens=5.0)) == [True, False]


def test_a_search_is_a_row_of_its_best_line_and_one_of_their_vote(tmp_path):
    store = make_store(tmp_path / "s", ["aa"], greedy="a", seed=5)
    lines = Line("b", False, 0.9), Line("a", True, 0.6), Line("a", True, 0.5)
    kind = "beam lines={} width=1 step=4 judge=confidence"
    three = SearchRecord(
        SearchKey(0, kind.format(3), HOT, 5), "b", lines, 10, 9, 1, 4, 100.0, 20.0, 0.5
    )
    one = replace(three, key=SearchKey(0, kind.format(1), HOT, 5), lines=lines[1:2])
    other_seed = replace(three, key=SearchKey(0, kind.format(3), HOT, 0), lines=lines[1:])
    search_table.add(store, [three, one, other_seed])
    names = ["beam", "beam-vote"]
    found = {(r.strategy, r.samples): r for r in evaluate(store, strategies=names)}
    accuracies = {key: row.accuracy for key, row in found.items()}
    assert accuracies == {("beam", 1): 1, ("beam", 3): 0, ("beam-vote", 3): 1}
    row = found["beam-vote", 3]
    assert (row.flops_per_problem, row.judge_flops_per_problem, row.pruned_tokens) == (120, 20, 4)
    assert [r.strategy for r in evaluate(store, strategies=["beam-vote"])] == ["beam-vote"]


def test_a_new_strategy_is_a_class_and_an_entry(tmp_path, monkeypatch):
    class Longest:
        """Of k samples, the one with the longest text."""

        name = "longest"
        oracle = False

        def sizes(self, pool, samples):
            return [k for k in samples if k <= pool.samples and pool.temperature > 0]

        def run(self, pool, k) -> Choice:
            choice = pool.sampled_tokens[:, :k].argmax(1)[:, None]
            return evenly(pool, np.take_along_axis(pool.correct, choice, 1)[:, 0] * 1.0, k)

    monkeypatch.setitem(STRATEGIES, "longest", Longest())
    store = make_store(tmp_path / "s", ["ba", "ab"], greedy="aa")
    rows = by_name(evaluate(store, samples=[2], strategies=["longest"]))
    assert list(rows) == [("longest", 2)]
    assert rows["longest", 2].scores.tolist() == [1, 0]


def test_incomplete_stores(tmp_path):
    store = make_store(tmp_path / "s", ["aaaa", "ab"], greedy="a")
    rows = by_name(evaluate(store))
    assert rows["self-consistency", 2].problems == 2 and ("self-consistency", 4) not in rows
    assert rows["greedy", 1].problems == 1
    store = make_store(tmp_path / "more", ["aaaa"] * 6 + ["ab"], greedy="a")
    assert by_name(evaluate(store))["self-consistency", 4].problems == 6
    store = make_store(tmp_path / "guess", ["aa"] * 4, greedy="aa")
    with store.transaction() as db:
        db.execute("UPDATE problem SET answer = 'b' WHERE id > 1")
    rows = by_name(evaluate(store))  # the best guess is for the problems of the row
    assert rows["greedy", 1].guess_accuracy == 1 > rows["sampling", 1].guess_accuracy


def test_paired_difference_uses_the_problems_that_both_hold(tmp_path):
    store = make_store(tmp_path / "s", ["aaba", "bbbb", "abaa"], greedy="ab")
    rows = by_name(evaluate(store, samples=[4]))
    difference = paired_difference(rows["self-consistency", 4], rows["greedy", 1])
    assert difference.mean == 0
    difference = paired_difference(rows["self-consistency", 4], rows["sampling", 1])
    assert difference.mean == pytest.approx((0.25 + 0 + 0.25) / 3)
    last = replace(rows["greedy", 1], ids=np.array([1, 2]))  # right, wrong; samples: 0, 0.75
    assert paired_difference(last, rows["sampling", 1]).mean == pytest.approx((1 - 0.75) / 2)


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

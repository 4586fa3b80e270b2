from itertools import product

import numpy as np
import pytest

from ponder.inference.policy import bins_of, compute_optimal


def test_bins_are_about_equal_and_levels_stay_whole():
    level = np.array([3, 1, 1, 2, 4, 4, 4, 4, 5, 9, 9, 9])
    bins = bins_of(level, 3)
    assert bins.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert bins_of(np.full(7, 5)).tolist() == [0] * 7
    assert bins_of(np.arange(100), 4).tolist() == [i // 25 for i in range(100)]
    # A level that fills half of all problems takes one bin, and no bin is left empty.
    assert (
        bins_of(np.array([1] * 6 + [2, 3, 4, 5, 6, 7]), 4).tolist() == [0] * 6 + [1] * 3 + [2] * 3
    )


def test_the_choice_is_the_best_that_fits():
    scores = np.array([[0.2] * 4, [0.6] * 4, [0.6] * 4, [1.0] * 4])
    costs = np.array([[1.0] * 4, [3.0] * 4, [2.0] * 4, [9.0] * 4])
    chosen = {0.5: 0, 1: 0, 1.99: 0, 2: 2, 8.9: 2, 9: 3}
    found = compute_optimal(scores, costs, list(chosen))
    assert [p.choice for p in found] == [(way,) for way in chosen.values()]
    # What is dearer by less than chance is not too dear; among equals the cheapest stays.
    close = compute_optimal(scores, costs, [1.96, 1.99, 3, 8.7, 8.9], slack=0.02)
    assert [p.choice for p in close] == [(0,), (2,), (2,), (2,), (3,)]


def test_choices_by_bin_beat_every_other_assignment():
    rng = np.random.default_rng(0)
    bins = np.array([0, 0, 0, 1, 1, 2])
    for _ in range(20):
        scores, costs = rng.random((4, 6)), rng.random((4, 6))

        def total(ways, scores=scores, costs=costs):
            """The summed score of a way for each bin, None where one of them is too dear."""
            inside = [(w, bins == g) for g, w in enumerate(ways)]
            if any(costs[w, m].mean() > 0.6 for w, m in inside):
                return None
            return sum(scores[w, m].sum() for w, m in inside)

        totals = [total(ways) for ways in product(range(4), repeat=3)]
        found = [t for t in totals if t is not None]
        if not found:
            continue
        (policy,) = compute_optimal(scores, costs, [0.6], bins=bins)
        assert total(policy.choice) == pytest.approx(max(found))


def test_luck_is_not_reported():
    """Forty ways that are all coins: the best of them looks better than it is."""
    rng = np.random.default_rng(1)
    scores = (rng.random((40, 60)) < 0.5).astype(float)
    (policy,) = compute_optimal(scores, np.ones((40, 60)), [1.0])
    assert scores.mean(1).max() > 0.62
    assert abs(policy.accuracy.mean - 0.5) < 0.06
    assert policy.accuracy.low < policy.accuracy.mean < policy.accuracy.high


def test_the_interval_covers_the_choice():
    """Two ways, each right where the other is wrong: whichever is chosen is right on half of all
    problems. Over many choices each problem's score is about a half, so that the mean of such
    scores seems sure; twenty-five sweeps show how far it is from what it stands for."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(25):
        one = rng.random(100) < 0.5
        (policy,) = compute_optimal(np.stack([one, ~one]).astype(float), np.ones((2, 100)), [1])
        found.append(policy.accuracy)
    means = [accuracy.mean for accuracy in found]
    assert np.std(means) > 0.03
    assert sum(low <= 0.5 <= high for _, low, high in found) >= 23
    assert np.mean([high - low for _, low, high in found]) < 2 * 3.92 * np.std(means)


def test_difficulty_pays_where_ways_differ_by_it():
    """Thinking is needed on hard problems only, and costs ten times as much."""
    hard = np.arange(80) % 2
    scores = np.stack([1.0 - hard, np.ones(80)])
    costs = np.stack([np.ones(80), np.full(80, 10.0)])
    overall = compute_optimal(scores, costs, [1, 10])
    split = compute_optimal(scores, costs, [1, 10], bins=hard)
    assert [p.accuracy.mean for p in overall] == [0.5, 1.0] and overall[1].cost == 10
    assert [p.accuracy.mean for p in split] == [0.5, 1.0] and split[1].cost == 5.5
    assert split[1].choice == (0, 1) and overall[1].choice == (1,)
    assert split == compute_optimal(scores, costs, [1, 10], bins=hard)


def test_a_bin_of_one_problem_and_a_budget_below_everything():
    scores, costs = np.array([[1.0, 0, 1, 0, 1]]), np.full((1, 5), 7.0)
    (policy,) = compute_optimal(scores, costs, [0.1], bins=np.array([0, 0, 0, 0, 1]))
    assert policy.cost == 7 and policy.accuracy.mean == 0.6 and policy.choice == (0, 0)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(1, 1\).*P at least 2"):
        compute_optimal(np.ones((1, 1)), np.ones((1, 1)), [1])
    with pytest.raises(ValueError, match=r"scores have shape \(2, 3\) and costs \(2, 4\)"):
        compute_optimal(np.ones((2, 3)), np.ones((2, 4)), [1])

from itertools import combinations
from math import comb

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder.inference.stats import (
    bootstrap,
    guess_accuracy,
    maj_at_k,
    paired_difference,
    pareto,
    pass_at_k,
    vote,
)


def winner_by_hand(answers):
    """The most common answer, the earliest of equals; None where nobody votes."""
    voters = [a for a in answers if a >= 0]
    return max(voters, key=lambda a: (voters.count(a), -voters.index(a)), default=None)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(shape, data):
    n, right = shape
    k = data.draw(st.integers(1, n))
    correct = np.arange(n) < right
    truth = np.mean([any(correct[list(c)]) for c in combinations(range(n), k)])
    np.testing.assert_allclose(pass_at_k(correct[None], k), [truth], atol=1e-12)


def test_pass_at_k_stays_exact_where_factorials_overflow():
    correct = np.zeros((1, 2000), dtype=bool)
    correct[0, :3] = True
    truth = 1 - comb(1997, 700) / comb(2000, 700)
    np.testing.assert_allclose(pass_at_k(correct, 700), [truth], rtol=1e-12)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=7), st.data())
@settings(deadline=None)
def test_maj_at_k_is_the_mean_over_all_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    right = data.draw(st.integers(0, 3))
    subsets = [[answers[i] for i in c] for c in combinations(range(len(answers)), k)]
    truth = np.mean([winner_by_hand(s) == right for s in subsets])
    codes = np.array([answers])
    np.testing.assert_allclose(maj_at_k(codes, codes == right, k), [truth], atol=1e-12)


def test_ties_go_to_the_earliest_and_the_silent_do_not_vote():
    answers = np.array([[2, 1, 1, 2], [1, 2, 2, 1], [-1, -1, -1, 5], [-1] * 4, [3, -1, -1, -1]])
    assert vote(answers).tolist() == [0, 0, 3, -1, 0]
    scores = maj_at_k(answers, np.array([[True, False, False, True]] * 5), 4)
    assert scores.tolist() == [1, 1, 1, 0, 1]


def test_sampled_subsets_are_seeded_and_near_the_truth():
    rng = np.random.default_rng(0)
    answers = rng.integers(-1, 3, size=(40, 16))
    correct = answers == 1
    exact = maj_at_k(answers, correct, 5, subsets=comb(16, 5))
    drawn = maj_at_k(answers, correct, 5, subsets=1500)
    assert (drawn == maj_at_k(answers, correct, 5, subsets=1500)).all()
    assert (drawn != exact).any()
    assert not (drawn == maj_at_k(answers, correct, 5, subsets=1500, seed=1)).all()
    # Five standard deviations of a mean of 1500 draws from a coin.
    assert np.abs(drawn - exact).max() < 5 * 0.5 / np.sqrt(1500)


def test_every_sample_is_as_likely_in_a_drawn_subset():
    answers = np.arange(12)[None]  # all different: the vote is the subset's first sample
    draws = 200 * 20
    for i in (0, 5, 10, 11):
        runs = [maj_at_k(answers, answers == i, 2, subsets=20, seed=s)[0] for s in range(200)]
        exact = (11 - i) / comb(12, 2)
        assert np.mean(runs) == pytest.approx(exact, abs=5 * np.sqrt(exact / draws))


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range_is_named(k):
    correct = np.ones((2, 3), dtype=bool)
    for estimate in (lambda: pass_at_k(correct, k), lambda: maj_at_k(correct + 0, correct, k)):
        with pytest.raises(ValueError, match=f"k is {k}; .* from 1 to 3"):
            estimate()


@pytest.mark.parametrize("kind", ["binary", "fractions"])
def test_bootstrap_agrees_with_scipy(kind):
    rng = np.random.default_rng(1)
    scores = rng.random(200) < 0.3 if kind == "binary" else rng.beta(2, 5, size=200)
    ours = bootstrap(scores)
    theirs = scipy.stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=10_000, rng=2
    ).confidence_interval
    # Two Monte-Carlo runs: the 2.5 % point of 10⁴ resamples wanders by ~3 % of the deviation.
    tolerance = 0.2 * scores.std() / np.sqrt(len(scores))
    assert ours.mean == pytest.approx(scores.mean())
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)
    assert ours == bootstrap(scores)
    if kind == "fractions":  # the ends of binary scores fall on few values
        assert ours != bootstrap(scores, seed=1)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        low, high = bootstrap(rng.random(100) < 0.4, resamples=1000, seed=trial)[1:]
        hits += low <= 0.4 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_degenerate_scores():
    assert bootstrap(np.ones(5)) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        bootstrap(np.empty(0))


def test_pairing_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(4)
    b = rng.random(300)
    a = np.clip(b + 0.02, 0, 1)
    assert bootstrap(a).low < bootstrap(b).high
    difference = paired_difference(a, b)
    assert 0 < difference.low <= difference.mean <= difference.high
    assert difference.mean == pytest.approx((a - b).mean())
    with pytest.raises(ValueError, match="do not pair"):
        paired_difference(a, b[1:])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_pareto_keeps_what_nothing_beats(points):
    mask = pareto([c for c, _ in points], [v for _, v in points])
    for (c, v), best in zip(points, mask, strict=True):
        beaten = any(x <= c and y >= v and (x < c or y > v) for x, y in points)
        assert best == (not beaten)


def test_pareto_leaves_unknown_costs_out():
    assert pareto([np.nan, 1, 2], [1.0, 0.5, 0.5]).tolist() == [False, True, False]


def test_guess_accuracy():
    assert guess_accuracy(["7", "3", "7", "1"]) == 0.5
    with pytest.raises(ValueError, match="at least one problem"):
        guess_accuracy([])

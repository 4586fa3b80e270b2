import random

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ponder.inference import stats
from ponder.inference.stats import (
    accuracy,
    bootstrap,
    budget_control,
    fit_coverage,
    guess_accuracy,
    guess_coverage,
    paired_difference,
    pareto,
)


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


def test_draws_that_are_kept_and_draws_in_parts_are_the_same(monkeypatch):
    scores = np.random.default_rng(2).random(30)
    kept = bootstrap(scores)
    assert kept == bootstrap(scores) != bootstrap(scores[:29])
    monkeypatch.setattr(stats, "KEPT", 0)
    assert bootstrap(scores) == kept
    monkeypatch.setattr(stats, "CHUNK", 7 * 30)
    assert bootstrap(scores) == kept


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


def test_the_interval_of_what_is_always_right_or_never():
    assert accuracy(np.ones(500)) == (1, pytest.approx(0.0250 ** (1 / 500)), 1)
    assert accuracy(np.zeros(20)) == (0, 0, pytest.approx(0.168433, abs=1e-5))  # of a table
    for some in ([1.0, 0.0, 0.5, 1.0], [0.5, 0.52, 0.54, 0.51]):
        assert accuracy(np.array(some)) == bootstrap(np.array(some))


def test_a_difference_that_never_varies_is_no_certainty():
    """One problem, won, told nothing of the next; the bootstrap said from 1 to 1."""
    one, none = np.ones(1), np.zeros(1)
    assert paired_difference(one, none) == (1, pytest.approx(1 - 2 * 0.975), 1)
    assert paired_difference(none, one) == (-1, -1, pytest.approx(-1 + 2 * 0.975))
    unseen = 1 - 0.025 ** (1 / 500)  # what so many problems hide with a chance of 2.5 %
    half = np.full(500, 0.5)
    assert paired_difference(half, half) == (0, pytest.approx(-unseen), pytest.approx(unseen))
    assert accuracy(half) == (0.5, pytest.approx(0.5 - unseen / 2), pytest.approx(0.5 + unseen / 2))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_pareto_keeps_what_nothing_beats(points):
    mask = pareto([c for c, _ in points], [v for _, v in points])
    for (c, v), best in zip(points, mask, strict=True):
        beaten = any(x <= c and y >= v and (x < c or y > v) for x, y in points)
        assert best == (not beaten)


def test_pareto_measures_slack_from_what_stays():
    cost, value = [100.0, 101.5, 103.0, 104.0], [0.80, 0.81, 0.82, 0.83]
    # Each is within 2 % of the next, but the second not of the last, which stays.
    assert pareto(cost[1:3], value[1:3], slack=0.02).tolist() == [False, True]
    assert pareto(cost, value, slack=0.02).tolist() == [False, True, False, True]
    assert pareto([1.0, 1.0, 2.0], [0.5, 0.5, 0.5], slack=0.02).tolist() == [True, True, False]


def test_pareto_leaves_what_is_unknown_out():
    assert pareto([np.nan, 1, 2], [1.0, 0.5, 0.5]).tolist() == [False, True, False]
    assert pareto([1, 2], [np.nan, 0.5]).tolist() == [False, True]


def test_guess_accuracy_is_no_hindsight():
    assert guess_accuracy(["7"] * 60 + [str(i) for i in range(100, 140)]) == pytest.approx(0.6)
    draw = random.Random(0)
    words = [str(draw.randrange(120)) for _ in range(500)]
    assert guess_accuracy(words) < 0.013 < max(map(words.count, words)) / 500
    assert np.isnan(guess_accuracy(["", ""])) and guess_accuracy(["", "", "a", "a"]) <= 0.5
    assert guess_accuracy(["", "", "", "a"]) == 0  # what is not known is no guess
    with pytest.raises(ValueError, match="at least one problem"):
        guess_accuracy([])


def test_guess_coverage():
    digits = random.Random(0).choices("0123456789", k=500)
    assert guess_coverage(digits, [1, 5, 10]) == pytest.approx([0.1, 0.5, 1], abs=0.05)
    # Half of all answers are 7, the others known to nobody else.
    answers = [str(1000 + i) if i % 2 else "7" for i in range(200)]
    assert guess_coverage(answers, [1, 100]) == pytest.approx([0.5, 0.5], abs=1e-9)
    assert guess_coverage(["a"], [64]) == [0] and guess_coverage(["a", "b"], [64]) == [0]


def test_coverage_follows_the_law_that_made_it():
    k = np.array([1, 2, 4, 8, 16, 32])
    law = np.exp(-1.5 * k**-0.6)
    rng = np.random.default_rng(5)
    spread = rng.normal(0, 0.02, size=(400, 1))
    fit = fit_coverage(k, law + spread - spread.mean())
    assert fit is not None
    assert fit.a.mean == pytest.approx(-1.5, rel=1e-6) and fit.b.mean == pytest.approx(
        0.6, rel=1e-6
    )
    assert fit.a.low < -1.5 < fit.a.high and fit.b.low < 0.6 < fit.b.high
    assert fit.b.high - fit.b.low < 0.05
    np.testing.assert_allclose(fit(k), law, rtol=1e-6)
    assert fit == fit_coverage(k, law + spread - spread.mean())


def test_the_fits_interval_covers_the_truth_about_as_often_as_it_says():
    k, rng, hits = np.array([1, 2, 4, 8]), np.random.default_rng(6), 0
    for trial in range(24):
        # Two kinds of problems: the mean follows the law exactly, each problem does not.
        hard = rng.random((120, 1)) < 0.5
        law = np.exp(-1.2 * k**-0.5)
        coverage = np.where(hard, law - 0.25, law + 0.25)
        fit = fit_coverage(k, coverage, resamples=40, seed=trial)
        hits += fit.a.low <= -1.2 <= fit.a.high
    assert hits / 24 >= 0.75  # 0.95, less four standard deviations


def test_coverage_without_a_law():
    k = [1, 2, 4]
    assert fit_coverage(k, np.ones((5, 3))) is None and fit_coverage(k, np.zeros((5, 3))) is None
    assert fit_coverage([1], np.full((5, 1), 0.5)) is None
    with pytest.raises(ValueError, match=r"shape \(5, 2\); for 3 k"):
        fit_coverage(k, np.ones((5, 2)))


def test_budget_control_by_hand():
    got = budget_control([1, 1, 0.5], [10, 20, 40], [0.2, 0.5, 0.4])
    slopes = [0.3 / 10, 0.2 / 30, -0.1 / 20]
    assert got.control == pytest.approx(2.5 / 3) and got.performance == 0.5
    assert got.scaling == pytest.approx(np.mean(slopes))
    turned = budget_control([0.5, 1, 1], [40, 10, 20], [0.4, 0.2, 0.5])
    assert turned.scaling == pytest.approx(got.scaling) and turned.performance == 0.5
    assert np.isnan(budget_control([1, 1], [5, 5], [0.1, 0.9]).scaling)

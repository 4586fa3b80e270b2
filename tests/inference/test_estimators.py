"""Every estimator against the enumeration of all subsets or orders, and against closed forms."""

from collections import Counter
from itertools import combinations, permutations
from math import comb, exp, factorial

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder.inference import estimators
from ponder.inference.estimators import (
    best_of_at_k,
    beta_rule,
    certain_rule,
    leaders,
    maj_at_k,
    pass_at_k,
    preference,
    stop_early,
    unanimous_rule,
    weighted_vote_at_k,
    win_probability,
)

POOLS = st.lists(st.integers(-1, 3), min_size=1, max_size=7)


def share_of_right(answers, weights, right):
    """A vote by hand: 1 where the right answer has the most, 1/t where t answers tie."""
    sums = Counter()
    for answer, weight in zip(answers, weights, strict=True):
        if answer >= 0:
            sums[answer] += weight
    best = max(sums.values(), default=0)
    tied = [a for a, s in sums.items() if s > best - 1e-12]
    return tied.count(right) / max(1, len(tied))


def mean_over_subsets(n, k, score):
    return np.mean([score(list(c)) for c in combinations(range(n), k)])


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(shape, data):
    n, right = shape
    k = data.draw(st.integers(1, n))
    correct = np.arange(n) < right
    truth = mean_over_subsets(n, k, lambda c: any(correct[c]))
    np.testing.assert_allclose(pass_at_k(correct[None], k), [truth], atol=1e-12)


def test_pass_at_k_stays_exact_where_factorials_overflow():
    correct = np.zeros((1, 2000), dtype=bool)
    correct[0, :3] = True
    truth = 1 - comb(1997, 700) / comb(2000, 700)
    np.testing.assert_allclose(pass_at_k(correct, 700), [truth], rtol=1e-12)


@given(POOLS, st.data())
@settings(deadline=None)
def test_maj_at_k_is_the_mean_over_all_subsets(answers, data):
    n = len(answers)
    k, right = data.draw(st.integers(1, n)), data.draw(st.integers(0, 3))
    codes = np.array([answers])
    truth = mean_over_subsets(n, k, lambda c: share_of_right(codes[0, c], [1] * k, right))
    np.testing.assert_allclose(maj_at_k(codes, codes == right, k), [truth], atol=1e-11)


@given(st.lists(st.integers(-1, 2), min_size=1, max_size=5), st.data())
@settings(deadline=None)
def test_a_split_tie_is_the_earliest_answer_on_average_over_orders(answers, data):
    k = data.draw(st.integers(1, len(answers)))

    def earliest(order):
        voters = [a for a in order[:k] if a >= 0]
        return max(voters, key=lambda a: (voters.count(a), -voters.index(a)), default=None) == 1

    truth = np.mean([earliest(order) for order in permutations(answers)])
    codes = np.array([answers])
    np.testing.assert_allclose(maj_at_k(codes, codes == 1, k), [truth], atol=1e-11)


def test_a_vote_between_two_answers_is_hypergeometric():
    for n, right, k in ((500, 260, 101), (2000, 900, 301)):  # C(n, k) is far beyond a float's range
        codes = (np.arange(n) < right)[None].astype(int)
        truth = scipy.stats.hypergeom.sf(k // 2, n, right, k)
        np.testing.assert_allclose(maj_at_k(codes, codes == 1, k), [truth], rtol=1e-8)


def test_the_chances_of_all_answers_add_up():
    counts, silent = [9, 7, 7, 3, 1, 1, 1], 4
    for k in (1, 5, 20):
        total = sum(
            win_probability(c, tuple(sorted(counts[:i] + counts[i + 1 :])), silent, k)
            for i, c in enumerate(counts)
        )
        nobody = comb(silent, k) / comb(sum(counts) + silent, k)
        assert total + nobody == pytest.approx(1, abs=1e-12)


def test_ties_are_shared_and_the_silent_do_not_vote():
    answers = np.array([[2, 1, 1, 2], [2, 1, 1, 1], [-1, -1, -1, 5], [-1] * 4, [3, -1, 4, 5]])
    right = np.array([2, 1, 5, 0, 3])[:, None]
    assert maj_at_k(answers, answers == right, 4).tolist() == [0.5, 1, 1, 0, round(1 / 3, 12)]
    # A verifier that looks at more than the answer: half of those that say 1 are right.
    correct = np.array([[True, False, True, True]])
    assert maj_at_k(np.array([[1, 1, 2, 2]]), correct, 4).tolist() == [0.75]
    # One that is right by its text and gives no answer has no vote.
    assert maj_at_k(np.array([[-1, -1, 2]]), np.array([[True, True, False]]), 3).tolist() == [0]


@given(POOLS, st.data())
@settings(deadline=None)
def test_a_weighted_vote_is_the_mean_over_all_subsets(answers, data):
    n = len(answers)
    k, right = data.draw(st.integers(1, n)), data.draw(st.integers(0, 3))
    logs = data.draw(st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.25]), min_size=n, max_size=n))
    codes = np.array([answers])
    truth = mean_over_subsets(
        n, k, lambda c: share_of_right(codes[0, c], [exp(logs[i]) for i in c], right)
    )
    for shift in (0, -2000, 2000):  # logarithms of weights: a common factor changes nothing
        got = weighted_vote_at_k(codes, codes == right, np.array([logs]) + shift, k)
        np.testing.assert_allclose(got, [truth], atol=1e-9)
    equal = weighted_vote_at_k(codes, codes == right, np.zeros((1, n)), k)
    np.testing.assert_allclose(equal, maj_at_k(codes, codes == right, k), atol=1e-11)


def test_weights_that_vanish_beside_the_best_still_decide_without_it():
    answers = np.array([[0, 1, 1, 2]])
    logs = np.array([[0.0, -1000, -1000, -999.5]])  # 2 e^-1000 > e^-999.5 > e^-1000
    scores = weighted_vote_at_k(answers, answers == 1, logs, 3)
    # Of the four subsets of three only the one without sample 0 can be won by answer 1.
    assert scores.tolist() == [0.25]
    silent = np.array([[-1, 1, 1, 2]])  # the best of all gives no answer
    assert weighted_vote_at_k(silent, silent == 1, logs, 4).tolist() == [1]


def test_sums_that_differ_by_their_rounding_tie():
    answers = np.array([[0, 0, 1]])
    logs = np.log([[0.1, 0.2, 0.3]])  # 0.1 + 0.2 is not 0.3 in floating point
    for shift in np.linspace(0, 1, 9):
        assert weighted_vote_at_k(answers, answers == 0, logs + shift, 3).tolist() == [0.5]


def test_sampled_subsets_are_seeded_and_near_the_truth():
    rng = np.random.default_rng(0)
    answers = rng.integers(-1, 3, size=(40, 16))
    correct, logs = answers == 1, rng.normal(size=(40, 16))
    exact = weighted_vote_at_k(answers, correct, logs, 5, limit=comb(16, 5))
    drawn = weighted_vote_at_k(answers, correct, logs, 5, limit=1500)
    assert (drawn == weighted_vote_at_k(answers, correct, logs, 5, limit=1500)).all()
    assert (drawn != exact).any()
    assert (drawn != weighted_vote_at_k(answers, correct, logs, 5, limit=1500, seed=1)).any()
    # Five standard deviations of a mean of 1500 draws from a coin.
    assert np.abs(drawn - exact).max() < 5 * 0.5 / np.sqrt(1500)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7), st.data())
@settings(deadline=None)
def test_best_of_n_is_the_mean_over_all_subsets(samples, data):
    n = len(samples)
    k = data.draw(st.integers(1, n))
    values, correct = np.array(samples).T

    def best(c):
        return correct[c][values[c] == values[c].max()].mean()

    truth = mean_over_subsets(n, k, best)
    got = best_of_at_k(values[None].astype(float), correct[None].astype(bool), k)
    np.testing.assert_allclose(got, [truth], atol=1e-11)


def test_best_of_n_lies_between_chance_and_a_perfect_verifier():
    rng = np.random.default_rng(1)
    correct = rng.random((30, 12)) < 0.4
    for k in (1, 3, 12):
        perfect = best_of_at_k(correct.astype(float), correct, k)
        np.testing.assert_allclose(perfect, pass_at_k(correct, k), atol=1e-11)
        same = best_of_at_k(np.ones((30, 12)), correct, k)
        np.testing.assert_allclose(same, correct.mean(1), atol=1e-11)


def stop_by_hand(answers, right, k, stops):
    """(score, draws of each sample) over all orders; stops(order, t) says whether t samples do."""
    score, draws = 0.0, np.zeros(len(answers))
    for order in permutations(range(len(answers))):
        t = next((t for t in range(1, k + 1) if stops(order[:t])), k)
        draws[list(order[:t])] += 1
        voters = [answers[i] for i in order[:t] if answers[i] >= 0]
        first = max(voters, key=lambda a: (voters.count(a), -voters.index(a)), default=None)
        score += first == right
    orders = factorial(len(answers))
    return score / orders, draws / orders


@pytest.mark.parametrize("threshold", [0.8, 0.9])
@given(answers=st.lists(st.integers(-1, 2), min_size=2, max_size=5), data=st.data())
@settings(deadline=None, max_examples=40)
def test_the_beta_rule_against_all_orders(threshold, answers, data):
    k = data.draw(st.integers(1, len(answers)))

    def stops(order):
        votes = [v for _, v in Counter(answers[i] for i in order if answers[i] >= 0).most_common()]
        first, second = (*votes, 0, 0)[:2]
        return scipy.stats.beta.sf(0.5, first + 1, second + 1) >= threshold

    codes = np.array([answers])
    got = stop_early(codes, codes == 1, k, beta_rule(threshold))
    score, draws = stop_by_hand(answers, 1, k, stops)
    np.testing.assert_allclose(got.scores, [score], atol=1e-11)
    np.testing.assert_allclose(got.drawn, [draws], atol=1e-11)


@given(answers=st.lists(st.integers(-1, 2), min_size=2, max_size=5), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_unanimous_window_against_all_orders(answers, data):
    k, window = data.draw(st.integers(1, len(answers))), data.draw(st.integers(1, 3))

    def stops(order):
        inside = {answers[i] for i in order[-window:]}
        return len(order) % window == 0 and len(inside) == 1 and min(inside) >= 0

    codes = np.array([answers])
    got = stop_early(codes, codes == 1, k, unanimous_rule(window))
    score, draws = stop_by_hand(answers, 1, k, stops)
    np.testing.assert_allclose(got.scores, [score], atol=1e-11)
    np.testing.assert_allclose(got.drawn, [draws], atol=1e-11)


# A model of five texts: (answer, probability). The most probable answer is 0, with 0.30 + 0.26.
TEXTS = [(0, 0.30), (0, 0.26), (1, 0.24), (2, 0.12), (-1, 0.08)]


@given(pool=st.lists(st.sampled_from(range(5)), min_size=1, max_size=5), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_certain_rule_against_all_orders(pool, data):
    k = data.draw(st.integers(1, len(pool)))
    answers = [TEXTS[text][0] for text in pool]

    def mass(order):
        """Answers by the probability of their distinct texts, and what is unseen."""
        seen = {pool[i] for i in order}
        sums = {a: sum(TEXTS[t][1] for t in seen if TEXTS[t][0] == a) for a in (0, 1, 2)}
        ranked = sorted(sums, key=lambda a: -sums[a])
        return ranked, [sums[a] for a in ranked], 1 - sum(TEXTS[t][1] for t in seen)

    score, draws = 0.0, np.zeros(len(pool))
    orders = list(permutations(range(len(pool))))
    for order in orders:
        for t in range(1, k + 1):
            ranked, sums, unseen = mass(order[:t])
            if sums[0] > sums[1] + unseen + 1e-9:
                score += ranked[0] == 0
                assert ranked[0] == 0  # what it is certain of is so
                break
        else:
            score += share_of_right([answers[i] for i in order[:k]], [1] * k, 0)
        draws[list(order[:t])] += 1
    codes = np.array([answers])
    logprob = np.log([[TEXTS[text][1] for text in pool]])
    rule = certain_rule(np.array([pool]) * 10**12, logprob)  # any integers name texts
    got = stop_early(codes, codes == 0, k, rule)
    np.testing.assert_allclose(got.scores, [score / len(orders)], atol=1e-11)
    np.testing.assert_allclose(got.drawn, [draws / len(orders)], atol=1e-11)


def test_what_is_unseen_may_be_the_runner_up_s():
    """0.45 beats the 0.15 that are unseen, and not those with the runner-up's 0.4."""
    texts, logprob = np.array([[0, 1, 0]]), np.log([[0.45, 0.4, 0.45]])
    got = stop_early(texts, texts == 0, 3, certain_rule(texts, logprob))
    assert got.drawn.tolist() == [[1, 1, 1]] and got.scores.tolist() == [1]


def test_sampled_orders_are_seeded_and_near_the_truth():
    rng = np.random.default_rng(2)
    answers = rng.integers(-1, 3, size=(3, 6))
    exact = stop_early(answers, answers == 1, 5, beta_rule(0.85))  # 720 orders of each
    drawn = stop_early(answers, answers == 1, 5, beta_rule(0.85), limit=1200)  # 400
    assert (drawn.scores != exact.scores).any()
    again = stop_early(answers, answers == 1, 5, beta_rule(0.85), limit=1200)
    assert (drawn.scores == again.scores).all() and (drawn.drawn == again.drawn).all()
    for a, b in zip(drawn, exact, strict=True):
        assert np.abs(a - b).max() < 5 * 0.5 / np.sqrt(400)


def test_thousands_of_samples_take_fewer_orders(monkeypatch):
    answers = np.random.default_rng(4).integers(0, 3, size=(1, 40))
    many = stop_early(answers, answers == 1, 9, beta_rule(0.85))
    drawn, orders = [], estimators._orders
    monkeypatch.setattr(
        estimators, "_orders", lambda n, limit, seed: drawn.append(limit) or orders(n, limit, seed)
    )
    monkeypatch.setattr(estimators, "PLACES", 40 * 900)
    few = stop_early(answers, answers == 1, 9, beta_rule(0.85))
    assert drawn == [900]
    assert abs(few.scores - many.scores).max() < 5 * 0.5 / np.sqrt(900)
    monkeypatch.setattr(estimators, "PLACES", 40)
    stop_early(answers, answers == 1, 9, beta_rule(0.85))
    assert drawn == [900, 100]


def test_blocks_of_problems_do_not_mix(monkeypatch):
    rng = np.random.default_rng(3)
    answers, texts = rng.integers(-1, 4, size=(9, 5)), rng.integers(0, 3, size=(9, 5))
    logprob = np.log(rng.random((9, 5)) / 3)
    rules = [beta_rule(0.8), unanimous_rule(2), certain_rule(texts, logprob)]
    whole = [stop_early(answers, answers == 1, 4, rule) for rule in rules]
    monkeypatch.setattr("ponder.inference.estimators.CHUNK", 1)
    for rule, expected in zip(rules, whole, strict=True):
        for a, b in zip(stop_early(answers, answers == 1, 4, rule), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_leaders_of_every_prefix():
    leader, votes, second = leaders(np.array([[-1, 3, 1, 1, -1, 3, 3]]))
    assert leader.tolist() == [[-1, 3, 3, 1, 1, 1, 3]]
    assert votes.tolist() == [[0, 1, 1, 2, 2, 2, 3]]
    assert second.tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    # A third answer that comes last does not stand in for the second.
    assert leaders(np.array([[0, 0, 0, 1, 1, 2]]))[2].tolist() == [[0, 0, 0, 1, 2, 2]]


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range_is_named(k):
    correct = np.ones((2, 3), dtype=bool)
    for estimate in (
        lambda: pass_at_k(correct, k),
        lambda: maj_at_k(correct + 0, correct, k),
        lambda: best_of_at_k(correct + 0.0, correct, k),
        lambda: weighted_vote_at_k(correct + 0, correct, correct + 0.0, k),
        lambda: stop_early(correct + 0, correct, k, beta_rule(0.95)),
    ):
        with pytest.raises(ValueError, match=f"k is {k}; .* from 1 to 3"):
            estimate()


def test_preference_is_within_problems():
    """Values that know how hard a problem is, and nothing of its samples, are worth a coin."""
    correct = np.array([[True, True, True, False], [True, False, False, False], [False] * 4])
    hard = np.repeat([[0.9], [0.2], [0.1]], 4, axis=1)
    assert preference(hard, correct) == (0.5, 6, 2)
    assert preference(hard + 0.05 * correct, correct) == (1, 6, 2)
    one = np.array([[0.1, 0.5, 0.9, 0.5], [0.5, 0.6, 0.4, 0.5], [1, 2, 3, 4]])
    assert preference(one, correct).share == (0 + 0.5 + 1 + 0 + 0.5 + 1) / 6
    assert np.isnan(preference(one[2:], correct[2:]).share)

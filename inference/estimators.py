"""What a strategy would have scored on each problem, estimated from N stored samples of it.

Shapes: P problems, N samples of each. `answers` (P, N) int are equal where two answers are equal,
negative where a sample gives none; `correct` (P, N) bool. A sample without an answer is drawn and
paid for, but does not vote. Where answers tie, each is as likely to be given; that is what taking
the earliest comes to on average over the orders in which samples arrive.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations, permutations
from math import comb, factorial
from typing import NamedTuple

import numpy as np
from scipy.special import betainc, gammaln, xlog1py, xlogy

CHUNK = 1 << 16  # elements of a temporary array, so that it stays in the cache
SUBSETS = 2000
# Orders of all problems together: their chance moves a mean over problems by less than 0.0025 (one
# standard deviation, at worst), where 500 problems have an interval of ten times that.
ORDERS = 50_000
PLACES = 1 << 23  # of samples in all orders of a problem, so that thousands of samples fit


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """The chance that k of a problem's N samples, drawn without replacement, hold a right one.

    1 - C(N - c, k) / C(N, k), c of N samples right: unbiased, where "any of the first k" is noisy
    and 1 - (1 - c/N)^k is biased. Returns (P,) in [0, 1]. Raises ValueError unless 1 <= k <= N.
    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1.
    """
    n = _samples(correct, k)
    wrong = n - correct.sum(1)
    i = np.arange(k)
    return 1 - np.prod(np.maximum(wrong[:, None] - i, 0) / (n - i), axis=1)


def maj_at_k(answers: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """The accuracy of a majority vote of k samples: the exact mean over all C(N, k) subsets.

    Returns (P,) in [0, 1]; a subset in which nobody votes scores 0. Raises ValueError unless
    1 <= k <= N. Source: Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in
    Language Models"; the sum over subsets is `win_probability`.
    """
    _samples(correct, k)
    scores = np.zeros(len(answers))
    _, shares, counts = tallies(answers, correct)
    for p, i in zip(*np.nonzero(shares), strict=True):
        rest = np.delete(counts[p, :-1], i)
        others = tuple(sorted(rest[rest > 0].tolist()))
        chance = win_probability(int(counts[p, i]), others, int(counts[p, -1]), k)
        scores[p] += shares[p, i] * chance
    # Rounded: what is certain is 1 and not a few ulps less, which would lose ties to others.
    return scores.round(12)


@lru_cache(maxsize=1 << 16)
def win_probability(count: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """The chance that an answer wins the vote of k samples drawn without replacement.

    `count` of the N stored samples give it, others[j] give the j-th other answer, `silent` give
    none; a tie of t answers is won with chance 1/t.

    The numbers drawn of each answer are independent binomials, given that they add up to k. With
    w votes for the answer, those that can tie contribute the polynomial Σ_{i<w} b_i x^i + z b_w
    x^w, and 1/(1 + ties) = ∫ z^ties dz over [0, 1], by a Gauss rule that is exact for the degree.
    """
    n = count + sum(others) + silent
    rate = k / n
    total = 0.0
    for w in range(1, min(count, k) + 1):
        rest = k - w
        rivals = [c for c in others if c >= w]
        free = n - count - sum(rivals)  # cannot reach w votes, so they may be drawn at will
        ties = min(len(rivals), rest // w)
        z, weight = _gauss(ties // 2 + 1)
        ways = np.tile(_binomial(free, rate, rest), (len(z), 1))  # (nodes, drawn so far)
        for c in rivals:
            terms = _binomial(c, rate, w)
            drawn = ways * terms[0]
            for i in range(1, min(w, rest) + 1):
                drawn[:, i:] += (terms[i] * (z[:, None] if i == w else 1)) * ways[:, : rest + 1 - i]
            ways = drawn
        total += _binomial(count, rate, w)[w] * float(weight @ ways[:, rest])
    return total / _binomial(n, rate, k)[k]


@lru_cache
def _gauss(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in [0, 1] and weights of Gauss's rule."""
    x, weight = np.polynomial.legendre.leggauss(nodes)
    return (x + 1) / 2, weight / 2


@lru_cache(maxsize=1 << 12)
def _binomial(n: int, rate: float, most: int) -> np.ndarray:
    """The chances of 0 … most successes in n trials; in logarithms, as C(n, i) overflows."""
    i = np.arange(most + 1)
    left = np.maximum(n - i, 0)
    log = gammaln(n + 1) - gammaln(i + 1) - gammaln(left + 1)
    return np.where(i <= n, np.exp(log + xlogy(i, rate) + xlog1py(left, -rate)), 0.0)


class Preference(NamedTuple):
    """Of all pairs of a right and a wrong sample of one problem: how many, of how many problems,
    and the share in which the right one is valued higher, ties half; NaN where there are none."""

    share: float
    pairs: int
    problems: int


def preference(values: np.ndarray, correct: np.ndarray) -> Preference:
    """How well values (P, N) tell right samples (P, N) from wrong ones of the same problem: what
    choosing among samples rests on. (The Mann-Whitney statistic within problems: over all of them
    at once it would count telling easy problems from hard ones, too.)"""
    won = pairs = problems = 0
    for value, right in zip(values, correct, strict=True):
        difference = value[right][:, None] - value[~right]
        won += (difference > 0).sum() + (difference == 0).sum() / 2
        pairs, problems = pairs + difference.size, problems + bool(difference.size)
    return Preference(float(won / pairs) if pairs else np.nan, pairs, problems)


def weighted_vote_at_k(
    answers: np.ndarray,
    correct: np.ndarray,
    log_weights: np.ndarray,
    k: int,
    *,
    limit: int = SUBSETS,
    seed: int = 0,
) -> np.ndarray:
    """The accuracy of the answer with the largest sum of weights among k samples.

    log_weights (P, N) are natural logarithms, so that the probabilities of long texts do not
    vanish. The mean over all C(N, k) subsets where there are at most `limit`, else over that many
    drawn with `seed` (weights are real numbers, and no formula sums them). Returns (P,) in [0, 1].
    Raises ValueError unless 1 <= k <= N. Source: Wang et al. 2022, section 2 (weighted sums).
    """
    n = _samples(correct, k)
    chosen = _subsets(n, k, limit, seed)  # (S, N) bool
    numbers = chosen.astype(float)
    scores = np.zeros(len(answers))
    codes, shares, counts = tallies(answers, correct)
    for p, code in enumerate(codes):
        several = int(code.max(initial=-1)) + 1
        share = shares[p, :several]
        if not share.any() or (share.min() == 1 and not counts[p, -1]):
            scores[p] = share.any()
            continue
        gives = (code[:, None] == np.arange(several)).astype(float)  # (N, answers)
        logs = log_weights[p] - log_weights[p].max()
        if logs.min() > -600:
            sums = numbers @ (gives * np.exp(logs)[:, None])  # (S, answers)
        else:  # next to the best of all samples the weights of some subsets vanish
            logs = np.where(chosen & (code >= 0), logs, -np.inf)
            top = logs.max(1, keepdims=True)
            sums = np.exp(logs - np.where(np.isfinite(top), top, 0)) @ gives
        best = sums.max(1, keepdims=True)
        tied = (sums >= best * (1 - 1e-9)) & (best > 0)  # sums of equal weights differ in ulps
        scores[p] = (tied @ share / np.maximum(tied.sum(1), 1)).mean()
    return scores.round(12)


def best_of_at_k(values: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """The accuracy of the sample with the highest value among k: exact, over all subsets.

    The r-th best of N is the best of a subset with chance C(N - 1 - r, k - 1) / C(N, k). values
    (P, N), such as log-probabilities or a verifier's scores; among equal ones each is as likely.
    Returns (P,) in [0, 1]. Raises ValueError unless 1 <= k <= N. Source: the estimator of
    Nakano et al. 2021, "WebGPT", appendix I, without replacement.
    """
    n = _samples(correct, k)
    chance = np.array([comb(n - 1 - r, k - 1) / comb(n, k) for r in range(n)])
    scores = np.zeros(len(values))
    for p, (row, right) in enumerate(zip(values, correct, strict=True)):
        _, place, count = np.unique(-row, return_inverse=True, return_counts=True)
        share = np.bincount(place, weights=right) / count  # of each group of equal values
        scores[p] = chance @ share[np.sort(place)]
    return scores.round(12)


class Stopped(NamedTuple):
    """scores (P,) in [0, 1]; drawn (P, N): how often each stored sample is drawn, on average."""

    scores: np.ndarray
    drawn: np.ndarray


class Prefixes(NamedTuple):
    """R orders of problems' samples, cut at k, and the vote after each of their prefixes.

    answers (R, k); leader (R, k) the answer with the most votes, negative before the first; votes
    and second (R, k) its votes and the runner-up's; take(values) puts any (P, N) numbers of the
    samples into the same (R, k) order.
    """

    answers: np.ndarray
    leader: np.ndarray
    votes: np.ndarray
    second: np.ndarray
    take: Callable[[np.ndarray], np.ndarray]


# From the prefixes: how many samples are drawn, (R,) from 1 to k, and the answer, (R,).
Rule = Callable[[Prefixes], tuple[np.ndarray, np.ndarray]]


def stop_early(
    answers: np.ndarray,
    correct: np.ndarray,
    k: int,
    rule: Rule,
    *,
    limit: int = ORDERS,
    seed: int = 0,
) -> Stopped:
    """A rule that draws samples one by one, at most k, and may stop: its accuracy and its draws.

    The mean over all N! orders where P N! is at most `limit`, else over limit / P orders (fewer of
    thousands of samples, and 100 at least) drawn with `seed`. Raises ValueError unless 1 <= k <= N.
    """
    n = _samples(correct, k)
    each = min(limit // max(1, len(answers)), PLACES // n)
    orders = _orders(n, max(100, each), seed)  # (O, N)
    position = orders.argsort(1)  # (O, N): when sample i comes
    scores, drawn = np.zeros(len(answers)), np.zeros(answers.shape)
    step = max(1, CHUNK // orders.size)
    for start in range(0, len(answers), step):
        block = slice(start, min(start + step, len(answers)))
        codes, shares, _ = tallies(answers[block], correct[block])  # (B, N), (B, N + 1)

        def take(values: np.ndarray, block: slice = block) -> np.ndarray:
            return values[block][:, orders[:, :k]].reshape(-1, k)

        ordered = codes[:, orders[:, :k]].reshape(-1, k)  # (B * O, k)
        length, answer = rule(Prefixes(ordered, *leaders(ordered), take))
        won = shares[np.repeat(np.arange(len(codes)), len(orders)), answer]
        scores[block] = won.reshape(len(codes), -1).mean(1)
        length = length.reshape(len(codes), len(orders), 1)
        drawn[block] = (position < length).mean(1)
    return Stopped(scores.round(12), drawn)


def leaders(
    answers: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leader of every prefix, its votes and the runner-up's: three (R, k) arrays.

    answers (R, k) int below k or N, negative where there is none; weights (R, k) what each sample
    adds to its answer, by default 1. The leader changes when another answer has more.
    """
    width = int(answers.max(initial=0)) + 2
    row = np.arange(len(answers)) * width
    sums = np.zeros(row.size * width)  # of each answer, row by row; the last column is for none
    leader = np.full(len(answers), -1)
    top, second = np.zeros(len(answers)), np.zeros(len(answers))
    adds = None if weights is None else np.ascontiguousarray(weights.T)
    # A prefix's numbers lie side by side, which takes half of the time of a row's.
    found = [np.empty(answers.T.shape, dtype=t) for t in (np.int64, np.float64, np.float64)]
    for t, answer in enumerate(np.ascontiguousarray(answers.T)):
        votes = answer >= 0
        cell = row + np.where(votes, answer, width - 1)
        mine = sums[cell] + votes * (1.0 if adds is None else adds[t])
        sums[cell] = mine
        same = votes & (answer == leader)
        passes = votes & ~same & (mine > top)
        second = np.where(passes, top, np.where(votes & ~same, np.maximum(second, mine), second))
        top = np.where(passes | same, mine, top)
        leader = np.where(passes, answer, leader)
        for array, value in zip(found, (leader, top, second), strict=True):
            array[t] = value
    return found[0].T, found[1].T, found[2].T


def beta_rule(threshold: float) -> Rule:
    """Stop when the leader would beat the runner-up in the long run with chance `threshold`.

    The chance that a coin with v heads and u tails seen, its bias uniform beforehand, prefers
    heads: 1 - I_½(v + 1, u + 1). Source: Aggarwal et al. 2023, "Let's Sample Step by Step:
    Adaptive-Consistency for Efficient Reasoning and Coding with LLMs", the Beta criterion.
    """

    def rule(seen: Prefixes) -> tuple[np.ndarray, np.ndarray]:
        k = seen.answers.shape[1]
        votes = np.arange(k + 1)
        sure = betainc(votes[None] + 1, votes[:, None] + 1, 0.5) >= threshold  # [votes, second]
        return _first(sure[seen.votes.astype(int), seen.second.astype(int)], seen.leader)

    return rule


def unanimous_rule(window: int) -> Rule:
    """Draw windows of so many samples; stop after the first that agrees on one answer, which is
    put to the vote with all before it. Source: Li et al. 2024, "Escape Sky-high Cost:
    Early-stopping Self-Consistency for Multi-step Reasoning"."""

    def rule(seen: Prefixes) -> tuple[np.ndarray, np.ndarray]:
        rows, k = seen.answers.shape
        stop = np.zeros((rows, k), dtype=bool)
        for end in range(window, k + 1, window):
            inside = seen.answers[:, end - window : end]
            stop[:, end - 1] = (inside[:, :1] == inside).all(1) & (inside[:, 0] >= 0)
        return _first(stop, seen.leader)

    return rule


def certain_rule(texts: np.ndarray, logprob: np.ndarray) -> Rule:
    """Stop when the model's own probabilities prove which answer is its most probable one.

    Every distinct text that was seen adds its probability to its answer; when the leader's sum
    exceeds the runner-up's by more than all that is unseen, no further sample can change the
    mode. At k samples without such a proof the vote decides. texts (P, N) int, equal where the
    sampled texts are; logprob (P, N) natural, of the distribution that was sampled from. A model
    that spreads its probability over many texts is never certain, and pays for all k.
    """

    codes = np.array([np.unique(row, return_inverse=True)[1] for row in texts])  # 0 … N - 1
    probability = np.exp(logprob)

    def rule(seen: Prefixes) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(len(seen.answers))
        text, mass = seen.take(codes), seen.take(probability)
        known = np.zeros((len(rows), texts.shape[1]), dtype=bool)
        for t in range(text.shape[1]):
            mass[:, t] *= ~known[rows, text[:, t]]
            known[rows, text[:, t]] = True
        leader, top, second = leaders(seen.answers, mass)
        unseen = 1 - np.cumsum(mass, axis=1)
        stop = top - second > np.maximum(unseen, 0) + 1e-9
        length, answer = _first(stop, leader)
        voted = seen.leader[:, -1]
        return length, np.where(stop.any(1), answer, voted)

    return rule


def _first(stop: np.ndarray, leader: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The length of the first prefix that stops, else of the whole, and its leader."""
    last = np.where(stop.any(1), stop.argmax(1), stop.shape[1] - 1)
    return last + 1, np.take_along_axis(leader, last[:, None], 1)[:, 0]


def tallies(answers: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each problem's answers numbered 0, 1, … (P, N), negative for none; then for each number the
    share of its samples that is right (1 or 0, unless the verifier looks at more) and how many
    they are, (P, N + 1), where the last column is for no answer: never right."""
    rows, n = answers.shape
    order = answers.argsort(1, kind="stable")
    ranked = np.take_along_axis(answers, order, 1)
    first = ranked >= 0
    first[:, 1:] &= ranked[:, 1:] != ranked[:, :-1]
    codes = np.empty((rows, n), dtype=np.int64)
    np.put_along_axis(codes, order, np.where(ranked >= 0, first.cumsum(1) - 1, -1), 1)
    cell = (np.arange(rows)[:, None] * (n + 1) + np.where(codes < 0, n, codes)).ravel()
    counts = np.bincount(cell, minlength=rows * (n + 1)).reshape(rows, n + 1)
    right = np.bincount(cell, weights=(correct & (codes >= 0)).ravel(), minlength=counts.size)
    return codes, right.reshape(counts.shape) / np.maximum(counts, 1), counts


def _samples(correct: np.ndarray, k: int) -> int:
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; with {n} samples of each problem it must be from 1 to {n}")
    return n


def _subsets(n: int, k: int, limit: int, seed: int) -> np.ndarray:
    """(S, n) bool: all subsets of size k, or `limit` random ones."""
    if comb(n, k) <= limit:
        members = np.array(list(combinations(range(n), k)))
    else:
        draws = np.random.default_rng(seed).random((limit, n))
        members = draws.argpartition(k - 1, axis=1)[:, :k]
    chosen = np.zeros((len(members), n), dtype=bool)
    np.put_along_axis(chosen, members, True, axis=1)
    return chosen


def _orders(n: int, limit: int, seed: int) -> np.ndarray:
    """(O, n): all orders of n samples, or `limit` random ones."""
    if n <= 12 and factorial(n) <= limit:
        return np.array(list(permutations(range(n))))
    return np.random.default_rng(seed).random((limit, n)).argsort(1)

"""Estimates from n stored samples of each problem, and how far to trust them.

Shapes: P problems, N samples of each. The problem is the unit that is resampled: samples of one
problem are not independent evidence about the next.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 24  # elements of a temporary array, so that memory stays in the tens of megabytes


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """The chance that k of a problem's N samples, drawn without replacement, hold a right one.

    1 - C(N - c, k) / C(N, k), c of N samples right: unbiased, where "any of the first k" is noisy
    and 1 - (1 - c/N)^k is biased. correct (P, N) bool; returns (P,) in [0, 1]. Raises ValueError
    unless 1 <= k <= N. Source: Chen et al. 2021, "Evaluating Large Language Models Trained on
    Code", section 2.1.
    """
    n = _samples(correct, k)
    wrong = n - correct.sum(1)
    i = np.arange(k)
    return 1 - np.prod(np.maximum(wrong[:, None] - i, 0) / (n - i), axis=1)


def maj_at_k(
    answers: np.ndarray, correct: np.ndarray, k: int, *, subsets: int = 2000, seed: int = 0
) -> np.ndarray:
    """The accuracy of a majority vote of k samples, averaged over subsets of the N stored ones.

    Over all C(N, k) subsets where there are at most `subsets`, else over that many drawn with
    `seed`. Ties go to the answer that was given first; a sample without an answer does not vote,
    and where nobody votes the score is 0. answers (P, N) int, equal where the answers are equal,
    negative where there is none; correct (P, N) bool; returns (P,) in [0, 1]. Raises ValueError
    unless 1 <= k <= N. Source: Wang et al. 2022, "Self-Consistency Improves Chain of Thought
    Reasoning in Language Models".
    """
    n = _samples(correct, k)
    if k == 1:
        return ((answers >= 0) & correct).mean(1)
    chosen = _subsets(n, k, subsets, seed)  # (S, k), each row ascending
    if len(answers) and answers.max() < np.iinfo(np.int16).max:
        answers = answers.astype(np.int16)  # a quarter of the traffic
    scores = np.empty(len(answers))
    step = max(1, CHUNK // chosen.size)
    for start in range(0, len(answers), step):
        block = slice(start, start + step)
        winner = vote(answers[block][:, chosen])
        right = np.take_along_axis(correct[block][:, chosen], winner[..., None], axis=-1)[..., 0]
        scores[block] = (right & (winner >= 0)).mean(1)
    return scores


def vote(answers: np.ndarray) -> np.ndarray:
    """The position along the last axis of the first sample with the most common answer.

    answers (..., k) int, negative where there is none; returns (...), -1 where nobody votes.
    """
    counts = np.zeros(answers.shape, dtype=np.int16)
    for j in range(answers.shape[-1]):
        counts += answers == answers[..., j : j + 1]
    counts[answers < 0] = 0
    winner = counts.argmax(-1)  # the first of equal counts: ties go to the earliest sample
    return np.where(counts.max(-1) > 0, winner, -1)


def _samples(correct: np.ndarray, k: int) -> int:
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; with {n} samples of each problem it must be from 1 to {n}")
    return n


def _subsets(n: int, k: int, limit: int, seed: int) -> np.ndarray:
    if comb(n, k) <= limit:
        return np.array(list(combinations(range(n), k)))
    draws = np.random.default_rng(seed).random((limit, n))
    return np.sort(draws.argpartition(k - 1, axis=1)[:, :k], axis=1)


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def bootstrap(
    scores: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of the scores and its percentile bootstrap interval over problems.

    scores (P,). Where all scores are equal the interval has no width: the bootstrap cannot see
    past its sample. Raises ValueError for no scores. Source: Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 13.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores have shape {scores.shape}; an interval needs (P,), P at least 1")
    rng = np.random.default_rng(seed)
    # A few distinct values (0 and 1 most often): how many of each a resample holds is all that
    # matters, and one multinomial draw gives it; 500 binary scores take 2 ms instead of 60.
    values, counts = np.unique(scores, return_counts=True)
    if len(values) < len(scores) // 4:
        means = rng.multinomial(len(scores), counts / len(scores), resamples) @ values
        means = means / len(scores)
    else:
        means = np.empty(resamples)
        step = max(1, CHUNK // len(scores))
        for start in range(0, resamples, step):
            size = (min(step, resamples - start), len(scores))
            means[start : start + step] = scores[rng.integers(len(scores), size=size)].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(scores.mean()), float(low), float(high))


def paired_difference(
    a: np.ndarray, b: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """How much better a is than b on the same problems, with its bootstrap interval.

    a, b (P,) scores of the same problems in the same order. Pairing removes the spread between
    easy and hard problems, so it sees differences that two separate intervals cannot.
    """
    if a.shape != b.shape:
        raise ValueError(f"scores of shapes {a.shape} and {b.shape} do not pair up")
    return bootstrap(a - b, level=level, resamples=resamples, seed=seed)


def pareto(
    cost: Sequence[float] | np.ndarray, value: Sequence[float] | np.ndarray, *, slack: float = 0.0
) -> np.ndarray:
    """Which points no other one beats: by more value at no more cost, or less cost at no less
    value. A cost that is higher by the share `slack` still counts as no more, where value is won.

    cost, value (M,); returns (M,) bool, False where either is NaN.
    """
    c, v = np.asarray(cost, dtype=np.float64), np.asarray(value, dtype=np.float64)
    richer = (c <= c[:, None] * (1 + slack)) & (v > v[:, None])
    cheaper = (c < c[:, None]) & (v >= v[:, None])
    return ~(richer | cheaper).any(1) & np.isfinite(c) & np.isfinite(v)


def guess_accuracy(answers: Sequence[str]) -> float:
    """The accuracy of always giving the most common answer, found with hindsight: what a model
    that knows nothing of the problem can reach at best."""
    if not answers:
        raise ValueError("no answers to guess from: there must be at least one problem")
    return Counter(answers).most_common(1)[0][1] / len(answers)

"""From scores of P problems to what may be said: intervals, differences, frontiers, laws.

The problem is the unit that is resampled: samples of one problem are not independent evidence
about the next.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.optimize import leastsq

TAILS = (1 - 0.95) / 2, (1 + 0.95) / 2
CHUNK = 1 << 18  # elements of a temporary array, so that it stays in the cache
KEPT = 1 << 24  # draws that are kept for the next scores, 128 MB at most


class Interval(NamedTuple):
    """A mean over problems, and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap(scores: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of the scores and its 95 % percentile bootstrap interval over problems.

    scores (P,). Where all scores are equal the interval has no width: the bootstrap cannot see
    past its sample. Raises ValueError for no scores. Source: Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 13.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores have shape {scores.shape}; an interval needs (P,), P at least 1")
    # A few distinct values (0 and 1 most often): how many of each a resample holds is all that
    # matters, and one multinomial draw gives it; 500 binary scores take 1 ms instead of 6.
    values, counts = np.unique(scores, return_counts=True)
    if len(values) < len(scores) // 4:
        shares, rng = counts / len(scores), np.random.default_rng(seed)
        means = rng.multinomial(len(scores), shares, resamples) @ values / len(scores)
    else:
        draws = _kept_draws if resamples * len(scores) <= KEPT else _draws
        parts = draws(len(scores), resamples, seed)
        means = np.concatenate([np.einsum("ij,j", part, scores) for part in parts]) / len(scores)
    low, high = np.quantile(means, TAILS)
    return Interval(float(scores.mean()), float(low), float(high))


def _draws(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample takes each of `count` problems: (n, count), n resamples at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // count)
    for start in range(0, resamples, step):
        n = min(step, resamples - start)
        drawn = rng.integers(count, size=(n, count)) + count * np.arange(n)[:, None]
        times = np.bincount(drawn.ravel(), minlength=n * count).reshape(n, count)
        yield times.astype(float)  # for products: at most half of the time that indexing takes


@lru_cache(maxsize=1)  # a report asks a hundred times for the same ones
def _kept_draws(count: int, resamples: int, seed: int) -> list[np.ndarray]:
    return list(_draws(count, resamples, seed))


def accuracy(scores: np.ndarray) -> Interval:
    """The mean of the scores (P,) in [0, 1] and its 95 % interval: the bootstrap's, and where all
    are equal, which the bootstrap cannot see past, the exact one of so many coins. Source: Clopper
    and Pearson 1934, "The Use of Confidence or Fiducial Limits"."""
    return _interval(scores, worst=0.0)


def paired_difference(a: np.ndarray, b: np.ndarray) -> Interval:
    """How much better a is than b on the same problems, with its interval, as of an `accuracy`.

    a, b (P,) scores in [0, 1] of the same problems in the same order. Pairing removes the spread
    between easy and hard problems, so it sees differences that two separate intervals cannot.
    ValueError where the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"scores of shapes {a.shape} and {b.shape} do not pair up")
    return _interval(a - b, worst=-1.0)


def _interval(scores: np.ndarray, worst: float) -> Interval:
    """scores (P,) from `worst` to 1."""
    if np.ptp(scores) > 1e-9:
        return bootstrap(scores)
    # So many problems may all be alike while this share of others goes unseen, at best or worst.
    mean, unseen = float(scores.mean()), 1 - TAILS[0] ** (1 / len(scores))
    return Interval(mean, mean - unseen * (mean - worst), mean + unseen * (1 - mean))


def pareto(
    cost: Sequence[float] | np.ndarray, value: Sequence[float] | np.ndarray, *, slack: float = 0.0
) -> np.ndarray:
    """Which points no other one beats: by more value at no more cost, or less cost at no less
    value. A cost that is higher by the share `slack` still counts as no more, where value is won
    by a point that itself stays.

    cost, value (M,); returns (M,) bool, False where either is NaN.
    """
    c, v = np.asarray(cost, dtype=np.float64), np.asarray(value, dtype=np.float64)
    richer = (c <= c[:, None]) & (v > v[:, None])
    cheaper = (c < c[:, None]) & (v >= v[:, None])
    best = ~(richer | cheaper).any(1) & np.isfinite(c) & np.isfinite(v)
    limit = np.inf  # from the dearest down: only what stays itself may take another's place
    for i in sorted(np.flatnonzero(best), key=lambda i: -c[i]):
        best[i] = c[i] == limit or c[i] * (1 + slack) < limit
        limit = c[i] if best[i] else limit
    return best


def guess_accuracy(answers: Sequence[str]) -> float:
    """The accuracy of always giving one answer, as `guess_coverage` has it: what knows nothing of
    the problem reaches. NaN where no answers are known, "" each; ValueError where there is no
    problem."""
    if not answers:
        raise ValueError("no answers to guess from: there must be at least one problem")
    return guess_coverage(answers, [1])[0] if any(answers) else float("nan")


def guess_coverage(answers: Sequence[str], sizes: Sequence[int]) -> list[float]:
    """The chance that one of k fixed answers is right, for each k: of the k most common ones of one
    half of the problems, on the other, which needs neither a model nor hindsight; the mean over
    twenty random halves."""
    rng = np.random.default_rng(0)
    ranks = []
    for _ in range(20):
        order = rng.permutation(len(answers)).tolist()
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        for known, asked in (halves, halves[::-1]):
            common = Counter(answers[i] for i in known if answers[i]).most_common()
            rank = {answer: place for place, (answer, _) in enumerate(common)}
            ranks += [rank.get(answers[i], np.inf) for i in asked]
    return [float(np.mean(np.array(ranks) < k)) for k in sizes]


class CoverageFit(NamedTuple):
    """Coverage at k samples is exp(a k^-b); the intervals are those of a and b over problems."""

    a: Interval
    b: Interval

    def __call__(self, k: np.ndarray | float) -> np.ndarray:
        return np.exp(self.a.mean * np.asarray(k, dtype=np.float64) ** -self.b.mean)


def fit_coverage(
    k: Sequence[int] | np.ndarray,
    coverage: np.ndarray,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> CoverageFit | None:
    """The law exp(a k^-b), a < 0, of how pass@k grows: least squares, its 95 % intervals
    bootstrapped over problems.

    k (K,) numbers of samples; coverage (P, K) pass@k of every problem. None where the mean is not
    strictly between 0 and 1 at two k or more, as such a curve tells nothing of a and b. ValueError
    for shapes that do not fit. Source: Brown et al. 2024, "Large Language Monkeys: Scaling
    Inference Compute with Repeated Sampling", section 3.
    """
    k, coverage = np.asarray(k, dtype=np.float64), np.asarray(coverage, dtype=np.float64)
    if coverage.ndim != 2 or coverage.shape[1] != len(k):
        raise ValueError(f"coverage has shape {coverage.shape}; for {len(k)} k it must be (P, K)")
    whole = _coverage_law(k, coverage.mean(0), None)
    if whole is None:
        return None
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(coverage), np.full(len(coverage), 1 / len(coverage)), resamples)
    fits = [_coverage_law(k, mean, whole) for mean in draws @ coverage / len(coverage)]
    laws = np.array([fit for fit in fits if fit is not None] or [whole])
    low, high = np.quantile(laws, TAILS, axis=0)
    a, b = (Interval(*map(float, three)) for three in zip(whole, low, high, strict=True))
    return CoverageFit(a, b)


def _coverage_law(
    k: np.ndarray, mean: np.ndarray, start: tuple[float, float] | None
) -> tuple[float, float] | None:
    inside = (mean > 0) & (mean < 1)
    if inside.sum() < 2:
        return None
    # A straight line in log k: log(-log C) = log(-a) - b log k. It starts the least squares in C.
    slope, height = np.polyfit(np.log(k[inside]), np.log(-np.log(mean[inside])), 1)
    first = (height, -slope) if start is None else (np.log(-start[0]), start[1])

    def residual(law: np.ndarray) -> np.ndarray:
        return np.exp(-np.exp(np.clip(law[0] - law[1] * np.log(k), -50, 50))) - mean

    # MINPACK's, which `least_squares` calls too, in four times the time. Full, it does not warn.
    log_a, b = leastsq(residual, first, full_output=True)[0]
    return -float(np.exp(log_a)), float(b)


class BudgetControl(NamedTuple):
    """How well thinking is governed by its budget: s1's three measures.

    control: the share of samples that kept to their budget. scaling: the mean slope of accuracy
    over all pairs of budgets, per thinking token. performance: the best accuracy.
    """

    control: float
    scaling: float
    performance: float


def budget_control(
    kept: Sequence[float] | np.ndarray,
    think_tokens: Sequence[float] | np.ndarray,
    accuracy: Sequence[float] | np.ndarray,
) -> BudgetControl:
    """Control, Scaling and Performance over B budgets.

    kept (B,): the share of samples within each budget; think_tokens (B,): the mean thinking that
    was really done, accuracy (B,) what it gave. Pairs with equally much thinking have no slope.
    scaling is NaN where there is no pair. Source: Muennighoff et al. 2025, "s1: Simple test-time
    scaling", section 3.2.
    """
    tokens, right = np.asarray(think_tokens, float), np.asarray(accuracy, float)
    i, j = np.triu_indices(len(tokens), 1)
    run = tokens[j] - tokens[i]
    slopes = (right[j] - right[i])[run != 0] / run[run != 0]
    scaling = float(slopes.mean()) if len(slopes) else float("nan")
    return BudgetControl(float(np.mean(kept)), scaling, float(right.max()))

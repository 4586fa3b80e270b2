"""The compute-optimal policy: which way to spend a given budget, chosen and scored apart.

M ways (a strategy with its samples and thinking budget) were run on the same P problems: scores
(M, P) in [0, 1] and costs (M, P) in any one unit. Whoever takes the best of M ways on the problems
that they are then scored on reports luck; here every problem is scored by a choice that was made
without it. Source of the idea of a choice by difficulty: Snell et al. 2024, "Scaling LLM Test-Time
Compute Optimally can be More Effective than Scaling Model Parameters", section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .stats import TAILS, Interval, accuracy

SPLITS = 20
RESAMPLES, RESAMPLED_SPLITS = 200, 5
CHUNK = 1 << 16  # ways times halvings at once, so that their arrays stay in the cache


@dataclass(frozen=True)
class Policy:
    """What a budget buys. accuracy and cost are of problems that had no part in the choice;
    `choice` is, for each bin, the way that all problems together would choose. The interval is
    over problems, choices made anew: what the same sweep of other problems would come to."""

    budget: float
    accuracy: Interval
    cost: float
    choice: tuple[int, ...]


def bins_of(level: np.ndarray, count: int = 4) -> np.ndarray:
    """The bin of each problem, 0 the easiest: at most `count`, of about equal size.

    level (P,): difficulty, known before anything is sampled. Equal levels share a bin. Returns
    (P,) int, every bin from 0 to the largest in use.
    """
    values, first = np.unique(np.sort(level), return_index=True)
    # A level goes where the middle of its problems lies among all of them.
    middle = (first + np.append(first[1:], len(level))) / 2 / max(1, len(level))
    place = np.minimum((middle * count).astype(int), count - 1)
    dense = np.unique(place, return_inverse=True)[1]
    return dense[np.searchsorted(values, level)]


def compute_optimal(
    scores: np.ndarray,
    costs: np.ndarray,
    budgets: Sequence[float],
    *,
    bins: np.ndarray | None = None,
    slack: float = 0.0,
) -> list[Policy]:
    """The policy for each budget: chosen on one half of the problems, scored on the other.

    Chosen is the most accurate way whose mean cost is at most the budget, or above it by no more
    than the share `slack`; among equally accurate ones the cheapest; where none fits, the cheapest
    of all (its cost then shows in the policy's own). Both halves take their turn, over twenty
    random halvings that keep the bins' shares. bins (P,) int: one choice for each, None for one
    choice overall; a bin without problems in a half gets that half's choice of all. The budget is a
    mean over the problems of a bin, in the unit of the costs.

    The interval is the percentile bootstrap of all of it: problems are resampled, and halved and
    chosen on again, all copies of a problem in the same half. Source: Jiang, Varma and Simon 2008,
    "Calculating Confidence Intervals for Prediction Error in Microarray Classification Using
    Resampling". Raises ValueError for fewer than two problems or shapes that differ.
    """
    if scores.shape != costs.shape or scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores have shape {scores.shape} and costs {costs.shape}; a policy needs the same "
            "(M, P) of both, P at least 2"
        )
    count = scores.shape[1]
    bins = np.zeros(count, dtype=int) if bins is None else bins
    rng = np.random.default_rng(0)
    times = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    times = np.concatenate([np.ones((SPLITS, count)), times.repeat(RESAMPLED_SPLITS, 0)])
    limits = [budget * (1 + slack) for budget in budgets]
    half, step = _halves(bins, len(times), rng), max(1, CHUNK // len(scores))
    parts = [
        _halved(scores, costs, bins, limits, times[i : i + step], half[i : i + step])
        for i in range(0, len(times), step)
    ]
    everyone = np.ones((1, count))
    ways = [_Ways.of(scores, costs, everyone, bins == group) for group in range(bins.max() + 1)]
    policies = []
    for budget, limit, right, spent in zip(
        budgets, limits, *np.concatenate(parts, axis=2), strict=True
    ):
        mean, cost = (float(x[:SPLITS].sum() / (SPLITS * count)) for x in (right, spent))
        drawn = right[SPLITS:].reshape(RESAMPLES, -1).mean(1) / count
        if np.ptp(drawn) > 1e-9:
            interval = Interval(mean, *np.quantile(drawn, TAILS).tolist())
        else:
            interval = accuracy(np.full(count, mean))
        choice = tuple(int(way.chosen(limit)[0]) for way in ways)
        policies.append(Policy(float(budget), interval, cost, choice))
    return policies


def _halves(bins: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, P) bool: as many random halves of the problems, and of those of each bin."""
    order = np.lexsort((rng.random((count, len(bins))), np.broadcast_to(bins, (count, len(bins)))))
    half = np.zeros(order.shape, dtype=bool)
    place = (np.arange(len(bins)) + rng.integers(2, size=(count, 1))) % 2 == 0
    np.put_along_axis(half, order, place, axis=1)
    return half


def _halved(
    scores: np.ndarray,
    costs: np.ndarray,
    bins: np.ndarray,
    limits: Sequence[float],
    times: np.ndarray,
    half: np.ndarray,
) -> np.ndarray:
    """(2, limits, n) the summed scores and the summed costs of n halvings, with problems so many
    times (n, P), each half's by the other's choice."""
    weights = np.concatenate([times * half, times * ~half])
    other = np.roll(np.arange(len(weights)), len(half))
    sums = np.zeros((2, len(limits), len(weights)))
    for group in range(bins.max() + 1):
        ways = _Ways.of(scores, costs, weights, bins == group)
        for i, limit in enumerate(limits):
            chosen = ways.chosen(limit)
            sums[:, i] += ways.scores[other, chosen], ways.costs[other, chosen]
    return sums.reshape(2, len(limits), 2, -1).sum(2)


@dataclass(frozen=True)
class _Ways:
    """M ways on the problems of a bin, for each of R rows of weights."""

    scores: np.ndarray  # (R, M), summed over the bin's problems
    costs: np.ndarray
    order: np.ndarray  # (R, M) the ways by their mean cost
    ascending: np.ndarray  # (R, M) these costs
    best: np.ndarray  # (R, M) up to each place, that of the most accurate

    @classmethod
    def of(
        cls, scores: np.ndarray, costs: np.ndarray, weights: np.ndarray, inside: np.ndarray
    ) -> "_Ways":
        some = weights[:, inside]
        right, spent = some @ scores[:, inside].T, some @ costs[:, inside].T
        size = np.maximum(some.sum(1, keepdims=True), 1)
        mean, cost = right / size, spent / size
        if (empty := ~some.any(1)).any():  # then as of all problems
            size = np.maximum(weights[empty].sum(1, keepdims=True), 1)
            mean[empty], cost[empty] = (weights[empty] @ x.T / size for x in (scores, costs))
        order = cost.argsort(axis=1, kind="stable")
        mean = np.take_along_axis(mean, order, 1).round(12)
        most = np.maximum.accumulate(mean, 1)
        first = np.ones(most.shape, dtype=bool)  # where the most accurate so far is a new one
        first[:, 1:] = most[:, 1:] > most[:, :-1]
        best = np.maximum.accumulate(first * np.arange(most.shape[1]), 1)
        return cls(right, spent, order, np.take_along_axis(cost, order, 1), best)

    def chosen(self, budget: float) -> np.ndarray:
        """(R,) the way for a budget."""
        fits = (self.ascending <= budget).sum(1, keepdims=True)
        place = np.take_along_axis(self.best, np.maximum(fits - 1, 0), 1)
        return np.take_along_axis(self.order, place, 1)[:, 0]

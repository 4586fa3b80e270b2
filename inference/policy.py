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

from .stats import Interval, accuracy

SPLITS = 20


@dataclass(frozen=True)
class Policy:
    """What a budget buys. accuracy and cost are of problems that had no part in the choice;
    `choice` is, for each bin, the way that all problems together would choose. The interval is over
    problems, choices being what they are: among ways that are nearly equal it is too narrow."""

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


def choose(
    scores: np.ndarray, costs: np.ndarray, bins: np.ndarray, count: int, budget: float
) -> tuple[int, ...]:
    """For each of `count` bins the most accurate way whose mean cost there is at most the budget.

    Among equally accurate ones the cheapest; where none fits, the cheapest of all (its cost then
    shows in the policy's own). A bin without problems gets the choice of all problems.
    """
    chosen = []
    for group in range(count):
        inside = bins == group
        if not inside.any():
            inside[:] = True
        right, cost = scores[:, inside].mean(1).round(12), costs[:, inside].mean(1)
        fits = cost <= budget
        if not fits.any():
            chosen.append(int(cost.argmin()))
            continue
        best = np.flatnonzero(fits & (right == right[fits].max()))
        chosen.append(int(best[cost[best].argmin()]))
    return tuple(chosen)


def compute_optimal(
    scores: np.ndarray,
    costs: np.ndarray,
    budgets: Sequence[float],
    *,
    bins: np.ndarray | None = None,
) -> list[Policy]:
    """The policy for each budget: chosen on one half of the problems, scored on the other.

    Both halves take their turn, over twenty random halvings that keep the bins' shares; a
    problem's score is the mean over them. bins (P,) int: one choice for each, None for one choice
    overall. The budget is a mean over the problems of a bin, in the unit of the costs. Raises
    ValueError for fewer than two problems or shapes that differ.
    """
    if scores.shape != costs.shape or scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores have shape {scores.shape} and costs {costs.shape}; a policy needs the same "
            "(M, P) of both, P at least 2"
        )
    count = scores.shape[1]
    bins = np.zeros(count, dtype=int) if bins is None else bins
    rng = np.random.default_rng(0)
    halves = []
    for _ in range(SPLITS):
        order = np.lexsort((rng.random(count), bins))  # shuffled within each bin
        half = np.zeros(count, dtype=bool)
        half[order[rng.integers(2) :: 2]] = True
        halves += [half, ~half]
    everyone, groups = np.arange(count), int(bins.max()) + 1
    policies = []
    for budget in budgets:
        score, cost = np.zeros(count), np.zeros(count)
        for half in halves:
            chosen = choose(scores[:, half], costs[:, half], bins[half], groups, budget)
            choice = np.array(chosen)[bins]
            score[~half] += scores[choice, everyone][~half]
            cost[~half] += costs[choice, everyone][~half]
        policies.append(
            Policy(
                budget=float(budget),
                accuracy=accuracy(score / SPLITS),
                cost=float(cost.mean() / SPLITS),
                choice=choose(scores, costs, bins, groups, budget),
            )
        )
    return policies

"""A sweep's results sorted for figures and tables: lines along budgets and along samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .drawing import shades
from .evaluation import Result
from .page import budget_order, duration, human, spread
from .store import Pool, Store, without_extend

# What accuracy is drawn against: the axis, a row's cost, how a tick reads.
UNITS: dict[str, tuple[str, Callable[[Result], float], Callable[[float], str]]] = {
    "FLOPs": ("FLOPs per problem", lambda r: r.flops_per_problem, human),
    "Tokens": ("Tokens per problem", lambda r: r.tokens_per_problem, human),
    "Seconds": (
        "Engine time per problem",
        lambda r: r.seconds_per_problem,
        duration,
    ),
}


@dataclass(frozen=True)
class Curves:
    """The results sorted for drawing: one sampling setting, the budgets, the sizes of the vote."""

    rows: list[Result]  # all of this sampling setting, every strategy, search and extension
    greedy: list[Result]  # one for each budget
    votes: dict[int, list[Result]]  # by number of samples; 1 is a single sample
    oracle: dict[int, list[Result]]  # pass@k
    budgets: list[int | None]
    guess: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Curves":
        hot = [without_extend(r.params) for r in results if r.temperature > 0]
        params = max(dict.fromkeys(hot), key=hot.count) if hot else ""

        shown = [r for r in results if r.temperature == 0 or without_extend(r.params) == params]

        def rows(strategy: str) -> list[Result]:
            chosen = [r for r in shown if r.strategy == strategy and not r.setting]
            return sorted(chosen, key=lambda r: (r.samples, budget_order(r.think_budget)))

        votes: dict[int, list[Result]] = {}
        for r in rows("sampling") + rows("self-consistency"):
            votes.setdefault(r.samples, []).append(r)
        oracle: dict[int, list[Result]] = {}
        for r in rows("sampling") + rows("pass@k"):
            oracle.setdefault(r.samples, []).append(r)
        return cls(
            rows=shown,
            greedy=rows("greedy"),
            votes=votes,
            oracle=oracle,
            budgets=sorted({r.think_budget for r in results}, key=budget_order),
            guess=results[0].guess_accuracy,
        )

    @property
    def units(self) -> list[str]:
        """The units in which every row has a cost above zero, as a logarithmic axis needs."""
        costs = {unit: [cost(r) for r in self.rows] for unit, (_, cost, _) in UNITS.items()}
        return [unit for unit, c in costs.items() if all(0 < x < math.inf for x in c)]

    @property
    def by_samples(self) -> bool:
        """Whether a line is one of samples, as there is one budget alone."""
        return len(self.budgets) == 1 and len(self.votes) > 1

    @property
    def along(self) -> str:
        """What grows along a line."""
        grows = "number of samples grows" if self.by_samples else "thinking budget grows"
        figures = "that number" if self.by_samples else "its tokens"
        return f"the {grows}; the small figures are {figures}"

    @property
    def shown_votes(self) -> dict[int, str]:
        """At most four sizes of the vote, the ends among them, each with its colour."""
        return shades(spread(list(self.votes), 4), "vote")

    def pool(self, store: Store, budget: int | None | Literal["any"] = "any") -> Pool | None:
        """All samples behind the votes at a budget (or at any); None where each problem has one."""
        rows = [r for k, rows in self.votes.items() if k > 1 for r in rows]
        rows += [r for k, rows in self.oracle.items() if k > 1 for r in rows]
        for r in rows:
            if budget in ("any", r.think_budget):
                return store.pool(budget=r.think_budget, params=r.params, seed=r.seed)
        return None

    def last_pool(self, store: Store) -> Pool | None:
        """The pool at the greatest budget, that of `gain`; None where there is no vote."""
        gain = self.gain()
        return gain and self.pool(store, gain[0].think_budget)

    def gain(self) -> tuple[Result, Result] | None:
        """The largest vote and the single sample at the greatest budget: one that is known before
        the votes are, as the best of several would be told with luck in it."""
        if len(self.votes) < 2 or 1 not in self.votes:
            return None
        return self.votes[max(self.votes)][-1], self.votes[1][-1]

"""What a report tells beyond its rows: coverage, the limits of votes, control, policy."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from . import estimators, stats
from .curves import UNITS, Curves
from .evaluation import SLACK, Result, paired_difference, unit_of
from .page import spread
from .policy import Policy, bins_of, compute_optimal
from .scores import latest, scores_of
from .store import Pool, Store
from .strategies import STRATEGIES, mean_log_probability


@dataclass(frozen=True)
class Findings:
    """All that a report tells beyond its rows; each part as the function of its name gives it."""

    curves: Curves
    choosing: list[dict[str, Any]]
    outcomes: dict[int | None, tuple[float, ...]]
    ways: "Ways | None"
    preference: dict[str, estimators.Preference]
    coverage: list[dict[str, Any]]
    control: list[dict[str, Any]]
    searches: list[dict[str, Any]]
    policy: "Policies | None"
    difficulty: list[dict[str, Any]]

    @classmethod
    def of(cls, results: Sequence[Result], store: Store) -> "Findings":
        curves = Curves.of(results)
        pool = curves.pool(store)
        return cls(
            curves=curves,
            choosing=choosing(curves),
            outcomes=outcome_shares(curves, store) if pool else {},
            ways=ways(curves, store) if pool else None,
            preference=preferences(curves, store) if pool else {},
            coverage=coverage_rows(curves, store) if pool else [],
            control=control_rows(curves, store),
            searches=search_rows(curves, store) if pool else [],
            policy=policies(results, store),
            difficulty=difficulty_tables(curves, store),
        )

    def json(self) -> str:
        """All that the page shows beyond its rows, as findings.json has it."""
        told = {
            "choosing": [
                row_of(r, drawn=r.drawn, tokens=r.tokens_per_problem, difference=row["better"])
                for row in self.choosing
                for r in [row["r"]]
            ],
            "against_greedy": [
                row_of(r, tokens=r.tokens_per_problem, difference=paired_difference(r, greedy))
                for greedy in self.curves.greedy
                for r in self.curves.rows
                if r.think_budget == greedy.think_budget and r is not greedy and not r.oracle
            ],
            "outcomes": [
                dict(think_budget=budget, most_common=mode, outvoted=outvoted, never=never)
                for budget, (mode, outvoted, never) in self.outcomes.items()
            ],
            "ways": self.ways and asdict(self.ways),
            "preference": self.preference,
            "coverage": self.coverage,
            "control": self.control,
            "searches": [
                row_of(row["r"], cost=row["cost"], best=row["best"])
                | dict(rivals={name: asdict(rival) for name, rival in row["rivals"].items()})
                for row in self.searches
            ],
            "policy": self.policy and self.policy.told(),
            "difficulty": self.difficulty,
        }
        return json_of(told)


def json_of(found: Mapping[str, Any]) -> str:
    """As text: an interval is {mean, low, high}, no limit and no value are null."""
    return json.dumps(_plain(found), indent=1) + "\n"


def row_of(r: Result, **more: Any) -> dict[str, Any]:
    """What names a row and how accurate it is, and what else is told of it."""
    names = "strategy samples think_budget temperature setting accuracy"
    return {name: getattr(r, name) for name in names.split()} | more


def _plain(value: Any) -> Any:
    """What JSON can say of it."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choosing(curves: Curves) -> list[dict[str, Any]]:
    """Every strategy with as many samples as there are, at the greatest budget; each with
    what it gains on the plain vote of the same problems."""
    gain = curves.gain()
    if gain is None:
        return []
    vote = gain[0]
    rows = [
        r
        for r in curves.rows
        if r.think_budget == vote.think_budget
        and not r.setting
        and (r.samples == vote.samples or r.strategy in ("greedy", "sampling"))
    ]
    return [dict(r=r, better=None if r is vote else paired_difference(r, vote)) for r in rows]


def outcome_shares(curves: Curves, store: Store) -> dict[int | None, tuple[float, ...]]:
    """For each budget, of all problems: the right answer is the most common one of the stored
    samples, it is among them, it is in none. A vote can reach the first share, a perfect verifier
    the first two together."""
    shares = {}
    for budget in curves.budgets:
        pool = curves.pool(store, budget)
        if pool is None:
            continue
        mode = estimators.maj_at_k(pool.answers, pool.correct, pool.samples).mean()
        found = pool.correct.any(1).mean()
        shares[budget] = (float(mode), float(found - mode), float(1 - found))
    return shares


@dataclass(frozen=True)
class Ways:
    """How many ways there are to be right, over the problems with two right samples or more: the
    right samples of a problem, and the different texts among them, at the mean. agreement: of all
    problems, those whose most common answer is the greedy one (NaN where there is no greedy one).

    Where one text alone is right, the most common answer is that of the most probable text, which
    is what greedy decoding looks for: a vote then only undoes what sampling spoilt. Source of what
    a vote is for: Wang et al. 2022, "Self-Consistency", section 2 (several paths to one answer).
    """

    budget: int | None
    right: float
    texts: float
    agreement: float


def ways(curves: Curves, store: Store) -> Ways | None:
    """The ways to be right at the greatest budget; None where no problem has two right samples."""
    pool = curves.last_pool(store)
    if pool is None:
        return None
    several = pool.correct.sum(1) > 1
    if not several.any():
        return None
    texts = [
        len(set(row[right].tolist()))
        for row, right in zip(pool.texts[several], pool.correct[several], strict=True)
    ]
    agreement = math.nan
    for r in curves.greedy:
        if r.think_budget == pool.budget:
            greedy = store.pool(budget=pool.budget, params=r.params, seed=r.seed)
            agreement = _agreement(pool, greedy)
    right = pool.correct[several].sum(1).mean()
    return Ways(pool.budget, float(right), float(np.mean(texts)), agreement)


def preferences(curves: Curves, store: Store) -> dict[str, estimators.Preference]:
    """How well a token's mean probability, and a verifier where one scored the samples, tell a
    problem's right samples from its wrong ones, at the greatest budget."""
    pool, verifier = curves.last_pool(store), latest(store)
    if pool is None:
        return {}
    values = {"probability": mean_log_probability(pool)}
    if verifier is not None and (scores := scores_of(store, pool, verifier)) is not None:
        values["verifier"] = scores.end if np.isfinite(scores.end).all() else scores.last
    return {
        name: estimators.preference(value, pool.correct)
        for name, value in values.items()
        if np.isfinite(value).all()
    }


def _agreement(pool: Pool, greedy: Pool) -> float:
    said = dict(zip(greedy.problems.tolist(), greedy.answers[:, 0].tolist(), strict=True))
    words = (*greedy.answer_texts, None)  # the code of no answer, -1, is the last
    agree = []
    for problem, answers in zip(pool.problems.tolist(), pool.answers, strict=True):
        if problem in said:
            codes, counts = np.unique(answers[answers >= 0], return_counts=True)
            leaders = [pool.answer_texts[c] for c in codes[counts == counts.max(initial=0)]]
            agree.append(words[said[problem]] in leaders)
    return float(np.mean(agree)) if agree else math.nan


def coverage_rows(curves: Curves, store: Store) -> list[dict[str, Any]]:
    """For at most four budgets: pass@k at the ends, the fit of exp(a k^-b) between them, and what k
    guesses cover."""
    rows, problems = [], store.problems()
    for budget in spread(curves.budgets, 4):
        pool = curves.pool(store, budget)
        if pool is None:
            continue
        sizes = sorted({1 << i for i in range(pool.samples.bit_length())} | {pool.samples})
        coverage = np.stack([estimators.pass_at_k(pool.correct, k) for k in sizes], axis=1)
        rows.append(
            dict(
                budget=budget,
                samples=pool.samples,
                one=float(coverage[:, 0].mean()),
                all=float(coverage[:, -1].mean()),
                k=sizes,
                coverage=coverage.mean(0).tolist(),
                guesses=stats.guess_coverage([problems[i].answer for i in pool.problems], sizes),
                fit=stats.fit_coverage(sizes, coverage),
            )
        )
    return rows


def control_rows(curves: Curves, store: Store) -> list[dict[str, Any]]:
    """How greedy decoding and single samples keep to their budgets, and what that buys."""
    rows = []
    for name, results in (("greedy", curves.greedy), ("one sample", curves.votes.get(1, []))):
        if len(results) < 2:
            continue
        kept, tokens = [], []
        for r in results:
            pool = store.pool(budget=r.think_budget, params=r.params, seed=r.seed)
            kept.append(store.kept_to(r.think_budget, r.params, r.seed))
            tokens.append(float(pool.think_tokens.mean()))
        measures = stats.budget_control(kept, tokens, [r.accuracy for r in results])
        rows.append(
            dict(
                name=name,
                measures=measures,
                tokens=[(r.think_budget, t) for r, t in zip(results, tokens, strict=True)],
            )
        )
    return rows


@dataclass(frozen=True)
class Rival:
    """As many independent samples as cost what a search does: how many, between two numbers by a
    draw (`dearer` where even one costs more, `fewer` where more than are stored would be needed),
    the accuracy of a strategy with them, and the search's own above it on the same problems (None
    where they share none)."""

    samples: float
    accuracy: float
    better: stats.Interval | None
    dearer: bool
    fewer: bool


# Strategies that draw all of their k samples.
RIVALS = (
    *("self-consistency", "probability-vote", "best-of-n"),
    *("verifier-best-of-n", "verifier-vote"),
)


def search_rows(curves: Curves, store: Store) -> list[dict[str, Any]]:
    """Every search and every extended thought beside independent samples that cost as much, at
    unlimited thinking: `r`, its `cost`, `rivals` by strategy, a greedy answer among them where it
    costs no more, and the `best` of these. Empty where no vote is there to compare."""
    shown = ("greedy", "sampling", "self-consistency")
    rows = [r for r in curves.rows if r.setting and not r.oracle]
    rows = [r for r in rows if not r.setting.startswith("extend=") or r.strategy in shown]
    plain = {
        r.strategy: r  # the one of the most samples comes last
        for r in sorted(curves.rows, key=lambda r: r.samples)
        if r.think_budget is None and not r.setting
    }
    rivals = {name: plain[name] for name in RIVALS if name in plain}
    if not rows or not rivals or "sampling" not in plain:
        return []
    # k samples cost the prompt once and k times a sample, which two rows of k tell apart.
    one, most = plain["sampling"], plain.get("self-consistency", next(iter(rivals.values())))
    cost = UNITS[unit_of(curves.rows)][1]
    prompt = cost(one) - (cost(most) - cost(one)) / (most.samples - 1)
    pool = store.pool(budget=None, params=one.params, seed=one.seed)
    verifier = latest(store)
    if verifier is not None:
        pool = replace(pool, scores=scores_of(store, pool, verifier))

    @functools.cache
    def scores_with(name: str, k: int) -> np.ndarray:
        return STRATEGIES[name if k > 1 else "sampling"].run(pool, k).scores

    def rival(r: Result, name: str) -> Rival:
        of = rivals[name]
        a_sample = (cost(of) - prompt) / of.samples
        wanted = (cost(r) - prompt) / a_sample if a_sample > 0 else math.inf
        k = round(min(max(1.0, wanted), pool.samples), 6)
        scores, more = scores_with(name, math.floor(k)), k % 1
        if more:  # one sample more for that share of the problems, by a draw: it costs the same
            scores = (1 - more) * scores + more * scores_with(name, math.ceil(k))
        both, theirs, ours = np.intersect1d(pool.problems, r.ids, return_indices=True)
        better = stats.paired_difference(r.scores[ours], scores[theirs]) if len(both) else None
        return Rival(
            samples=k,
            accuracy=float(scores[theirs if len(both) else slice(None)].mean()),
            better=better,
            dearer=wanted < 1 - SLACK,
            fewer=wanted > pool.samples,
        )

    greedy = next((r for r in curves.greedy if r.think_budget is None), None)
    found = []
    for r in rows:
        of_one = {name: rival(r, name) for name in rivals}
        if greedy is not None and cost(greedy) <= cost(r) * (1 + SLACK):
            better = paired_difference(r, greedy)
            of_one = {"greedy": Rival(1, greedy.accuracy, better, False, False), **of_one}
        best = max(of_one, key=lambda name: of_one[name].accuracy)
        found.append(dict(r=r, cost=cost(r), rivals=of_one, best=best))
    return found


@dataclass(frozen=True)
class Policies:
    """The compute-optimal policy along growing budgets, in `unit` (of curves.UNITS).

    overall: one choice for all problems; split: one for each of `bins` (their difficulties, as
    text), empty where problems do not differ. ways: what a choice's numbers stand for.
    """

    unit: str
    ways: Sequence[Result]
    overall: list[Policy]
    split: list[Policy]
    bins: list[str]

    @property
    def table(self) -> list[Policy]:
        """At most six budgets of the finer policy: those at which a choice changes, spread out."""
        policies = self.split or self.overall
        changes = [
            p
            for p, before in zip(policies, [None, *policies], strict=False)
            if before is None or p.choice != before.choice
        ]
        return spread(changes, 6)

    def told(self) -> dict[str, Any]:
        """All budgets, each choice as its rows, as findings.json has it."""

        def choices(policies: list[Policy]) -> list[dict[str, Any]]:
            ways = [row_of(r, model=r.model) for r in self.ways]
            return [vars(p) | dict(choice=[ways[way] for way in p.choice]) for p in policies]

        named = dict(unit=self.unit, bins=self.bins)
        return named | dict(overall=choices(self.overall), split=choices(self.split))

    @property
    def guess(self) -> float:
        """What one answer to all problems reaches."""
        return self.ways[0].guess_accuracy


def policies(results: Sequence[Result], store: Store) -> Policies | None:
    """The policy over all strategies, samples and budgets that compete; None where fewer than two
    do, or fewer than eight problems are there."""
    ways = [r for r in results if not r.oracle]
    ids = sorted(set.intersection(*(set(r.ids.tolist()) for r in ways))) if ways else []
    if len(ways) < 2 or len(ids) < 8:
        return None
    inside = [np.isin(r.ids, ids) for r in ways]
    unit = unit_of(ways)
    costs = np.stack(
        [
            (r.outcome.flops if unit == "FLOPs" else r.outcome.tokens)[m]
            for r, m in zip(ways, inside, strict=True)
        ]
    )
    scores = np.stack([r.scores[m] for r, m in zip(ways, inside, strict=True)])
    problems = store.problems()
    level = np.array([problems[i].difficulty for i in ids])
    bins = bins_of(level)
    names = [_span(level[bins == group]) for group in range(int(bins.max()) + 1)]
    several = len(names) > 1
    # Up to what the dearest bin needs for its best accuracy, beyond which more compute buys
    # nothing; the last budget leaves room for a half that is a little dearer.
    enough = []
    for group in range(len(names)):
        cost = costs[:, bins == group].mean(1)
        accuracy = scores[:, bins == group].mean(1).round(12)
        enough.append(cost[accuracy == accuracy.max()].min())
    least = costs.mean(1).min()
    if not least > 0:  # a server may say that nothing was used
        return None
    budgets = np.geomspace(least, 1.1 * max(enough), 10).tolist()
    return Policies(
        unit=unit,
        ways=ways,
        overall=compute_optimal(scores, costs, budgets, slack=SLACK),
        split=compute_optimal(scores, costs, budgets, bins=bins, slack=SLACK) if several else [],
        bins=names if several else ["all"],
    )


def _span(levels: np.ndarray) -> str:
    low, high = levels.min(), levels.max()
    return f"{low}" if low == high else f"{low}–{high}"


def difficulty_tables(curves: Curves, store: Store) -> list[dict[str, Any]]:
    """Accuracy by difficulty and budget, for greedy decoding and for the largest vote: for each a
    line of cells for some difficulties, a cell for each budget (None without a problem)."""
    difficulty = {i: p.difficulty for i, p in store.problems().items()}
    most = max(curves.votes, default=1)
    tables = []
    for samples, rows in ((1, curves.greedy), (most, curves.votes.get(most, []))):
        if not rows:
            continue
        rows = spread(rows, 9)
        levels = [np.array([difficulty[i] for i in r.ids]) for r in rows]
        known = np.unique(levels[0])
        lines = []
        for group in np.array_split(known, min(8, len(known))):
            inside = [np.isin(level, group) for level in levels]
            cells = [
                r.scores[m].mean() if m.any() else None for r, m in zip(rows, inside, strict=True)
            ]
            lines.append(dict(level=_span(group), problems=int(inside[0].sum()), cells=cells))
        budgets = [r.think_budget for r in rows]
        strategy = rows[0].strategy
        tables.append(dict(strategy=strategy, samples=samples, budgets=budgets, lines=lines))
    return tables

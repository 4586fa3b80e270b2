"""Every strategy on every setting of a store, and its searches: the rows of results.csv."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from ..models import GPTConfig
from . import stats
from .scores import latest, scores_of
from .search import SEARCHES
from .search_table import parse_search, searched
from .store import Setting, Store, parse_params
from .strategies import STRATEGIES, Outcome, spend

WHOLE = 0.9  # of the problems that the fullest row has: rows of fewer may be of the easy ones
SLACK = 0.02  # costs that differ by less count as equal: a few tokens more or less are chance


@dataclass(frozen=True)
class Result:
    """One row of results.csv; think_budget None is no limit, token counts are means per problem.

    samples is the most that may be drawn, or a search's size; `drawn` says how many were, on
    average. pruned_tokens are some of the sampled and forced ones, judge_flops_per_problem a
    part of flops_per_problem; setting is what else tells the row from others. Besides the columns
    it holds where the row came from (`params`, `seed`) and, by problem index (`ids`), the outcome,
    for pairing, for accuracy by difficulty and for policies.
    """

    task: str
    model: str
    strategy: str
    samples: int
    think_budget: int | None
    temperature: float
    problems: int
    accuracy: float
    ci_low: float
    ci_high: float
    prompt_tokens: float
    sampled_tokens: float
    forced_tokens: float
    flops_per_problem: float
    seconds_per_problem: float
    guess_accuracy: float
    pareto: bool
    judge_flops_per_problem: float
    pruned_tokens: float
    setting: str
    params: str
    seed: int
    oracle: bool
    ids: np.ndarray = field(repr=False, compare=False)
    outcome: Outcome = field(repr=False, compare=False)

    @property
    def scores(self) -> np.ndarray:
        return self.outcome.scores

    @property
    def drawn(self) -> float:
        return float(self.outcome.samples.mean())

    @property
    def tokens_per_problem(self) -> float:
        return self.prompt_tokens + self.sampled_tokens + self.forced_tokens


def unit_of(results: Sequence[Result]) -> Literal["FLOPs", "Tokens"]:
    """What the rows are compared by: FLOPs, or tokens where those of any row are unknown."""
    return "FLOPs" if all(0 < r.flops_per_problem < np.inf for r in results) else "Tokens"


def evaluate(
    store: Store,
    *,
    shape: GPTConfig | None = None,
    samples: Sequence[int] | None = None,
    strategies: Sequence[str] | None = None,
    seed: int | None = None,
    model: str | None = None,
) -> list[Result]:
    """Every strategy on every setting of the store, and its searches, with 95 % bootstrap
    intervals. A search gives its best line's answer, and as NAME-vote that of a vote of its
    finished lines, weighted by their values.

    Where a verifier scored the samples, the last one to do so has its strategies. shape: the
    model's configuration, for FLOPs. samples: the k of votes and of pass@k, by default
    the powers of two that are stored; a k that a setting cannot fill is left out. strategies:
    names, by default all. seed: needed where the store holds several. model: the name to
    print, by default that of the store's identity. Raises ValueError for an empty store, an
    unknown strategy, samples below 1, or several seeds.
    """
    settings = _settings(store, seed)
    verifier = latest(store)
    known = [*STRATEGIES, *(name + suffix for name in SEARCHES for suffix in ("", "-vote"))]
    unknown = [name for name in strategies or () if name not in known]
    if unknown:
        raise ValueError(f"unknown strategy {unknown[0]!r}; known are {', '.join(known)}")
    if samples is None:
        most = max(setting.samples for setting in settings)
        samples = [1 << i for i in range(most.bit_length())]
    if not samples or min(samples) < 1:
        raise ValueError(f"samples are {list(samples)}; each must be at least 1")
    answers = {i: problem.answer for i, problem in store.problems().items()}
    of = store.identity
    names = dict(task=str(of.get("task", "")), model=model or str(of.get("model", "")))
    results = []
    for setting in settings:
        pool = store.pool(budget=setting.budget, params=setting.params, seed=setting.seed)
        if not len(pool.problems):  # a sweep that was stopped in its first batches
            continue
        if verifier is not None:
            pool = replace(pool, scores=scores_of(store, pool, verifier))
        extend = f"{parse_params(setting.params).get('extend', 0):.0f}"
        for strategy in STRATEGIES.values():
            if strategies and strategy.name not in strategies:
                continue
            for k in strategy.sizes(pool, sorted(set(samples))):
                row: dict[str, Any] = dict(strategy=strategy.name, samples=k)
                row |= dict(think_budget=setting.budget)
                row |= dict(params=setting.params, seed=setting.seed, oracle=strategy.oracle)
                row |= dict(setting="" if extend == "0" else f"extend={extend}")
                outcome = spend(pool, strategy.run(pool, k), shape)
                results.append(_result(pool.problems, outcome, answers, **names, **row))
    for found in searched(store, settings[0].seed):
        name, lines, setting = parse_search(found.search)
        for suffix, scores in (("", found.best()), ("-vote", found.vote())):
            if name + suffix in (strategies or known) and (lines > 1 or not suffix):
                row = dict(strategy=name + suffix, samples=lines, think_budget=None)
                row |= dict(params=found.params, seed=found.seed, oracle=False, setting=setting)
                outcome = found.outcome(scores)
                results.append(_result(found.problems, outcome, answers, **names, **row))
    return mark_pareto(results)


def _result(
    ids: np.ndarray, outcome: Outcome, answers: dict[int, str], *, params: str, **row: Any
) -> Result:
    """A row of these problems: its accuracy, its mean costs, and what else is known of it."""
    accuracy, low, high = stats.accuracy(outcome.scores)
    return Result(
        **row,
        params=params,
        temperature=parse_params(params)["temperature"],
        problems=len(ids),
        accuracy=accuracy,
        ci_low=low,
        ci_high=high,
        prompt_tokens=float(outcome.prompt_tokens.mean()),
        sampled_tokens=float(outcome.sampled_tokens.mean()),
        forced_tokens=float(outcome.forced_tokens.mean()),
        flops_per_problem=float(outcome.flops.mean()),
        seconds_per_problem=float(outcome.seconds.mean()),
        guess_accuracy=_guess(tuple(answers[i] for i in ids)),
        pareto=False,
        pruned_tokens=float(outcome.pruned_tokens.mean()),
        judge_flops_per_problem=float(outcome.judge_flops.mean()),
        ids=ids,
        outcome=outcome,
    )


_guess = lru_cache(maxsize=64)(stats.guess_accuracy)  # most rows are of the same problems


def mark_pareto(results: Sequence[Result]) -> list[Result]:
    """The results with `pareto` set on those of the `frontier`."""
    flops = unit_of(results) == "FLOPs"
    best = frontier(results, lambda r: r.flops_per_problem if flops else r.tokens_per_problem)
    return [replace(r, pareto=any(r is b for b in best)) for r in results]


def frontier(results: Sequence[Result], cost: Callable[[Result], float]) -> list[Result]:
    """The rows that no other one beats, costs within SLACK counting as equal. Oracles do not
    compete, nor do rows that lack more than a tenth of the problems."""
    most = max((r.problems for r in results), default=0)
    costs = [np.nan if r.oracle or r.problems < WHOLE * most else cost(r) for r in results]
    best = stats.pareto(costs, [r.accuracy for r in results], slack=SLACK)
    return [r for r, is_best in zip(results, best, strict=True) if is_best]


def paired_difference(a: Result, b: Result) -> stats.Interval | None:
    """How much more accurate a is than b on the problems that both hold, with its interval; None
    where there are none, as when a server left samples out."""
    both, in_a, in_b = np.intersect1d(a.ids, b.ids, return_indices=True)
    if not len(both):
        return None
    return stats.paired_difference(a.scores[in_a], b.scores[in_b])


def _settings(store: Store, seed: int | None) -> list[Setting]:
    settings = store.settings()
    seeds = sorted({setting.seed for setting in settings})
    if seed is None and len(seeds) > 1:
        raise ValueError(f"{store.path} holds samples of the seeds {seeds}: choose one")
    chosen = [s for s in settings if seed is None or s.seed == seed]
    if not chosen:
        of_seed = "" if seed is None else f" of seed {seed}"
        raise ValueError(f"{store.path} holds no samples{of_seed}: run the sweep first")
    return chosen

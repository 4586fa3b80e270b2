"""The finished searches of a sweep, beside its samples in the same SQLite file.

A search is named by its `SearchKey`; as it depends on its key alone, as a sample does, writing one
twice changes nothing, and `missing` lists what a killed sweep still lacks.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .store import Store, storable
from .strategies import Outcome


class SearchKey(NamedTuple):
    """What a search depends on, besides the model.

    search: its name and settings as in "beam lines=16 width=4 step=8 judge=confidence", `lines`
    being its size; params: as of a sample.
    """

    problem: int
    search: str
    params: str
    seed: int


class Line(NamedTuple):
    """A finished completion of a search: its canonical answer (None: it has none), whether that is
    right, and the judge's value."""

    answer: str | None
    correct: bool
    value: float


@dataclass(frozen=True)
class SearchRecord:
    """A finished search: the best completion, all the finished ones, and what they cost.

    prompt_tokens were read (the prompt, and what later steps read again), sampled_tokens drawn,
    forced_tokens put in; pruned_tokens, of these two, are in no finished completion. flops are the
    model's, judge_flops the judge's, each NaN where unknown; seconds: as of samples, and the
    judge's.
    """

    key: SearchKey
    text: str
    lines: tuple[Line, ...]  # the best one first
    prompt_tokens: int
    sampled_tokens: int
    forced_tokens: int
    pruned_tokens: int
    flops: float
    judge_flops: float
    seconds: float


@dataclass(frozen=True)
class Searched:
    """The searches of one kind: problems (P,), the lines of each, and what they cost."""

    search: str
    params: str
    seed: int
    problems: np.ndarray
    lines: tuple[tuple[Line, ...], ...]
    spent: Outcome  # its scores are yet to be chosen

    def best(self) -> np.ndarray:
        """(P,) whether the line with the highest value is right."""
        return np.array([float(lines[0].correct) for lines in self.lines])

    def vote(self) -> np.ndarray:
        """(P,) in [0, 1]: whether the answer with the largest sum of values is right (the share of
        its lines that is, where the verifier looks at more); answers that tie are equally likely.
        Source: Beeching et al. 2024 (weighted best-of-N)."""
        return np.array([_vote(lines) for lines in self.lines])

    def outcome(self, scores: np.ndarray) -> Outcome:
        """These searches with those scores."""
        return replace(self.spent, scores=scores)


def _vote(lines: Sequence[Line]) -> float:
    verdicts: dict[str, list[bool]] = {}
    weights: dict[str, float] = {}
    for line in lines:
        if line.answer is not None:
            verdicts.setdefault(line.answer, []).append(line.correct)
            weights[line.answer] = weights.get(line.answer, 0.0) + line.value
    most = max(weights.values(), default=0.0)
    leaders = [verdicts[name] for name, weight in weights.items() if weight >= most * (1 - 1e-12)]
    return sum(sum(right) / len(right) for right in leaders) / max(1, len(leaders))


def add(store: Store, records: Iterable[SearchRecord]) -> None:
    """Keeps a batch of finished searches in one transaction; those already there stay."""
    rows = [
        (
            *(*r.key, storable(r.text), json.dumps(r.lines)),
            *(r.prompt_tokens, r.sampled_tokens, r.forced_tokens, r.pruned_tokens),
            *(None if math.isnan(x) else x for x in (r.flops, r.judge_flops)),
            r.seconds,
        )
        for r in records
    ]
    store.insert("search", rows)


def missing(
    store: Store, *, problems: Iterable[int], searches: Iterable[str], params: str, seed: int
) -> list[SearchKey]:
    """The keys of the grid problems × searches that the store lacks, a search's side by side."""
    done = set(
        store.rows("SELECT problem, search FROM search WHERE params = ? AND seed = ?", params, seed)
    )
    problems = list(problems)
    return [
        SearchKey(problem, search, params, seed)
        for search in searches
        for problem in problems
        if (problem, search) not in done
    ]


def searched(store: Store, seed: int) -> list[Searched]:
    """All the finished searches of a seed, by kind."""
    kinds: dict[tuple[str, str], list[tuple]] = {}
    for row in store.rows("SELECT * FROM search WHERE seed = ?", seed):
        kinds.setdefault((row[1], row[2]), []).append(row)
    found = []
    for (search, params), rows in sorted(kinds.items(), key=lambda kind: _order(*kind[0])):
        columns = list(zip(*sorted(rows), strict=True))
        lines = tuple(tuple(Line(*line) for line in json.loads(text)) for text in columns[5])
        # None becomes NaN.
        read, sampled, forced, pruned, flops, judge_flops, seconds = np.array(columns[6:], float)
        spent = Outcome(
            scores=np.full(len(rows), np.nan),
            samples=np.array([float(len(of_one)) for of_one in lines]),
            prompt_tokens=read,
            sampled_tokens=sampled,
            forced_tokens=forced,
            flops=flops + judge_flops,
            seconds=seconds,
            judge_flops=judge_flops,
            pruned_tokens=pruned,
        )
        found.append(Searched(search, params, seed, np.array(columns[0]), lines, spent))
    return found


def parse_search(text: str) -> tuple[str, int, str]:
    """The name, the size and the other settings of a canonical text."""
    name, lines, *settings = text.split(" ", 2)
    return name, int(lines.removeprefix("lines=")), " ".join(settings)


def _order(search: str, params: str) -> tuple:
    name, size, settings = parse_search(search)
    return params, name, settings, size

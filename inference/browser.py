"""The problems of a report with their samples, votes and traces, sorted by how they came out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .curves import Curves
from .estimators import leaders, tallies
from .store import Pool, Record, Store, StoredProblem

SHOWN = 4000  # characters of a sample's text that the page prints
SAMPLES = 16  # samples of a problem that the page prints


def problem_groups(curves: Curves, store: Store, count: int) -> list[dict[str, Any]]:
    """At most `count` problems of each kind, over all difficulties, at the greatest budget:
    those that the vote corrects, those that it gets wrong though a sample is right,
    those that no sample gets right, and those that all do."""
    gain = curves.gain()
    if gain is None:
        return []
    vote = gain[0]
    pool = store.pool(
        budget=vote.think_budget, params=vote.params, seed=vote.seed, samples=vote.samples
    )
    codes = tallies(pool.answers, pool.correct)[0]
    winner = (codes == leaders(codes)[0][:, -1:]) & (codes >= 0)
    wins, found = (winner & pool.correct).any(1), pool.correct.any(1)
    kinds = [
        ("Where the vote corrects a single sample", wins & ~pool.correct[:, 0]),
        ("Right in some samples, but outvoted", found & ~wins),
        ("Right in no sample", ~found),
        ("Right in every sample", pool.correct.all(1)),
    ]
    problems = store.problems()
    groups = []
    for name, members in kinds:
        ids = np.flatnonzero(members)
        if not len(ids):
            continue
        ids = ids[np.argsort(pool.difficulty[ids], kind="stable")]
        picked = [
            # Contested, but won clearly: the most telling of its difficulty.
            group[np.abs(winner[group].mean(1) - 0.6).argmin()]
            for group in np.array_split(ids, min(count, len(ids)))
        ]
        shown = [_problem(curves, store, pool, problems, int(p)) for p in picked]
        groups.append(
            dict(name=name, total=len(ids), share=len(ids) / len(pool.problems), shown=shown)
        )
    return groups


def _problem(
    curves: Curves, store: Store, pool: Pool, problems: dict[int, StoredProblem], place: int
) -> dict[str, Any]:
    index = int(pool.problems[place])
    stored = store.records(index, budget=pool.budget, params=pool.params, seed=pool.seed)
    numbers = set(pool.numbers[place].tolist())
    records = [record for record in stored if record.key.sample in numbers]
    tally: dict[str | None, dict[str, Any]] = {}
    for r in records:
        entry = tally.setdefault(r.answer, dict(answer=r.answer, votes=0, right=r.correct))
        entry["votes"] += 1
    greedy = []
    for row in curves.greedy:
        if index in row.ids:
            (record,) = store.records(
                index, budget=row.think_budget, params=row.params, seed=row.seed
            )[:1]
            greedy.append(dict(budget=row.think_budget, **_sample(record)))
    return dict(
        problem=problems[index],
        index=index,
        count=len(records),
        votes=sorted(tally.values(), key=lambda v: (v["answer"] is None, -v["votes"])),
        samples=[_sample(r) for r in telling_first(records)[:SAMPLES]],
        greedy=greedy,
    )


def _sample(record: Record) -> dict[str, Any]:
    return dict(text=record.text[:SHOWN], cut=max(0, len(record.text) - SHOWN), record=record)


def telling_first(records: Sequence[Record]) -> list[Record]:
    """The first sample, the first right one, one of every other answer, then the rest."""
    picked = [records[0], *(r for r in records[1:] if r.correct)][:2]
    for r in records:
        if r.answer not in {p.answer for p in picked}:
            picked.append(r)
    return picked + [r for r in records if r not in picked]

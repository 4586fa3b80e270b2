"""What verifiers think of a store's samples: computed once, kept in the store.

A score is named by the verifier's hash and the sample's key.
"""

import json
import time
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from .store import Pool, Store
from .verifier import Scorer

SAME = (
    "score.verifier = ? AND score.params = sample.params AND score.seed = sample.seed"
    " AND ifnull(score.budget, -1) = ifnull(sample.budget, -1)"
    " AND score.problem = sample.problem AND score.sample = sample.sample"
)
BATCH = 256  # samples that are scored and kept at once


@dataclass(frozen=True)
class Scores:
    """A verifier's scores of a pool's samples, each (P, N), NaN where it does not tell; see
    `verifier.Score`."""

    verifier: str
    end: np.ndarray
    last: np.ndarray
    least: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray


def score(store: Store, scorer: Scorer, *, say: bool = False) -> int:
    """Scores the samples that this verifier has not scored yet; returns how many those were.

    What is finished is kept, a batch at a time. Raises ValueError for samples that the verifier
    cannot read.
    """
    with store.transaction() as db:
        facts = json.dumps(asdict(scorer.reading))
        db.execute(
            "INSERT INTO verifier VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET used = excluded.used",
            (scorer.hash, facts, time.time()),
        )
        missing = [
            row
            for (row,) in db.execute(
                f"SELECT rowid FROM sample WHERE NOT EXISTS (SELECT 1 FROM score WHERE {SAME})",
                (scorer.hash,),
            )
        ]
    with tqdm(total=len(missing), unit="score", dynamic_ncols=True, disable=not say) as bar:
        for first in range(0, len(missing), BATCH):
            batch = _samples(store, missing[first : first + BATCH])
            scores = scorer.score(
                [(prompt, text, end == "stop") for *_, prompt, text, end in batch]
            )
            rows = [
                (scorer.hash, *key, *s) for (*key, _, _, _), s in zip(batch, scores, strict=True)
            ]
            store.insert("score", rows)
            bar.update(len(batch))
    return len(missing)


def _samples(store: Store, rows: list[int]) -> list[tuple]:
    """(problem, budget, params, seed, sample, prompt, text, finish) of each."""
    return store.rows(
        "SELECT problem, budget, params, seed, sample, prompt, text, finish"
        " FROM sample JOIN problem ON problem.id = problem"
        f" WHERE sample.rowid IN ({', '.join(map(str, rows))})"
    )


def latest(store: Store) -> str | None:
    """The hash of the verifier that scored this store last; None where none did."""
    found = store.rows("SELECT hash FROM verifier ORDER BY used DESC LIMIT 1")
    return found[0][0] if found else None


def scores_of(store: Store, pool: Pool, verifier: str) -> Scores | None:
    """The scores of a pool; None where some of its samples have none yet."""
    rows = store.rows(
        "SELECT problem, sample, end, last, least, flops, seconds FROM score WHERE verifier = ?"
        " AND params = ? AND seed = ? AND ifnull(budget, -1) = ?",
        *(verifier, pool.params, pool.seed, -1 if pool.budget is None else pool.budget),
    )
    place = {
        (int(problem), sample): (i, j)
        for i, problem in enumerate(pool.problems)
        for j, sample in enumerate(pool.numbers[i].tolist())
    }
    table = np.full((5, len(pool.problems), pool.samples), np.nan)
    known = np.zeros(table.shape[1:], dtype=bool)
    for problem, sample, *values in rows:
        if (at := place.get((problem, sample))) is not None:
            table[:, *at] = [np.nan if value is None else value for value in values]
            known[at] = True
    return Scores(verifier, *table) if known.all() else None

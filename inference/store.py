"""Every finished sample of a sweep, kept at once in one SQLite file.

One store belongs to one model and one task. A sample is named by its `Key`: problem, budget,
sampling parameters, seed, sample index; as a sample depends on its key alone, writing one twice
changes nothing. A killed writer loses the batch that it was writing and nothing else; `missing`
then lists what a grid still lacks.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .scores import Scores

SCHEMA_VERSION = 2
TIMEOUT = 60  # seconds to wait for another process

# An unlimited budget is NULL, and NULLs are distinct to a unique index: hence ifnull. The index is
# in the order in which pools are read.
SCHEMA = f"""
CREATE TABLE identity (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE problem (
    id INTEGER PRIMARY KEY,
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    difficulty INTEGER NOT NULL
);
CREATE TABLE sample (
    problem INTEGER NOT NULL REFERENCES problem (id),
    budget INTEGER CHECK (budget >= 0),
    params TEXT NOT NULL,
    seed INTEGER NOT NULL,
    sample INTEGER NOT NULL CHECK (sample >= 0),
    text TEXT NOT NULL,
    answer TEXT,
    correct INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    sampled_tokens INTEGER NOT NULL,
    forced_tokens INTEGER NOT NULL,
    think_tokens INTEGER NOT NULL,
    logprob REAL,
    finish TEXT NOT NULL,
    seconds REAL NOT NULL
);
CREATE UNIQUE INDEX sample_key ON sample (params, seed, ifnull(budget, -1), problem, sample);
CREATE TABLE search (
    problem INTEGER NOT NULL REFERENCES problem (id),
    search TEXT NOT NULL,
    params TEXT NOT NULL,
    seed INTEGER NOT NULL,
    text TEXT NOT NULL,
    lines TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    sampled_tokens INTEGER NOT NULL,
    forced_tokens INTEGER NOT NULL,
    pruned_tokens INTEGER NOT NULL,
    flops REAL,
    judge_flops REAL,
    seconds REAL NOT NULL,
    PRIMARY KEY (problem, search, params, seed)
);
CREATE TABLE verifier (
    hash TEXT PRIMARY KEY,
    facts TEXT NOT NULL,
    used REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE score (
    verifier TEXT NOT NULL REFERENCES verifier (hash),
    problem INTEGER NOT NULL,
    budget INTEGER,
    params TEXT NOT NULL,
    seed INTEGER NOT NULL,
    sample INTEGER NOT NULL,
    end REAL,
    last REAL,
    least REAL,
    flops INTEGER NOT NULL,
    seconds REAL NOT NULL
);
CREATE UNIQUE INDEX score_key
    ON score (verifier, params, seed, ifnull(budget, -1), problem, sample);
PRAGMA user_version = {SCHEMA_VERSION};
"""


class Key(NamedTuple):
    """What a sample depends on, besides the model. budget None: no limit on thinking."""

    problem: int
    budget: int | None
    params: str
    seed: int
    sample: int


@dataclass(frozen=True)
class Record:
    """A finished sample: its key, what the model wrote, whether it was right, what it cost.

    `answer` is the canonical answer, None where the text holds none; `sampled_tokens` were drawn
    from the model, `forced_tokens` were put in (a forced </think>); `think_tokens` of both lie
    inside the thinking; `seconds` is its share of the engine's time, `logprob` natural, None where
    a server does not tell it.
    """

    key: Key
    text: str
    answer: str | None
    correct: bool
    prompt_tokens: int
    sampled_tokens: int
    forced_tokens: int
    think_tokens: int
    logprob: float | None
    finish: str
    seconds: float


@dataclass(frozen=True)
class StoredProblem:
    """A problem as the store has it."""

    prompt: str
    answer: str
    difficulty: int


@dataclass(frozen=True)
class Setting:
    """One way of sampling that the store holds: its problems, and the most samples of any."""

    budget: int | None
    params: str
    seed: int
    problems: int
    samples: int

    @property
    def temperature(self) -> float:
        """0: greedy."""
        return parse_params(self.params)["temperature"]


@dataclass(frozen=True)
class Pool:
    """All samples of one setting as arrays: P problems, N samples of each.

    problems, difficulty, prompt_tokens (P,); numbers (P, N), those of the samples in the store;
    answers (P, N) are positions in `answer_texts`, -1 where a sample gave none; texts (P, N) int,
    equal where two completions are; correct (P, N) bool; sampled_tokens, forced_tokens,
    think_tokens, logprob, seconds (P, N).
    """

    budget: int | None
    params: str
    seed: int
    problems: np.ndarray
    difficulty: np.ndarray
    prompt_tokens: np.ndarray
    numbers: np.ndarray
    answers: np.ndarray
    answer_texts: tuple[str, ...]
    texts: np.ndarray
    correct: np.ndarray
    sampled_tokens: np.ndarray
    forced_tokens: np.ndarray
    think_tokens: np.ndarray
    logprob: np.ndarray
    seconds: np.ndarray
    scores: "Scores | None" = None  # a verifier's, where one read the samples

    @property
    def samples(self) -> int:
        """N, of each problem."""
        return self.correct.shape[1]

    @property
    def temperature(self) -> float:
        """0: greedy."""
        return parse_params(self.params)["temperature"]


def params_text(params: Any) -> str:
    """The canonical text of `.temperature`, `.top_k`, `.top_p`, `.min_p` and `.extend`:
    "temperature=0.7".

    Filters that filter nothing are left out, and all of them at temperature 0, so that equal
    distributions have equal texts.
    """
    parts = [f"temperature={float(params.temperature)!r}"]
    if params.temperature > 0:
        if params.top_k > 0:
            parts.append(f"top_k={int(params.top_k)}")
        if params.top_p < 1:
            parts.append(f"top_p={float(params.top_p)!r}")
        if params.min_p > 0:
            parts.append(f"min_p={float(params.min_p)!r}")
    if params.extend > 0:
        parts.append(f"extend={int(params.extend)}")
    return " ".join(parts)


def without_extend(text: str) -> str:
    """The canonical text of the same parameters with no extension."""
    return text.partition(" extend=")[0]


def parse_params(text: str) -> dict[str, float]:
    """The numbers of a canonical text: {"temperature": 0.7}."""
    pairs = (part.split("=") for part in text.split())
    return {name: float(value) for name, value in pairs}


class Store:
    """The samples of one model on one task, in the SQLite file at `path`.

    `identity` says which model and task (any JSON values: {"model": hash, "task": name, ...}); it
    is written into a new file and compared with that of an old one. With identity None an existing
    store is opened as it is; `store.identity` tells whose it is. Several processes may write.

    Raises ValueError for a file that is no store, has another schema version, or belongs to
    another model or task; and whenever the file cannot be opened or written.
    """

    def __init__(self, path: str | Path, *, identity: Mapping[str, Any] | None):
        self.path = Path(path)
        if identity is None and not self.path.is_file():
            raise ValueError(f"{path}: there is no sample store")
        if identity is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with _named(self.path):
            self._db = sqlite3.connect(self.path, timeout=TIMEOUT, isolation_level=None)
            try:
                self._open(identity)
            except BaseException as error:
                self.close()
                if type(error) is sqlite3.DatabaseError:
                    raise ValueError(f"{path} is not a sample store ({error})") from None
                raise

    def _open(self, identity: Mapping[str, Any] | None) -> None:
        if self._is_new():
            if identity is None:
                raise ValueError(f"{self.path} is an empty file, not a sample store")
            with self.transaction():
                if self._is_new():  # another process may have been quicker
                    self._create(identity)
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{self.path} has schema version {version}; this ponder reads {SCHEMA_VERSION}"
                if version
                else f"{self.path} is an SQLite file, but not a sample store"
            )
        self._write_ahead()
        self._db.execute("PRAGMA synchronous = FULL")  # a batch outlives a power cut, too
        self._db.execute("PRAGMA foreign_keys = ON")
        rows = self._db.execute("SELECT name, value FROM identity")
        self.identity: dict[str, Any] = {name: json.loads(value) for name, value in rows}
        if identity is not None:
            self._check_identity({name: _json_value(value) for name, value in identity.items()})

    def _write_ahead(self) -> None:
        """Two that turn this on in a new file at once wait for each other's read lock, and SQLite
        sends one of them away at once, whatever its timeout: it comes back."""
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def _is_new(self) -> bool:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return version == 0 and tables == 0

    def _create(self, identity: Mapping[str, Any]) -> None:
        for statement in SCHEMA.split(";"):
            self._db.execute(statement)
        self._db.executemany(
            "INSERT INTO identity VALUES (?, ?)",
            [(name, json.dumps(value)) for name, value in identity.items()],
        )

    def _check_identity(self, identity: dict[str, Any]) -> None:
        names = sorted(identity.keys() | self.identity.keys())
        differing = [n for n in names if identity.get(n) != self.identity.get(n)]
        if differing:
            theirs = ", ".join(f"{n} {self.identity.get(n)!r}" for n in differing)
            ours = ", ".join(f"{n} {identity.get(n)!r}" for n in differing)
            raise ValueError(
                f"{self.path} was made with {theirs}; this run has {ours}: a store holds one model "
                "and one task, so give this run another folder"
            )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The database, to write to; all that is done in here or nothing."""
        with _named(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_problems(self, problems: Iterable[Any]) -> None:
        """Keeps the problems (`.prompt`, `.answer`, `.difficulty`) under 0, 1, …

        Raises ValueError where another problem already has that index.
        """
        rows = [
            (i, storable(p.prompt), storable(p.answer), int(p.difficulty))
            for i, p in enumerate(problems)
        ]
        with self.transaction():
            self._db.executemany(
                "INSERT INTO problem VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", rows
            )
            known = {row[0]: row for row in self._db.execute("SELECT * FROM problem")}
            for number, *fields in rows:
                _, *stored = known[number]
                if stored != fields:
                    name, ours, theirs = _differing(stored, fields)
                    raise ValueError(
                        f"{self.path}: the {name} of problem {number} is {ours!r} in the store and "
                        f"{theirs!r} in this run: give this run another folder"
                    )

    def problems(self) -> dict[int, StoredProblem]:
        """All problems by their number."""
        rows = self._db.execute("SELECT * FROM problem ORDER BY id")
        return {i: StoredProblem(*rest) for i, *rest in rows}

    def add(self, records: Iterable[Record]) -> None:
        """Keeps a batch of finished samples in one transaction; those already there stay."""
        rows = [
            (
                *(*r.key, storable(r.text), r.answer and storable(r.answer), r.correct),
                *(r.prompt_tokens, r.sampled_tokens, r.forced_tokens, r.think_tokens),
                *(r.logprob, r.finish, r.seconds),
            )
            for r in records
        ]
        self.insert("sample", rows)

    def judge_again(self, judge: Callable[[int, str], tuple[str | None, bool]]) -> tuple[int, int]:
        """Gives every sample the answer and the verdict that judge(problem, text) tells, and lets
        the searches go, of whose lines there are no texts to judge; how many there were of both.

        All of it or, where `judge` raises, nothing.
        """
        with self.transaction() as db:
            rows = db.execute("SELECT rowid, problem, text FROM sample")
            verdicts = [(*judge(problem, text), row) for row, problem, text in rows]
            db.executemany(
                "UPDATE sample SET answer = ?, correct = ? WHERE rowid = ?",
                [(answer and storable(answer), right, row) for answer, right, row in verdicts],
            )
            return len(verdicts), db.execute("DELETE FROM search").rowcount

    def merge(self, path: str | Path) -> None:
        """Adds what another store of this model and task holds; what is already here stays.

        Raises ValueError where the other store is of another model or task, or has another problem
        under an index.
        """
        Store(path, identity=self.identity).close()  # checks it, and finishes what it had begun
        self._db.execute("ATTACH ? AS other", (str(path),))
        try:
            with self.transaction():
                clash = self._db.execute(
                    "SELECT id, ours.prompt, ours.answer, ours.difficulty,"
                    " theirs.prompt, theirs.answer, theirs.difficulty"
                    " FROM main.problem AS ours JOIN other.problem AS theirs USING (id) WHERE"
                    " (ours.prompt, ours.answer, ours.difficulty) <>"
                    " (theirs.prompt, theirs.answer, theirs.difficulty)"
                ).fetchone()
                if clash:
                    name, ours, theirs = _differing(clash[1:4], clash[4:])
                    raise ValueError(
                        f"{path}: the {name} of problem {clash[0]} is {theirs!r} there and "
                        f"{ours!r} in {self.path}; they are not of one sweep"
                    )
                for table in ("problem", "sample", "search"):
                    self._db.execute(
                        f"INSERT INTO main.{table} SELECT * FROM other.{table} WHERE true"
                        " ON CONFLICT DO NOTHING"
                    )
        finally:
            self._db.execute("DETACH other")

    def missing(
        self,
        *,
        problems: Iterable[int],
        budgets: Iterable[int | None],
        params: str,
        seed: int,
        samples: int,
    ) -> list[Key]:
        """The keys of the grid problems × budgets × range(samples) that the store lacks.

        A problem's keys lie side by side, so that its samples can share one prefill.
        """
        rows = self._db.execute(
            "SELECT problem, budget, sample FROM sample WHERE params = ? AND seed = ?",
            (params, seed),
        )
        done = set(rows)
        budgets = list(budgets)
        return [
            Key(problem, budget, params, seed, sample)
            for problem in problems
            for budget in budgets
            for sample in range(samples)
            if (problem, budget, sample) not in done
        ]

    def insert(self, table: str, rows: Sequence[tuple]) -> None:
        """Puts whole rows into a table in one transaction; those whose keys are there stay."""
        if not rows:
            return
        marks = ", ".join("?" * len(rows[0]))
        with self.transaction():
            self._db.executemany(
                f"INSERT INTO {table} VALUES ({marks}) ON CONFLICT DO NOTHING", rows
            )

    def rows(self, query: str, *values: Any) -> list[tuple]:
        """What an SQL query finds."""
        return self._db.execute(query, values).fetchall()

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM sample").fetchone()[0]

    def settings(self) -> list[Setting]:
        """Every setting that the store holds; unlimited budgets last."""
        rows = self._db.execute(
            "SELECT budget, params, seed, count(DISTINCT problem), max(sample) + 1 FROM sample"
            " GROUP BY params, seed, budget ORDER BY params, seed, budget IS NULL, budget"
        )
        return [Setting(*row) for row in rows]

    def pool(
        self, *, budget: int | None, params: str, seed: int, samples: int | None = None
    ) -> Pool:
        """The first `samples` samples of each problem of a setting as arrays; None: `_even`.

        Problems that have fewer are left out: `Pool.problems` tells which are in.
        """
        self._db.create_function("text_hash", 1, hash)  # a text is not read to be kept
        rows = self._db.execute(
            "SELECT problem, prompt_tokens, answer, correct, sampled_tokens, forced_tokens,"
            " think_tokens, logprob, seconds, text_hash(text), sample"
            " FROM sample WHERE params = ? AND seed = ? AND ifnull(budget, -1) = ?"
            " ORDER BY problem, sample",
            (params, seed, -1 if budget is None else budget),
        ).fetchall()
        columns = list(zip(*rows, strict=True)) if rows else [()] * 11
        ids, first, counts = np.unique(
            np.array(columns[0], dtype=np.int64), return_index=True, return_counts=True
        )
        samples = _even(counts) if samples is None else samples
        complete = counts >= samples
        index = first[complete, None] + np.arange(samples)  # (P, N) rows of the result

        def array(i: int, dtype: type) -> np.ndarray:
            return np.array(columns[i], dtype=dtype)[index]

        texts = tuple(dict.fromkeys(a for a in columns[2] if a is not None))
        code = {text: i for i, text in enumerate(texts)}
        codes = np.array([code.get(a, -1) for a in columns[2]], dtype=np.int64)
        difficulty = dict(self._db.execute("SELECT id, difficulty FROM problem"))
        return Pool(
            budget=budget,
            params=params,
            seed=seed,
            problems=ids[complete],
            difficulty=np.array([difficulty[i] for i in ids[complete]], dtype=np.int64),
            prompt_tokens=array(1, np.int64)[:, 0],
            numbers=array(10, np.int64),
            answers=codes[index],
            answer_texts=texts,
            texts=array(9, np.int64),
            correct=array(3, np.bool_),
            sampled_tokens=array(4, np.int64),
            forced_tokens=array(5, np.int64),
            think_tokens=array(6, np.int64),
            logprob=array(7, np.float64),
            seconds=array(8, np.float64),
        )

    def kept_to(self, budget: int | None, params: str, seed: int) -> float:
        """The share of a setting's samples that kept to its budget: no more tokens before </think>,
        and none behind it that close another thought."""
        if budget is None:
            return 1.0
        rest = "substr(text, instr(text, :end) + length(:end))"
        [share] = self._db.execute(
            f"SELECT avg(think_tokens <= :budget AND NOT instr({rest}, :end)) FROM sample"
            " WHERE budget = :budget AND params = :params AND seed = :seed",
            dict(budget=budget, params=params, seed=seed, end="</think>"),
        ).fetchone()
        return share

    def records(self, problem: int, *, budget: int | None, params: str, seed: int) -> list[Record]:
        """The samples of one problem in one setting, texts included, by sample index."""
        rows = self._db.execute(
            "SELECT * FROM sample WHERE params = ? AND seed = ? AND ifnull(budget, -1) = ?"
            " AND problem = ? ORDER BY sample",
            (params, seed, -1 if budget is None else budget, problem),
        )
        return [Record(Key(*row[:5]), row[5], row[6], bool(row[7]), *row[8:]) for row in rows]


def _differing(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[str, Any, Any]:
    """The first field in which two problems differ (prompt, answer, difficulty), and its values."""
    fields = zip(("prompt", "answer", "difficulty"), ours, theirs, strict=True)
    return next(field for field in fields if field[1] != field[2])


def _even(counts: np.ndarray) -> int:
    """Of problems with so many samples (P,), the number N that tells most of the model where those
    with fewer are left out: the variance of an accuracy is about in proportion to (1 + 1/N) / P. So
    a sweep that lacks some samples, or is growing, loses few problems, or none."""
    return max(
        map(int, np.unique(counts)),
        key=lambda n: (np.count_nonzero(counts >= n) * n / (n + 1), n),
        default=1,
    )


def storable(text: str) -> str:
    """The text without lone surrogates, which a server's JSON may hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What keeps SQLite from the file (a lock, a full disk), as a sentence that names it."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ValueError(f"{path}: {error}") from error


def _json_value(value: Any) -> Any:
    return json.loads(json.dumps(value))

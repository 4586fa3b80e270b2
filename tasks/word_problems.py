"""Word problems from outside: GSM8K, MATH-500 and AIME, from the Hub or from local files.

A task is named `gsm8k`, or `gsm8k:PATH` for a local copy of the same schema: a .jsonl, .json or
.parquet file, or a folder with a file for each split (train.jsonl, test.jsonl).
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from . import answers
from .task import Problem, TooFew, check_ask, check_budget, split_of

FORMATS = (".jsonl", ".json", ".parquet")
CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Source:
    """Where a data set is and what its fields are called.

    splits: what our train and test are called there. solution is None where no worked solution
    comes with it; level, where there is one, is the difficulty. latex: answers are formulas, not
    numbers.
    """

    hub: str
    config: str | None
    splits: dict[str, str]
    question: str
    answer: str
    solution: str | None = None
    level: str | None = None
    latex: bool = False


SOURCES = {
    # Cobbe et al. 2021: `answer` holds the worked steps, then "#### 72".
    "gsm8k": Source(
        "openai/gsm8k", "main", {"train": "train", "test": "test"}, "question", "answer", "answer"
    ),
    # 500 problems of MATH (Hendrycks et al. 2021), as chosen by Lightman et al. 2023.
    "math500": Source(
        *("HuggingFaceH4/MATH-500", None, {"test": "test"}, "problem", "answer", "solution"),
        level="level",
        latex=True,
    ),
    # Answers are whole numbers from 0 to 999.
    "aime24": Source(
        "HuggingFaceH4/aime_2024", None, {"test": "train"}, "problem", "answer", "solution"
    ),
    "aime25": Source("math-ai/aime25", None, {"test": "test"}, "problem", "answer"),
}


@dataclass(frozen=True)
class WordProblems:
    """A data set of word problems as a task.

    `test` is the set's own; `train` and `val` are its training split, divided by a hash of the
    question. A single local file of a set that has a training split is divided into all three.
    path None reads from the Hub.
    """

    name: str
    path: str | None = None

    step_end = "\n"

    def __post_init__(self):
        if self.path is not None:
            path = Path(self.path)
            if not path.exists():
                raise ValueError(f"{self.name}: there is no file or folder {self.path}")
            if path.is_file() and path.suffix not in FORMATS:
                raise ValueError(f"{self.name}: {path.name} is none of {', '.join(FORMATS)}")
        if self.source.latex and not answers.have_math_verify():
            raise ValueError(
                f"{self.name} compares formulas with the package math-verify, which is not "
                "installed: pip install math-verify"
            )

    @property
    def source(self) -> Source:
        return SOURCES[self.name]

    @property
    def alphabet(self) -> str:
        """Every character of the training problems, or of the test problems where there are no
        others."""
        split = "train" if "train" in self.source.splits else "test"
        texts = (p.prompt + p.answer + self.trace(p) for p in self._split(split))
        return "".join(sorted(set().union(*map(set, texts))))

    @property
    def content(self) -> str:
        """A digest of the training problems, in their order; "" where there are none."""
        known = self._problems.get("train", [])
        texts = (f"{p.prompt}\0{self.trace(p)}\0{p.answer}\0" for p in known)
        return blake2b("".join(texts).encode(), digest_size=8).hexdigest() if known else ""

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """count problems of a split ("train", "val" or "test"), in an order drawn with the seed.

        A longer list begins with the shorter one; problems of val and test are distinct, train
        repeats where it is used up. Raises ValueError for an unknown or missing split or a negative
        count, TooFew where val or test holds fewer than count problems.
        """
        check_ask(self.name, split, count)
        every = self._split(split)
        rng = random.Random(f"{self.name}/{split}/{seed}")
        if split != "train" and count > len(every):
            raise TooFew(
                f"{self.name}: {split} holds {len(every)} problems; {count} were asked for",
                len(every),
            )
        chosen: list[Problem] = []
        while len(chosen) < count:
            chosen += rng.sample(every, len(every))
        return chosen[:count]

    def trace(self, problem: Problem, budget: int | None = None) -> str:
        """The worked solution, a line a step, cut after budget steps where given; "" where the
        data set has none. Raises ValueError for a negative budget."""
        check_budget(self.name, budget)
        _, steps = problem.data
        return "".join(f"{line}\n" for line in steps[:budget])

    def answer(self, text: str) -> str | None:
        """The canonical answer that a completion gives; None where it gives none."""
        if not self.source.latex:
            return answers.extract_number(text)
        given = answers.extract(text)
        return None if given is None else answers.canonical(given)

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether a completion's answer is right. Any string is allowed."""
        given = self.answer(text)
        if given is None or given == problem.answer:
            return given is not None
        if not self.source.latex:
            return False
        gold, _ = problem.data  # as it was written: problem.answer may be sympy's way
        return answers.same(gold, answers.extract(text) or "")

    def _split(self, split: str) -> list[Problem]:
        if split not in self._problems:
            raise ValueError(
                f"{self.name} has no {split} problems here; there are "
                f"{', '.join(self._problems) or 'none at all'}"
            )
        return self._problems[split]

    @cached_property
    def _problems(self) -> dict[str, list[Problem]]:
        """The problems of each split that there is, without repeats."""
        found: dict[str, dict[str, Problem]] = {}
        for place, row in self._rows():
            problem = self._problem(row)
            if place != "test":  # "train", or None for a file that is divided into all three
                place = split_of(problem.prompt)
                if "test" in self._apart and place == "test":
                    place = "train"
            found.setdefault(place, {}).setdefault(problem.prompt, problem)
        # A question that stands in test and elsewhere counts as test.
        held = found.get("test", {})
        left = {
            split: [p for prompt, p in by_prompt.items() if split == "test" or prompt not in held]
            for split, by_prompt in sorted(found.items())
        }
        return {split: problems for split, problems in left.items() if problems}

    @cached_property
    def _apart(self) -> dict[str, Path | None]:
        """The splits that come apart from each other, and the file that holds each; empty for a
        single file that is to be divided."""
        splits = self.source.splits
        if self.path is None:
            return dict.fromkeys(splits)
        path = Path(self.path)
        if path.is_file():
            return {} if "train" in splits else {"test": path}
        files = {
            split: file
            for split in ("train", "test")
            for suffix in FORMATS
            if (file := path / f"{split}{suffix}").exists()
        }
        if not files:
            raise ValueError(
                f"{self.name}: the folder {path} holds neither train nor test "
                f"({', '.join(FORMATS)})"
            )
        return dict(files)

    def _rows(self) -> Iterator[tuple[str | None, dict[str, Any]]]:
        if not self._apart and self.path is not None:
            for row in _read(Path(self.path)):
                yield None, row
        for split, file in self._apart.items():
            for row in self._download(split) if file is None else _read(file):
                yield split, row

    def _download(self, split: str) -> Any:
        from datasets import load_dataset

        source = self.source
        try:
            return load_dataset(source.hub, source.config, split=source.splits[split])
        except Exception as error:
            raise ValueError(
                f"{self.name}: {source.hub} could not be read from the Hub "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); a "
                f"local copy can be given as {self.name}:PATH"
            ) from error

    def _problem(self, row: dict[str, Any]) -> Problem:
        source = self.source
        for field in (source.question, source.answer):
            if not isinstance(row.get(field), str | int):
                raise ValueError(
                    f"{self.name}: a row has no text {field!r}; it has {', '.join(map(str, row))}"
                )
        gold = str(row[source.answer]).rpartition("####")[2].strip()
        steps = steps_of(str(row.get(source.solution) or "")) if source.solution else ()
        canonical = answers.canonical if source.latex else answers.number
        answer = canonical(gold)
        if answer is None:
            raise ValueError(f"{self.name}: {gold[-40:]!r} ends in no number, as an answer must")
        level = row.get(source.level) if source.level else None
        try:
            difficulty = int(level) if level is not None else len(steps)
        except (ValueError, TypeError):
            raise ValueError(f"{self.name}: level is {level!r}; it must be a number") from None
        prompt = prompt_of(str(row[source.question]))
        try:
            "".join((prompt, answer, *steps)).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"{self.name}: the problem {prompt[:40]!r} has {half!r}, which is no character of "
                "Unicode"
            ) from None
        return Problem(self.name, prompt, answer, difficulty, (gold, steps))


def prompt_of(question: str) -> str:
    """What a model reads of a question, here and where it is trained on rows of such questions."""
    return question.strip() + "\n"


def steps_of(solution: str) -> tuple[str, ...]:
    """The lines of a worked solution, up to its "####"; a trace ends each with a line break.
    GSM8K's marks for a calculator are left out: a model would only write every result twice."""
    worked = CALCULATOR.sub("", solution.partition("####")[0])
    return tuple(line.strip() for line in worked.splitlines() if line.strip())


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a local file; ValueError for one that does not hold rows."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} could not be read: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of rows (objects with named fields)")
    return rows

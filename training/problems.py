"""Tasks as training data: problems with worked chains of thought, drawn anew for every step."""

import random
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from .. import tasks
from .batch import IGNORE, Batch, padded
from .config import TrainConfig
from .tokenizer import Vocabulary

VALIDATION_PROBLEMS = 1024
VALIDATION_TOKENS = 8192  # in a batch of them
ATTEMPTS = 3  # before the last one, in a thought with retries, at most
LEARN_PROBLEMS = 4096  # for a tokenizer to learn from
SURVEYED = 256  # examples that tell how many are longer than the context
ROUNDS = 100  # of drawing others for those


class Example(NamedTuple):
    """A problem with its worked thought, as it is learned."""

    row: np.ndarray  # its tokens
    forced: bool  # whether its </think> is, and so no target
    wrong: list[bool]  # which of the attempts before the last one are


class Problems:
    """A task (a `Corpus`)."""

    def __init__(self, config: TrainConfig, name: str):
        self.name, self.task = f"task:{name}", tasks.get(name)
        self.alphabet: str = self.task.alphabet
        content = tasks.content_of(self.task)
        self.identity = [self.name, self.alphabet, *([content] if content else [])]

    def thinks(self) -> bool:
        return True

    def texts(self) -> Iterator[str]:
        yield self.alphabet
        for problem in self.task.problems("train", LEARN_PROBLEMS, 0):
            yield from (problem.prompt, self.task.trace(problem), problem.answer)

    def source(self, config: TrainConfig, vocabulary: Vocabulary) -> "ProblemRows":
        return ProblemRows(self, config, vocabulary)


class ProblemRows:
    """A row is `prompt<think>trace</think>answer<eos>`; the loss is on what follows `<think>`.

    A fraction of the traces is whole, the rest is cut after a random number of steps, so that at
    inference a forced `</think>` is nothing new. The `</think>` of a cut trace is no target: it is
    forced, and a model that learned to write it would stop thinking at random.

    With `retries` a thought may be several attempts, the cue between them, the last one right. A
    wrong one is no target, but the cue behind it is: the model learns to notice. The cue behind a
    right one is forced, and no target. Source: Ye et al. 2024, "Physics of Language Models: Part
    2.2, How to Learn From Mistakes on Grade-School Math Problems" (retry data).
    """

    def __init__(self, corpus: Problems, config: TrainConfig, vocabulary: Vocabulary):
        self.name, self.task = corpus.name, corpus.task
        self.config, self.vocabulary = config, vocabulary
        self.fingerprint = corpus.identity
        self._check_alphabet()
        self.think, self.end_think = vocabulary.id("<think>"), vocabulary.id("</think>")
        self.eos = vocabulary.id(vocabulary.eos)
        self.cue = self._cue() if config.retries else None
        lengths = [len(e.row) - 1 for e in self._drawn("train", SURVEYED, random.Random("lengths"))]
        self.long = sum(length > config.context for length in lengths) / len(lengths)
        if self.long > 0.5:
            raise ValueError(
                f"{self.long:.0%} of the examples of {self.task.name} have more tokens than the "
                f"context, which is {config.context}; of {SURVEYED} the longest has {max(lengths)}"
            )

    def _check_alphabet(self) -> None:
        """ValueError for characters that the tokenizer does not know, as inference refuses them."""
        tokenizer, alphabet = self.vocabulary.tokenizer, self.task.alphabet
        unknown = tokenizer.token_to_id("<unk>")
        encoded = tokenizer.encode_batch_fast(list(alphabet), add_special_tokens=False)
        lost = "".join(c for c, e in zip(alphabet, encoded, strict=True) if unknown in e.ids)
        if lost:
            raise ValueError(
                f"the tokenizer {self.config.tokenizer} does not know the characters {lost!r} of "
                f"{self.task.name}; take one that does, such as byte"
            )

    def _cue(self) -> int:
        """The token that takes a thought up again; ValueError where there is none."""
        cue = getattr(self.task, "cue", None)
        if cue is None:
            raise ValueError(
                f"retries is {self.config.retries}; {self.task.name} has no wrong attempts to show"
            )
        return self.vocabulary.id(cue)

    def __str__(self) -> str:
        text = f"{self.name}: new problems at every step"
        if self.long:
            text += (
                f"; about {self.long:.1%} are longer than the context of {self.config.context} and "
                "left out"
            )
        return text

    def rows(self, step: int, start: int, count: int) -> Batch:
        return self._rows("train", count, f"{self.config.seed}/{step}")

    @cached_property
    def held_out(self) -> Batch:
        # Kept, for to draw them takes seconds where the task holds out few.
        return self._rows("val", VALIDATION_PROBLEMS, "0")

    def validation(self) -> Iterator[Batch]:
        tokens, targets, _ = self.held_out
        rows = max(1, VALIDATION_TOKENS // tokens.shape[1])
        yield from map(Batch, tokens.split(rows), targets.split(rows))

    def _rows(self, split: str, count: int, key: str) -> Batch:
        """Examples that the context holds; others are left out, of "train" drawn anew."""
        draw = random.Random(f"{split}/{key}")
        examples: list[Example] = []
        for _ in range(ROUNDS if split == "train" else 1):
            drawn = self._drawn(split, count - len(examples), draw)
            examples += [e for e in drawn if len(e.row) - 1 <= self.config.context]
            if len(examples) == count:
                break
        if not examples or (split == "train" and len(examples) < count):
            raise ValueError(
                f"of {count} examples of {self.task.name} ({split}) {len(examples)} fit the "
                f"context of {self.config.context}; make it longer"
            )
        return padded([self._learned(e) for e in examples], self.config.context, self.eos)

    def _learned(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """The example's tokens and what each is to predict, both (T,)."""
        row, target = example.row, example.row[1:].copy()
        target[: np.flatnonzero(row == self.think)[0]] = IGNORE
        if example.forced:
            target[target == self.end_think] = IGNORE
        if example.wrong:
            self._hide(row, target, example.wrong)
        return row[:-1], target

    def _drawn(self, split: str, count: int, draw: random.Random) -> list[Example]:
        texts, forced, attempts = [], [], []
        # A small task may hold out fewer than are asked for.
        drawn = partial(tasks.at_most, self.task) if split == "val" else self.task.problems
        for problem in drawn(split, count, draw.getrandbits(62)):
            trace = whole = self.task.trace(problem)
            if draw.random() >= self.config.full_traces:
                trace = self.task.trace(problem, draw.randint(0, problem.difficulty))
            wrong = []
            if self.cue is not None and draw.random() < self.config.retries:
                trace, wrong = self._attempts(problem, whole, draw)
            attempts.append(wrong)
            forced.append(trace != whole and not wrong)
            end = self.vocabulary.eos
            texts.append(f"{problem.prompt}<think>{trace}</think>{problem.answer}{end}")
        encode, prefix = self.vocabulary.tokenizer.encode_batch_fast, self.vocabulary.prefix
        rows = [np.array(prefix + e.ids) for e in encode(texts, add_special_tokens=False)]
        return [Example(*parts) for parts in zip(rows, forced, attempts, strict=True)]

    def _attempts(
        self, problem: tasks.Problem, whole: str, draw: random.Random
    ) -> tuple[str, list[bool]]:
        """A thought of several attempts, as many as the context has room for, and which of those
        before the last are wrong."""
        task: Any = self.task
        wrong = [draw.random() < 0.5 for _ in range(draw.randint(1, ATTEMPTS))]
        texts = [task.slip(problem, draw) if w else whole for w in wrong]
        # At most a token a character, and <think>, </think> and <eos>.
        room = self.config.context - len(problem.prompt + whole + problem.answer) - 3
        room -= len(self.vocabulary.prefix)
        while texts and sum(map(len, texts)) + len(texts) > room:
            texts.pop()
        return task.cue.join([*texts, whole]), wrong[: len(texts)]

    def _hide(self, row: np.ndarray, target: np.ndarray, wrong: list[bool]) -> None:
        """Takes wrong attempts, and the cues behind right ones, out of the targets."""
        start = int(np.flatnonzero(row == self.think)[0])
        cues = start + np.flatnonzero(row[start:] == self.cue)
        if len(cues) != len(wrong):
            raise ValueError(
                f"retries is {self.config.retries}; the tokenizer joins the cue with its "
                "neighbours: take --tokenizer char"
            )
        for cue, is_wrong in zip(cues, wrong, strict=True):
            # target[i] is the token behind row[i]: the cue itself is target[cue - 1].
            if is_wrong:
                target[start : cue - 1] = IGNORE
            else:
                target[cue - 1] = IGNORE
            start = cue

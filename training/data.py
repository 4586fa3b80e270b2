"""Data, as functions of the step: batch(step) depends on (data, seed, step) alone.

So a resumed run needs no position, no shuffling state and no random state to see what it would
have seen, and every process can take its own rows of the same batch.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .batch import IGNORE, Batch, Corpus, Source, join
from .cache import digest
from .config import TrainConfig
from .documents import Documents
from .problems import Problems
from .solutions import Solutions, SolverTraces
from .text import LongText
from .tokenizer import THOUGHT, Vocabulary, load_vocabulary

__all__ = ["IGNORE", "Batch", "Data", "load_data"]

PARTS = 1 << 20  # weights are rounded to so many parts, so that shares are computed in integers


class Data:
    """A mixture of one or more sources: every batch has rows of each, by weight."""

    def __init__(
        self,
        config: TrainConfig,
        vocabulary: Vocabulary,
        sources: Sequence[Source],
        weights: Sequence[float] = (),
        template: str | None = None,
    ):
        self.batch_size, self.context = config.batch_size, config.context
        self.vocabulary, self.sources = vocabulary, sources
        self.template = template
        """the chat template (Jinja) that conversations were written by, if there are any"""
        weights = weights or [1.0] * len(sources)
        self.weights = [max(1, round(PARTS * w / sum(weights))) for w in weights]

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that the model is saved with."""
        return self.vocabulary.tokenizer

    @property
    def fingerprint(self) -> str:
        """Equal for data whose batches are equal, under one configuration."""
        return digest([self.vocabulary.digest, *(source.fingerprint for source in self.sources)])

    def given(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source has given.

        Every source takes its share of what those before it have left, rounded down: within one
        row of its weight for the first, and never fewer for more rows.
        """
        left, parts, counts = rows, sum(self.weights), []
        for weight in self.weights:
            counts.append(left * weight // parts)
            left -= counts[-1]
            parts -= weight
        return counts

    def batch(self, step: int) -> Batch:
        """The global batch of a step."""
        starts = self.given(step * self.batch_size)
        ends = self.given((step + 1) * self.batch_size)
        pad = self.vocabulary.id(self.vocabulary.eos)
        parts = [
            source.rows(step, start, end - start)
            for source, start, end in zip(self.sources, starts, ends, strict=True)
            if end > start
        ]
        return join(parts, pad)

    def validation(self) -> Iterator[Batch]:
        """Batches that hold every validation token of every source once."""
        return chain.from_iterable(source.validation() for source in self.sources)

    def passes(self, steps: int) -> list[float | None]:
        """How often so many steps see each source; None for one that never repeats."""
        once = [getattr(source, "rows_once", None) for source in self.sources]
        given = self.given(steps * self.batch_size)
        return [rows / all_ if all_ else None for rows, all_ in zip(given, once, strict=True)]


def open_corpus(config: TrainConfig, name: str) -> Corpus:
    """What KIND:PLACE names, before any of it is read."""
    kind, _, place = name.partition(":")
    if kind == "samples":
        return Solutions(config, name, place)
    if kind == "task" and config.verifier:
        return SolverTraces(config, place)
    if kind == "task":
        return Problems(config, place)
    if kind == "text" and (Path(place).is_file() or not any(c in place for c in "*?[")):
        return LongText(config, name, place)
    return Documents(config, name, "jsonl" if kind == "json" else kind, place)


def load_data(config: TrainConfig) -> Data:
    """What `config.data` names, tokenized and packed; ValueError for what cannot be trained on.

    The first batch is drawn here too, so that a fault of the data is told before a run begins.
    """
    corpora = [open_corpus(config, name) for name in config.sources]
    vocabulary = load_vocabulary(config.tokenizer, corpora)
    chats = any(isinstance(c, Documents) and c.schema == "messages" for c in corpora)
    if chats:
        vocabulary = vocabulary.for_chats()
    sources = [corpus.source(config, vocabulary) for corpus in corpora]
    template = vocabulary.template if chats else None
    data = Data(config, vocabulary, sources, config.weights, template)
    data.batch(0)
    # A source's part of a batch varies by a row: the largest must be there too.
    given = np.array([data.given(step * config.batch_size) for step in range(1000)])
    for source, most in zip(sources, np.diff(given, axis=0).max(0).tolist(), strict=True):
        if most:
            source.rows(0, 0, most)
    if os.environ.get("RANK", "0") == "0":
        lines = [vocabulary.note, *_surprises(corpora, vocabulary, chats)]
        for source, passes in zip(sources, data.passes(config.steps), strict=True):
            times = f"; {config.steps:,} steps make {times_of(passes)} over it" if passes else ""
            lines.append(f"{source}{times}")
        print(*filter(None, lines), sep="\n")
    return data


def times_of(passes: float) -> str:
    """A number of passes over data in words: "0.52 passes", "13 passes"."""
    return f"{passes:.2g} passes" if passes < 10 else f"{passes:,.0f} passes"


def _surprises(corpora: Sequence[Corpus], vocabulary: Vocabulary, chats: bool) -> Iterator[str]:
    """What sweep and generate will do with the model that its data may not have been meant for."""
    schemas = [getattr(corpus, "schema", None) for corpus in corpora]
    raw = []  # what has prompts that no chat template wrote
    for corpus, schema in zip(corpora, schemas, strict=True):
        if isinstance(corpus, Problems) or schema in ("completion", "worked"):
            raw.append(corpus.name)
        if isinstance(corpus, LongText | Documents) and schema != "worked" and corpus.thinks():
            yield (
                f"{corpus.name} holds <think>, which becomes a token of its own: sweep and "
                "generate will take the model for one that thinks before it answers"
            )
    if chats and raw:
        yield (
            "conversations give the model a chat template: sweep and generate ask by it, also what "
            f"{' and '.join(raw)} teaches without it"
        )
    known = vocabulary.tokenizer.get_vocab()
    if not chats and not any(c.thinks() for c in corpora) and known.keys() >= {*THOUGHT}:
        yield (
            "the tokenizer has <think>, which the data do not hold: sweep and generate open a "
            "thought behind each prompt all the same"
        )

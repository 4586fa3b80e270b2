"""Data sets of documents: tokenized once, packed into rows, every row once an epoch."""

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .batch import Batch, Epochs
from .cache import cached
from .config import TrainConfig
from .packing import PackedRows, Pieces, Shorten, cut, pack
from .render import renderer, schema_of
from .sources import open_rows
from .tokenizer import THOUGHT, Vocabulary, check_known, specials
from .tokens import open_tokens, tokenize

LOOK_ROWS = 256  # that say whether a data set holds thoughts
LEARN_CHARACTERS = 100_000_000  # a tokenizer learns from the beginning of a data set


class Documents:
    """Rows of files or of the Hub, each a document or a few (a `Corpus`)."""

    alphabet = None

    def __init__(self, config: TrainConfig, name: str, kind: str, place: str):
        self.name, self.limit = name, config.data_tokens
        self.data, self.column = open_rows(kind, place, stream=self.limit > 0)
        self.identity = [self.data.identity, self.column, self.limit]

    @cached_property
    def look(self) -> dict[str, Any]:
        """What its first rows are: "schema", that every other one must have, and "thinks"."""

        def look(folder: Path) -> dict[str, Any]:
            first = list(islice(self.data.train(), LOOK_ROWS))
            if not first:
                raise ValueError(f"{self.name} holds no row; there is nothing to train on")
            schema = schema_of(first[0], self.column)
            documents = chain.from_iterable(map(renderer(schema, self.column), first))
            thinks = any(THOUGHT[0] in text for document in documents for text, _ in document.parts)
            return {"schema": schema, "thinks": thinks}

        return cached("look", self.identity, look)[1]

    @property
    def schema(self) -> str:
        return self.look["schema"]

    def thinks(self) -> bool:
        return self.look["thinks"]

    def texts(self) -> Iterator[str]:
        special = re.compile("|".join(map(re.escape, specials(self.thinks()))))
        render = renderer(self.schema, self.column)
        for rows in (self.data.train(), self.data.validation()):
            left = min(LEARN_CHARACTERS, 16 * self.limit or LEARN_CHARACTERS)
            bar = tqdm(rows, f"learning from {self.name}", unit=" rows", leave=False)
            for document in chain.from_iterable(map(render, bar)):
                for text, _ in document.parts:
                    yield from special.split(text)
                    left -= len(text)
                if left <= 0:
                    break

    def source(self, config: TrainConfig, vocabulary: Vocabulary) -> "PackedDocuments":
        words = vocabulary
        render = renderer(self.schema, self.column, words.eos, words.template, words.bos or "")
        masked = self.schema != "text"

        def write(folder: Path) -> dict[str, Any]:
            return tokenize(folder, self.name, self.data, render, vocabulary, self.limit, masked)

        tokens, facts = cached("tokens", [self.identity, vocabulary.digest, vocabulary.bos], write)
        check_known(facts["unknown"], facts["tokens"], self.name, config)
        arrays = open_tokens(tokens, vocabulary, masked)

        def fill(folder: Path) -> dict[str, Any]:
            return _pack(folder, tokens, arrays[1], config.context)

        rows, packed = cached("rows", [tokens.name, config.context], fill)
        for part, which in (("train", "to train on"), ("held_out", "that are held out")):
            if not packed[part]["rows"]:
                raise ValueError(
                    f"the documents of {self.name} {which} hold nothing to learn in their first "
                    f"{config.context} tokens; give others, or a longer context"
                )
        return PackedDocuments(self, config, vocabulary, arrays, facts, rows, packed)


def _pack(folder: Path, tokens: Path, loss: np.ndarray | None, context: int) -> dict[str, Any]:
    offsets = np.load(tokens / "offsets.npy", mmap_mode="r")
    held_out = np.load(tokens / "held_out.npy", mmap_mode="r")
    pieces, document = cut(offsets, context)
    slots = np.diff(offsets) - 1
    kept = np.ones(len(document), dtype=bool)
    if loss is not None:
        # A part of a long prompt may have nothing to learn, and a later piece lacks its prompt.
        edges = np.stack([pieces.start + 1, pieces.start + pieces.length + 1], 1).reshape(-1)
        edges = edges[edges < len(loss)]  # the very end is no index
        kept = np.logical_or.reduceat(loss, edges)[::2] & (pieces.start == offsets[document])
    facts: dict[str, Any] = {"long": int((slots > context).sum()), "longest": int(slots.max())}
    for name, chosen in (("train", ~held_out[document]), ("held_out", held_out[document])):
        chosen &= kept
        facts[name] = pack(folder, name, Pieces(*(part[chosen] for part in pieces)), context)
    return facts


class PackedDocuments:
    """Packed rows in an order of their own for every epoch (a `Source`)."""

    def __init__(
        self,
        corpus: Documents,
        config: TrainConfig,
        vocabulary: Vocabulary,
        arrays: tuple[np.ndarray, np.ndarray | None],
        facts: dict[str, Any],
        rows: Path,
        packed: dict[str, Any],
    ):
        self.name, self.config, self.facts, self.packed = corpus.name, config, facts, packed
        self.fingerprint = [facts["content"], facts["held_out"]]
        pad = vocabulary.id(vocabulary.eos)
        self.train, self.held_out = (
            PackedRows(rows, name, config.context, *arrays, pad) for name in ("train", "held_out")
        )
        self.rows_once = float(len(self.train))
        self.shorten = None
        if corpus.schema == "worked" and config.full_traces < 1:
            ends = vocabulary.id("<think>"), vocabulary.id("</think>")
            count = len(self.train.start)
            self.shorten = Shorten(*ends, config.full_traces, count, config.seed)
        self.epochs = Epochs(len(self.train), config.seed)

    def rows(self, step: int, start: int, count: int) -> Batch:
        if count > len(self.train):
            raise ValueError(
                f"{self.name} fills {len(self.train)} rows of {self.config.context} tokens, and a "
                f"batch takes {count} of them; lower batch_size or context, or give more data"
            )
        rows, epochs = self.epochs.rows(start, count)
        return self.train.batch(rows, self.shorten, epochs)

    def validation(self) -> Iterator[Batch]:
        size = max(1, 8192 // self.config.context)
        every = np.arange(len(self.held_out))
        for first in range(0, len(every), size):
            yield self.held_out.batch(every[first : first + size])

    def beginnings(self, count: int, room: int) -> list[tuple[list[int], list[int] | None]]:
        """What held-out documents begin with, and the answer up to <eos> that is to follow: each up
        to where the loss begins, with `room` for tokens or a quarter of the context behind it.
        Where the loss is on all of it a quarter of a document, and None."""
        held, found = self.held_out, []
        longest = self.config.context - min(room, self.config.context // 4)
        for piece in np.random.default_rng(0).permutation(len(held.start)):
            start, length = int(held.start[piece]), int(held.length[piece])
            ids = held.tokens[start : start + length + 1].tolist()
            if held.loss is None:
                found.append((ids[: max(1, length // 4)], None))
            else:
                learned = held.loss[start : start + length + 1]
                begin = max(1, int(learned.argmax()))
                rest = ids[begin:]
                end = int((~learned[begin:]).argmax()) or len(rest)  # of a chat's first answer
                if begin <= longest:
                    found.append((ids[:begin], [t for t in rest[:end] if t != held.pad]))
            if len(found) == count:
                break
        return found

    def __str__(self) -> str:
        train, long = self.packed["train"], self.packed["long"]
        full = train["tokens"] / (train["rows"] * self.config.context)
        text = (
            f"{self.name}: {self.facts['documents'] - self.facts['held_out']:,} documents to train "
            f"on, {self.facts['held_out']:,} held out; {train['rows']:,} rows, {full:.1%} full"
        )
        if long:
            lost = ": what is beyond it is not learned" if self.train.loss is not None else ""
            text += (
                f"; {long:,} documents are longer than the context of {self.config.context} and "
                f"cut{lost} (the longest has {self.packed['longest']:,} tokens)"
            )
        if self.facts["unknown"]:
            text += f"; {self.facts['unknown']:,} tokens are <unk>"
        return text

"""One long text: random windows to train on, the last part to validate, each token once."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .batch import Batch, padded
from .cache import cached
from .config import TrainConfig
from .sources import Files, read_text
from .tokenizer import THOUGHT, Vocabulary, check_known

PARTS = ("train", "validation")


class LongText:
    """A file of text (a `Corpus`): its last tenth validates, as in nanoGPT."""

    alphabet = None

    def __init__(self, config: TrainConfig, name: str, path: str):
        self.name, self.path = name, Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no text file {path}")
        self.identity = Files("text", path).identity

    def thinks(self) -> bool:
        def look(folder: Path) -> dict[str, Any]:
            return {"thinks": any(THOUGHT[0] in part for part in self.parts)}

        return cached("thinks", self.identity, look)[1]["thinks"]

    @cached_property
    def parts(self) -> tuple[str, str]:
        text = read_text(self.path)
        cut = int(0.9 * len(text))
        return text[:cut], text[cut:]

    def texts(self) -> Iterator[str]:
        return iter(self.parts)

    def source(self, config: TrainConfig, vocabulary: Vocabulary) -> "Windows":
        def write(folder: Path) -> dict[str, Any]:
            content, unknown = hashlib.sha256(), 0
            unknown_id = vocabulary.tokenizer.token_to_id("<unk>")
            for name, text in zip(PARTS, self.parts, strict=True):
                ids = np.array(vocabulary.tokenizer.encode(text).ids, dtype=np.int32)
                np.save(folder / f"{name}.npy", ids)
                content.update(ids.tobytes())
                unknown += int((ids == unknown_id).sum())
            return {"content": content.hexdigest()[:20], "unknown": unknown}

        folder, facts = cached("windows", [self.identity, vocabulary.digest], write)
        self.__dict__.pop("parts", None)  # the text is not needed any more
        train, held_out = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in PARTS)
        check_known(facts["unknown"], len(train) + len(held_out), self.name, config)
        return Windows(config, self.name, train, held_out, facts["content"], facts["unknown"])


class Windows:
    """Random windows of a text's tokens (a `Source`)."""

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        train: np.ndarray,
        held_out: np.ndarray,
        fingerprint: str,
        unknown: int = 0,
    ):
        """train, held_out: token ids, 1-D; unknown: how many are <unk>."""
        self.name, self.config, self.train, self.held_out = name, config, train, held_out
        self.fingerprint, self.unknown = fingerprint, unknown
        self.rows_once = len(train) / config.context
        for part, tokens in (("training", train), ("validation", held_out)):
            if len(tokens) <= config.context:
                raise ValueError(
                    f"the {part} part of {name} has {len(tokens)} tokens; "
                    f"a context of {config.context} needs at least {config.context + 1}"
                )

    def __str__(self) -> str:
        text = (
            f"{self.name}: {len(self.train):,} tokens to train on, {len(self.held_out):,} held out"
        )
        if self.unknown:
            text += f"; {self.unknown:,} tokens are <unk>"
        return text

    def rows(self, step: int, start: int, count: int) -> Batch:
        c = self.config
        draw = np.random.default_rng([c.seed, step])
        first = draw.integers(len(self.train) - c.context, size=count)
        index = first[:, None] + np.arange(c.context + 1)
        rows = torch.from_numpy(self.train[index].astype(np.int64))
        return Batch(rows[:, :-1], rows[:, 1:])

    def beginnings(self, count: int, room: int) -> list[tuple[list[int], None]]:
        """What held-out rows begin with: a quarter of a context of each."""
        rows = next(self.validation()).tokens[:count]
        return [(row, None) for row in rows[:, : max(1, rows.shape[1] // 4)].tolist()]

    def validation(self) -> Iterator[Batch]:
        context = self.config.context
        starts = range(0, len(self.held_out) - 1, context)
        spans = [self.held_out[start : start + context + 1] for start in starts]
        rows = max(1, 8192 // context)
        for first in range(0, len(spans), rows):
            pairs = [(span[:-1], span[1:]) for span in spans[first : first + rows]]
            yield padded(pairs, context, 0)

"""A data set as one long array of tokens on disk, with the loss mask and the held-out documents."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .render import Document, Row
from .sources import Rows
from .tokenizer import Vocabulary

VALIDATION_SHARE, VALIDATION_TOKENS = 0.05, 1_000_000  # held out: whichever is less
VALIDATION_DOCUMENTS = 0.25  # of all, at most: one long document must not hold out all the others
BLOCK = 512  # documents that are tokenized in one call


def tokenize(
    folder: Path,
    name: str,
    data: Rows,
    render: Callable[[Row], Iterable[Document]],
    vocabulary: Vocabulary,
    limit: int,
    masked: bool,
) -> dict[str, Any]:
    """Write tokens.bin, loss.bin where `masked`, offsets.npy and held_out.npy, as rows come.

    limit: no further document once there are so many tokens; 0: all of them. The data set's own
    validation split is held out, up to VALIDATION_TOKENS; where it has none, what `render` says
    is held (questions that a sweep may ask; those beyond VALIDATION_TOKENS are left out), or what
    `hold_out` chooses.
    """
    dtype, unknown_id = _dtype(vocabulary), vocabulary.tokenizer.token_to_id("<unk>")
    lengths, keys, held, content = array("q"), array("Q"), array("b"), hashlib.sha256()
    unknown = trained = asked = 0
    own = iter(data.validation())
    first = next(own, None)

    def write(rows: Iterable[Row], title: str, total: int | None, most: int) -> None:
        nonlocal unknown, asked
        count = 0
        with tqdm(rows, title, total, unit=" rows") as bar:
            for document, ids, loss in _encoded(chain.from_iterable(map(render, bar)), vocabulary):
                if document.held and first is None:
                    if asked >= VALIDATION_TOKENS:
                        continue
                    asked += len(ids)
                for file, values in ((tokens, ids.astype(dtype)), (targets, loss))[: 1 + masked]:
                    file.write(raw := values.tobytes())
                    content.update(raw)
                lengths.append(len(ids))
                key = hashlib.blake2b(document.key.encode(), digest_size=8).digest()
                keys.append(int.from_bytes(key, "little"))
                held.append(document.held)
                unknown += int((ids == unknown_id).sum())
                count += len(ids)
                bar.set_postfix(tokens=f"{count:,}", refresh=False)
                if most and count >= most:
                    return

    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "loss.bin", "wb") as targets:
        write(data.train(), f"tokenizing {name}", data.total(), limit)
        trained = len(lengths)
        if first is not None:
            title = f"tokenizing {name}, validation"
            write(chain([first], own), title, None, VALIDATION_TOKENS)
    if not masked:
        (folder / "loss.bin").unlink()
    counts = np.array(lengths, dtype=np.int64)
    held_out = np.arange(len(counts)) >= trained
    if not held_out.any():
        held_out = np.array(held, dtype=bool)
        if not held_out.any() or held_out.all():
            held_out = hold_out(np.array(keys, dtype=np.uint64), counts)
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"{name} holds {len(counts)} documents; at least one to train on and one to validate "
            "are needed"
        )
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]))
    np.save(folder / "held_out.npy", held_out)
    return {
        "documents": len(counts),
        "held_out": int(held_out.sum()),
        "tokens": int(counts.sum()),
        "unknown": unknown,
        "content": content.hexdigest()[:20],
    }


def open_tokens(
    folder: Path, vocabulary: Vocabulary, masked: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens (N,) and which of them are targets (N,) bool, None: all. Both stay on disk."""
    tokens = np.memmap(folder / "tokens.bin", dtype=_dtype(vocabulary), mode="r")
    return tokens, np.memmap(folder / "loss.bin", dtype=bool, mode="r") if masked else None


def _dtype(vocabulary: Vocabulary) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary.size <= 1 << 16 else np.uint32


def _encoded(
    documents: Iterator[Document], vocabulary: Vocabulary
) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
    """Each document with its token ids, and which of them are targets.

    Parts are encoded one by one: what a model is given at inference is encoded without what it
    will answer, too.
    """
    encode = vocabulary.tokenizer.encode_batch_fast
    prefix = np.array(vocabulary.prefix, dtype=np.int64), np.zeros(len(vocabulary.prefix), bool)
    while block := list(islice(documents, BLOCK)):
        texts = [text for document in block for text, _ in document.parts]
        encodings = iter(encode(texts, add_special_tokens=False))
        for document in block:
            ids, loss = ([], []) if document.chat else ([prefix[0]], [prefix[1]])
            for (_, learned), part in zip(document.parts, encodings, strict=False):
                ids.append(np.array(part.ids, dtype=np.int64))
                loss.append(np.full(len(part.ids), learned))
            yield document, np.concatenate(ids), np.concatenate(loss)


def hold_out(keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Which documents validate: those of the smallest hashes, (N,) bool.

    Documents of one key stay together, so that none is learned and then asked for, unless too many
    have that key.
    """
    order = np.argsort(keys, kind="stable")
    most = min(VALIDATION_SHARE * lengths.sum(), VALIDATION_TOKENS)
    fits = order[lengths[order] <= most]  # one long document is no validation set
    order = fits if len(fits) else order[np.argsort(lengths[order], kind="stable")]
    count = int(np.searchsorted(np.cumsum(lengths[order]), most, side="right"))
    count = max(1, min(count, int(VALIDATION_DOCUMENTS * len(keys))))
    held_out = np.isin(keys, keys[order[:count]])
    if held_out.sum() > 2 * count or held_out.all():
        held_out = np.isin(np.arange(len(keys)), order[:count])
    return held_out

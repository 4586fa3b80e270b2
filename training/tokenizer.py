"""Tokenizers, built here or read from disk, always as `tokenizers.Tokenizer`."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<eos>", "<think>", "</think>", "<unk>")


def character_tokenizer(alphabet: Iterable[str]) -> Tokenizer:
    """One token a character, in code-point order, behind the special tokens."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *sorted(set(alphabet))))}
    # BPE with no merges splits into characters; it is twice as fast as a splitting expression.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return tokenizer


def bpe_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level byte-pair encoding with `size` tokens, trained on the texts (Sennrich 2016)."""
    if size < 256 + len(SPECIAL):
        raise ValueError(f"a BPE tokenizer of {size} tokens is too small; at least 260 are needed")
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_tokenizer(kind: str, texts: list[str]) -> Tokenizer:
    """`char`, `bpe:SIZE`, or the path of a tokenizer.json; the texts are what it learns from."""
    if kind == "char":
        return character_tokenizer(set().union(*texts))
    if kind.startswith("bpe:"):
        size = kind.removeprefix("bpe:")
        if not size.isdigit():
            raise ValueError(f"tokenizer is {kind!r}; bpe needs a number of tokens, as in bpe:4096")
        return bpe_tokenizer(texts, int(size))
    path = Path(kind)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"tokenizer is {kind!r}; it must be char, bpe:SIZE or a tokenizer.json")
    return Tokenizer.from_file(str(path))

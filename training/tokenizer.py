"""Tokenizers, learned from the data or read from disk, always as `tokenizers.Tokenizer`."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..models import hub
from .cache import cached, digest
from .config import TrainConfig
from .render import PLAIN_TEMPLATE, write_chat

if TYPE_CHECKING:
    from .batch import Corpus

SPECIAL = ("<eos>", "<think>", "</think>", "<unk>")
THOUGHT = SPECIAL[1:3]
UNKNOWN_SHARE = 0.1  # of the tokens, beyond which there is no use in training on them
# What ends a text in the tokenizers of others, where no tokenizer_config.json says it.
ENDS = ("<eos>", "<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>")
FILES = ("tokenizer.json", hub.SETTINGS, hub.TEMPLATE)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and what one must know about it to write documents."""

    tokenizer: Tokenizer
    eos: str = "<eos>"
    """the token that ends a document"""
    bos: str | None = None
    """the token that begins one, where the tokenizer names one"""
    template: str | None = None
    """its chat template (Jinja), if it has one"""
    note: str = ""
    """what a user should know of it"""
    added: int = 0
    """how many ids the tokens take that it was given, behind its own"""

    @cached_property
    def digest(self) -> str:
        return digest([self.tokenizer.to_str(), self.eos, self.template])

    @cached_property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before every text: often nothing, or a token of beginning."""
        said = self.tokenizer.encode("a")
        given = zip(said.ids, said.special_tokens_mask, strict=True)
        return [id for id, _ in takewhile(lambda token: token[1], given)]

    def for_chats(self) -> "Vocabulary":
        """The same with a chat template, documents ending as it ends an answer: what ends one in a
        base model's template is often not the token that ends its texts."""
        opening = "".join(self.tokenizer.id_to_token(i) or "" for i in self.prefix)
        template, answer = self.template or opening + PLAIN_TEMPLATE, "Yes."
        said = [{"role": "user", "content": "No?"}, {"role": "assistant", "content": answer}]
        try:
            text = write_chat(template, self.eos, self.bos or "", said)
        except Exception:  # it wants other turns, which the data may have
            return replace(self, template=template)
        behind = self.tokenizer.encode(text.rpartition(answer)[2], add_special_tokens=False).ids
        added = self.tokenizer.get_added_tokens_decoder()
        end = next((added[i].content for i in behind if i in added and added[i].special), None)
        if end is None:  # without one no answer would end
            template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
        if end in (None, self.eos):
            return replace(self, template=template)
        note = f"{self.note}, but as its chat template ends answers: with {end}"
        return replace(self, template=template, eos=end, note=note)

    @property
    def size(self) -> int:
        """One more than the largest id (the ids of some tokenizers have holes)."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def id(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no {token} token")
        return number


def check_vocabulary(size: int, vocab_size: int, model: str) -> None:
    """ValueError where a tokenizer of `size` ids has some that a model of `vocab_size` does not."""
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {size - 1} and {model} only {vocab_size} tokens; "
            "take the tokenizer that it was trained with"
        )


def check_known(unknown: int, tokens: int, name: str, config: TrainConfig) -> None:
    """ValueError where a tokenizer hardly knows the data: to learn <unk> behind <unk> is easy."""
    if unknown > UNKNOWN_SHARE * tokens:
        way = "take another, such as --tokenizer byte, which knows any text"
        if config.init:
            way = f"{config.init} cannot learn this text: train a new model, without --init"
        raise ValueError(
            f"{unknown / tokens:.0%} of the tokens of {name} are <unk>: the tokenizer "
            f"{config.tokenizer} does not know its characters; {way}"
        )


def specials(thinks: bool) -> list[str]:
    """The special tokens of a learned tokenizer, by which engines tell whether a model thinks."""
    return [token for token in SPECIAL if thinks or token not in THOUGHT]


def character_tokenizer(alphabet: Iterable[str], *, thinks: bool = True) -> Tokenizer:
    """One token a character, in code-point order, behind the special tokens."""
    special = specials(thinks)
    vocabulary = {token: i for i, token in enumerate((*special, *sorted(set(alphabet))))}
    # BPE with no merges splits into characters; it is twice as fast as a splitting expression.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return _thoughts_shown(tokenizer)


def bpe_tokenizer(texts: Iterable[str], size: int, *, thinks: bool = True) -> Tokenizer:
    """Byte-level byte-pair encoding with `size` tokens, trained on the texts (Sennrich 2016)."""
    special = specials(thinks)
    if size < 256 + len(special):
        raise ValueError(
            f"a BPE tokenizer of {size} tokens is too small; at least {256 + len(special)} are "
            "needed"
        )
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _thoughts_shown(tokenizer)


def _thoughts_shown(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with <think> and </think> as tokens that are text, as in Qwen3's: servers leave
    what is special out of what they answer."""
    said = json.loads(tokenizer.to_str())
    for token in said["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in THOUGHT
    return Tokenizer.from_str(json.dumps(said))


def byte_tokenizer(*, thinks: bool = True) -> Tokenizer:
    """One token a byte of UTF-8: 256 of them behind the special tokens, for any text there is."""
    return bpe_tokenizer([], 256 + len(specials(thinks)), thinks=thinks)


def load_vocabulary(kind: str, corpora: Sequence["Corpus"]) -> Vocabulary:
    """`char`, `byte`, `bpe:SIZE`, a tokenizer.json or its folder, or the id of one on the Hub.

    What is learned from the corpora is learned once: the cache keeps it. Only where they hold
    thoughts are <think> and </think> among its tokens. A tokenizer from elsewhere is given the
    tokens that the corpora need and it lacks; its note says so.
    """
    thinks = any(corpus.thinks() for corpus in corpora)
    if kind == "byte":
        return Vocabulary(byte_tokenizer(thinks=thinks))
    if kind == "char" or kind.startswith("bpe:"):
        return Vocabulary(_learned(kind, corpora, thinks))
    return _read(kind, thinks)


def _learned(kind: str, corpora: Sequence["Corpus"], thinks: bool) -> Tokenizer:
    size = kind.removeprefix("bpe:")
    if kind != "char" and not size.isdecimal():
        raise ValueError(f"tokenizer is {kind!r}; bpe needs a number of tokens, as in bpe:4096")
    alphabets = [corpus.alphabet for corpus in corpora]
    if kind == "char" and None not in alphabets:
        return character_tokenizer("".join(map(str, alphabets)), thinks=thinks)

    def learn(folder: Path) -> dict[str, Any]:
        texts = (text for corpus in corpora for text in corpus.texts())
        if kind == "char":
            tokenizer = character_tokenizer(set().union(*texts), thinks=thinks)
        else:
            tokenizer = bpe_tokenizer(texts, int(size), thinks=thinks)
        text = tokenizer.to_str(pretty=True)  # tokenizers raises no OSError on a full disk
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        return {}

    folder, _ = cached("tokenizer", [kind, thinks, *(c.identity for c in corpora)], learn)
    return hub.read_tokenizer(folder / "tokenizer.json")


def _read(kind: str, thinks: bool) -> Vocabulary:
    file = _file(kind)
    tokenizer = hub.read_tokenizer(file)
    # Both may be set in a tokenizer.json, and would cut or fill what is encoded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = hub.read_settings(file.with_name(hub.SETTINGS))
    vocabulary = tokenizer.get_vocab()
    begins, ends = (
        token.get("content") if isinstance(token, dict) else token
        for token in map(settings.get, ("bos_token", "eos_token"))
    )
    bos = begins if isinstance(begins, str) and begins in vocabulary else None
    eos = next(
        (end for end in (ends, *ENDS) if isinstance(end, str) and end in vocabulary), ENDS[0]
    )
    needed = (eos, *(THOUGHT if thinks else ()))
    missing = [token for token in needed if token not in vocabulary]
    note = f"the tokenizer {kind} ends documents with {eos}"
    own = Vocabulary(tokenizer).size
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if not known.issuperset(needed):
        # What is a word of the model alone is not found in a text that has it.
        tokenizer.add_special_tokens([token for token in needed if token not in known])
        tokenizer = _thoughts_shown(tokenizer)
    if missing:
        ids = ", ".join(str(tokenizer.token_to_id(token)) for token in missing)
        note += f"; {' and '.join(missing)} it had not: added as {ids}"
    added = Vocabulary(tokenizer).size - own
    return Vocabulary(tokenizer, eos, bos, hub.load_template(file.parent), note, added)


def _file(kind: str) -> Path:
    """The tokenizer.json that `kind` names, fetched from the Hub where it is an id."""
    path = Path(kind)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / FILES[0]).is_file():
            raise ValueError(f"the folder {kind} holds no {FILES[0]}")
        return path / FILES[0]
    if not re.fullmatch(hub.HUB_ID, kind):
        raise ValueError(
            f"tokenizer is {kind!r}; it must be char, byte, bpe:SIZE, a tokenizer.json or its "
            "folder, or the OWNER/NAME of one on the Hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(kind, allow_patterns=list(FILES))) / FILES[0]
    except Exception as error:  # no network, no such model, no permission: all are told alike
        raise ValueError(
            f"there is no tokenizer file {kind}, and none of that name could be fetched from the "
            f"Hugging Face hub: {hub.first_line(error)}"
        ) from None

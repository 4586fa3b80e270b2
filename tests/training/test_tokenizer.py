"""Tokenizers: learned here, read from files of others, and what they are given."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from ponder.training.tokenizer import (
    SPECIAL,
    Vocabulary,
    bpe_tokenizer,
    byte_tokenizer,
    character_tokenizer,
    check_vocabulary,
    load_vocabulary,
)

TEXT = "To be, or not to be: that is the question.\n" * 40


class Text:
    """A corpus of TEXT."""

    name = identity = "TEXT"
    alphabet = None
    reads = 0

    def __init__(self, thinks=False):
        self.thinks = lambda: thinks

    def texts(self):
        Text.reads += 1
        yield TEXT


def test_character_tokenizer_round_trip():
    tokenizer = character_tokenizer(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert [tokenizer.token_to_id(t) for t in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.encode("<think>be</think>").ids[0] == 1
    assert tokenizer.encode("€").ids == [3]


def test_bpe_tokenizer_round_trip():
    tokenizer = bpe_tokenizer([TEXT], 300)
    ids = tokenizer.encode(TEXT + "€").ids
    assert tokenizer.decode(ids) == TEXT + "€"
    assert len(ids) < len(TEXT) / 2
    with pytest.raises(ValueError, match="too small"):
        bpe_tokenizer([TEXT], 100)


BYTES = byte_tokenizer()


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_byte_tokenizer_has_one_token_a_byte_of_any_text(text):
    ids = BYTES.encode(text).ids
    if not any(token in text for token in SPECIAL):
        assert len(ids) == len(text.encode())
    assert BYTES.decode(ids, skip_special_tokens=False) == text
    assert BYTES.get_vocab_size() == 256 + len(SPECIAL)


@pytest.mark.parametrize("kind", ["char", "bpe:300"])
def test_what_is_learned_is_learned_once(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path))
    reads = Text.reads
    one, two = (load_vocabulary(kind, [Text()]) for _ in range(2))
    assert Text.reads == reads + 1
    assert one.digest == two.digest and one.tokenizer.to_str() == two.tokenizer.to_str()
    assert one.tokenizer.decode(one.tokenizer.encode(TEXT).ids) == TEXT


@pytest.fixture
def foreign(tmp_path):
    """A tokenizer as others leave it: its own end, a beginning, truncation, a chat template."""
    tokenizer = Tokenizer(models.WordLevel({"be": 0, "or": 1, "not": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|end|>"), AddedToken("<|begin|>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 5), ("<|end|>", 4)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages }}"}
    settings |= {"bos_token": "<|begin|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_tokenizer_of_others_keeps_its_own_end_and_gets_what_it_lacks(foreign):
    plain = load_vocabulary(str(foreign), [Text()])
    assert plain.note.endswith("ends documents with <|end|>")
    assert (plain.eos, plain.size, plain.template) == ("<|end|>", 6, "{{ messages }}")
    assert plain.prefix == [5] and plain.bos == "<|begin|>"
    ids = plain.tokenizer.encode("be or not be", add_special_tokens=False).ids
    assert ids == [0, 1, 2, 0]  # neither truncated nor padded
    thinking = load_vocabulary(str(foreign / "tokenizer.json"), [Text(thinks=True)])
    assert "; <think> and </think> it had not: added as 6, 7" in thinking.note
    assert (plain.added, thinking.added) == (0, 2)
    ids = thinking.tokenizer.encode("<think>be", add_special_tokens=False).ids
    assert ids == [6, 0] and "<think>" in thinking.tokenizer.decode(ids)
    (foreign / "tokenizer_config.json").unlink()
    (foreign / "chat_template.jinja").write_text("{{ eos_token }}")
    bare = load_vocabulary(str(foreign), [Text()])
    assert (bare.eos, bare.bos, bare.template) == ("<eos>", None, "{{ eos_token }}")
    assert "; <eos> it had not: added as 6" in bare.note
    (foreign / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: this is not JSON"):
        load_vocabulary(str(foreign), [Text()])


def test_an_end_that_is_but_a_word_of_the_model_is_found_in_a_text(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"be": 0, "</s>": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = load_vocabulary(str(tmp_path), [Text()])
    assert (read.eos, read.size, read.added) == ("</s>", 3, 0) and "had not" not in read.note
    assert read.tokenizer.encode("be</s>").ids == [0, 1]


@pytest.mark.parametrize(
    ("pattern", "prefix"), [("<e> $A", [1]), ("$A <e>", []), ("<e> $A <e>", [1]), ("$A", [])]
)
def test_what_stands_before_every_text(pattern, prefix):
    """Also where one token is beginning and end, as OPT's."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<e>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[("<e>", 1)]
    )
    assert Vocabulary(tokenizer, "<e>").prefix == prefix


def test_ids_beyond_the_model_are_named(foreign):
    size = Vocabulary(Tokenizer.from_file(str(foreign / "tokenizer.json"))).size
    check_vocabulary(size, 6, "the checkpoint")
    with pytest.raises(ValueError, match="ids up to 5 and the checkpoint only 5 tokens"):
        check_vocabulary(size, 5, "the checkpoint")
    holes = Tokenizer(models.WordLevel({"be": 0, "or": 9}, unk_token="be"))
    assert Vocabulary(holes).size == 10


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bpe:many", "tokenizer is 'bpe:many'; bpe needs a number of tokens, as in bpe:4096"),
        ("words", "tokenizer is 'words'; it must be char, byte, bpe:SIZE"),
        ("FOLDER", "holds no tokenizer.json"),
        ("FOLDER/broken.json", "broken.json is not a tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_named(kind, message, tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        load_vocabulary(kind.replace("FOLDER", str(tmp_path)), [Text()])


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:300"])
def test_only_a_corpus_with_thoughts_makes_them_tokens(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path))
    plain, thinking = (load_vocabulary(kind, [Text(thinks)]) for thinks in (False, True))
    assert plain.tokenizer.token_to_id("<think>") is None
    assert plain.tokenizer.token_to_id("</think>") is None
    assert (plain.id("<eos>"), plain.id("<unk>")) == (0, 1)
    assert thinking.id("</think>") == 2
    mixed = load_vocabulary(kind, [Text(), Text(thinks=True)])
    assert mixed.id("<think>") == 1


@pytest.mark.parametrize("tokenizer", [character_tokenizer("19"), BYTES])
def test_a_thought_is_text_and_the_end_is_none(tokenizer):
    ids = tokenizer.encode("<think>1</think>9<eos>").ids
    assert len(ids) == 5
    # As a server decodes; what it leaves out could stop no sample at </think>.
    assert tokenizer.decode(ids) == "<think>1</think>9"

"""Chat templates and the spelling of thoughts."""

import json

import pytest

from ponder.inference.chat import ChatTokenizer, printable, think_tokens, thoughtful
from ponder.training.tokenizer import character_tokenizer

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Ponder's own: a space stands between what asks for an answer and the answer.
SPACED = "[user]{{ messages[0].content }}{% if messages | length > 1 %}: {{ messages[1].content }}"
SPACED += "{% elif add_generation_prompt %}:{% endif %}"
ASKS = "[user]{{ messages[0].content }}:{% if messages | length > 1 %}{{ raise_exception('no') }}"
ALPHABET = "0123456789+-*=[]abcdefghijklmnopqrstuvwxyz.: \n"


@pytest.fixture
def tokenizer(tmp_path):
    """Makes the folder of a tokenizer with that template, of a model that thinks or not."""

    def make(template: str | None, thinks: bool = True) -> str:
        character_tokenizer(ALPHABET, thinks=thinks).save(str(tmp_path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
        if template:
            settings["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("template", "think", "text"),
    [
        (None, False, "1+1=<think>"),
        (None, True, "1+1=<think>"),
        (PLAIN, False, "[system]be brief.\n[user]1+1=\n[assistant]"),
        (PLAIN, True, "[system]be brief.\n[user]1+1=\n[assistant]<think>\n"),
        # Some open the thought themselves, whether it is asked for or not.
        (PLAIN + "{{ '<think>\n' }}", True, "[system]be brief.\n[user]1+1=\n[assistant]<think>\n"),
        (PLAIN + "{{ '<think>\n' }}", False, "[system]be brief.\n[user]1+1=\n[assistant]<think>\n"),
        # And some ask whether they should.
        (PLAIN + "{{ '<think>' if enable_thinking else '' }}", False, None),
        (SPACED, True, "[user]1+1=: <think>\n"),
        (SPACED, False, "[user]1+1=:"),
        (ASKS + "{% endif %}", True, "[user]1+1=:<think>\n"),
    ],
)
def test_a_prompt_is_rendered_as_its_model_expects_it(tokenizer, template, think, text):
    system = "be brief." if template and template.startswith(PLAIN) else None
    chat = ChatTokenizer(tokenizer(template), system=system, think=think)
    text = text or "[system]be brief.\n[user]1+1=\n[assistant]<think>"
    assert chat.render("1+1=") == text
    tokens, opened = chat.encode("1+1=")
    assert opened == text.rstrip().endswith("<think>")
    assert chat.tokenizer.decode(tokens) == text
    think_id = chat.tokenizer.convert_tokens_to_ids("<think>")
    assert tokens.count(think_id) == opened


def test_a_prompt_of_a_model_that_does_not_think_stays_as_it_is(tokenizer):
    chat = ChatTokenizer(tokenizer(None, thinks=False), system=None, think=False)
    assert chat.render("1+1=") == "1+1="
    tokens, opened = chat.encode("1+1=")
    assert len(tokens) == 4 and not opened


@pytest.mark.parametrize(
    ("template", "prompt", "system", "message"),
    [
        (PLAIN, "", None, "the prompt is empty"),
        (PLAIN, "1\ud800=", None, r"the prompt has '\\ud800', which is no character of Unicode"),
        (PLAIN, "1é=", None, r"the prompt '1é=' holds what the tokenizer of .* does not know"),
        (
            PLAIN + "{{ raise_exception('no\x1b system') }}",
            "1=",
            "x",
            r"refuses the prompt: no\\x1b",
        ),
        (None, "1=", "x", "has no chat template"),
    ],
)
def test_a_prompt_that_cannot_be_rendered_gets_one_sentence(
    tokenizer, template, prompt, system, message
):
    with pytest.raises(ValueError, match=message) as error:
        ChatTokenizer(tokenizer(template), system=system, think=False).encode(prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("ab</think>4", True, "<think>ab</think>4"),
        ("ab</think>4", False, "<think>ab</think>4"),  # a server that kept what its template wrote
        ("<think>ab</think>4", False, "<think>ab</think>4"),
        ("\n<think>ab</think>4", False, "<think>ab</think>4"),
        ("<think>ab</think>4", True, "<think><think>ab</think>4"),  # it began one inside the other
        ("ab", True, "<think>ab"),  # cut while it thought
        ("4", False, "4"),
        ("", False, ""),
    ],
)
def test_a_thought_has_its_beginning(text, opened, expected):
    assert thoughtful(text, opened) == expected


@pytest.mark.parametrize(
    ("own", "tokens", "opened", "count"),  # 8 is <think>, 9 </think>
    [
        ("ab</think>4", (1, 2, 9, 4), True, 2),
        ("<think>ab</think>4", (8, 1, 2, 9, 4), False, 2),
        ("\n<think>ab</think>4", (3, 8, 1, 2, 9, 4), False, 2),
        ("<think>ab</think>4", (8, 1, 2, 9, 4), True, 3),
        ("ab</think>4", (1, 2, 9, 4), False, 2),  # <think> stands before it in the text alone
        ("</think>4", (9, 4), False, 0),
        ("<think>ab", (8, 1, 2), False, 2),
        ("4", (4,), False, 0),
    ],
)
def test_the_tokens_of_a_thought_are_counted(own, tokens, opened, count):
    assert think_tokens(thoughtful(own, opened), tokens, opened, 8, 9) == count


def test_printable_leaves_what_can_be_seen():
    assert printable("a\tb\nç 日 😀") == "a\tb\nç 日 😀"
    assert printable("\x1b[0m\u200b\ud800") == "\\x1b[0m\\u200b\\ud800"

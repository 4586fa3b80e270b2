"""Rows as text: what each schema says, and where its loss is."""

import pytest

from ponder.training.render import SCHEMAS, Row, renderer, schema_of

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3's: the last answer is shown with its thoughts, those before it without.
FORGETS = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>' }}{% endif %}{{ m.content + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me"},
]


def render(values, column=None, template=None):
    row = Row("x line 1", values)
    return list(renderer(schema_of(row, column), column, "<eos>", template)(row))


def marked(document) -> str:
    """The text with [what the loss is on] in brackets."""
    return "".join(f"[{text}]" if learned else text for text, learned in document.parts)


@pytest.mark.parametrize(
    ("values", "column", "text"),
    [
        ({"text": "To be", "id": 3}, None, "[To be<eos>]"),
        ({"story": "To be", "text": "no"}, "story", "[To be<eos>]"),
        ({"prompt": "1+1=", "completion": "2"}, None, "1+1=[2<eos>]"),
        (
            {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24\n#### 24"},
            None,
            "Half of 48?\n<think>[48/2 = 24\n</think>24<eos>]",
        ),
        ({"question": "Who?", "answer": "Me"}, None, "Who?\n<think>[</think>Me<eos>]"),
        (
            {"messages": CHAT},
            None,
            "system: Be short.\nuser: Hi\nassistant:[ Hello<eos>]user: Who?\nassistant:[ Me<eos>]",
        ),
    ],
)
def test_what_a_row_says_and_where_its_loss_is(values, column, text):
    assert [marked(document) for document in render(values, column)] == [text]


def test_an_empty_text_is_no_document():
    assert render({"text": ""}) == []


def test_the_tokenizers_own_chat_template_is_taken():
    [document] = render({"messages": CHAT[1:]}, template=CHATML)
    assert marked(document) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello<|im_end|>\n]"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n[Me<|im_end|>\n]"
    )


def test_a_template_that_rewrites_the_past_gives_a_document_for_each_answer():
    texts = [marked(document) for document in render({"messages": CHAT[1:]}, template=FORGETS)]
    assert texts == [
        "user:Hi;assistant:[<think>Hello;]",
        "user:Hi;assistant:Hello;user:Who?;assistant:[<think>Me;]",
    ]


def test_a_template_that_rewrites_what_stands_before_an_answer():
    """Loss on the answer's own words alone, wherever they come to stand."""
    turn = "{{ '|' + m.role + ':' + m.content }}"
    rewrites = "{{ messages|length }}{% for m in messages %}" + turn + "{% endfor %}."
    texts = [marked(document) for document in render({"messages": CHAT[1:]}, template=rewrites)]
    assert texts == [
        "2|user:Hi|assistant:[Hello.]",
        "4|user:Hi|assistant:Hello|user:Who?|assistant:[Me.]",
    ]
    shouts = rewrites.replace("m.content", "m.content|upper")
    with pytest.raises(ValueError, match="x line 1: the chat template rewrites .* before turn 2"):
        render({"messages": CHAT[1:]}, template=shouts)


def test_documents_of_one_question_have_one_key():
    one, two = (render({"question": "Who?", "answer": a})[0].key for a in ("Me", "You"))
    assert one == two != render({"question": "What?", "answer": "Me"})[0].key


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_is_told_by_its_columns(schema):
    values = dict.fromkeys((*SCHEMAS[schema], "id"), "")
    assert schema_of(Row("x", values), None) == schema


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"story": "a"}, "x line 1 has the columns story; it needs messages, or prompt and compl"),
        ({"text": float("nan")}, "x line 1: text is nan, which is not a text"),
        ({"text": None}, "x line 1: text is None, which is not a text"),
        ({"text": "\ud800"}, "half a surrogate pair"),
        ({"prompt": "a", "completion": 3}, "completion is 3, which is not a text"),
        ({"messages": []}, r"messages is \[\]; it must be a list of turns"),
        ({"messages": [{"role": "user"}]}, "a turn has a role and a content"),
        ({"messages": CHAT[:2]}, "messages has no turn of the assistant"),
    ],
)
def test_a_row_that_is_none_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        render(values)


def test_a_row_of_another_schema_than_the_first_is_named():
    with pytest.raises(ValueError, match="y line 9 has no column 'answer', which the first row"):
        list(renderer("worked", None, "<eos>", None)(Row("y line 9", {"question": "", "text": ""})))


def test_a_template_that_refuses_a_conversation_is_named():
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="x line 1: the chat template refuses it: roles must alt"):
        render({"messages": CHAT}, template=refuses)


def test_a_template_that_renders_no_empty_conversation_takes_one_that_the_assistant_begins():
    first = "{% if messages[0]['role'] == 'system' %}{{ messages[0].content }}{% endif %}"
    turns = [{"role": "assistant", "content": "Hello"}, *CHAT[3:]]
    [document] = render({"messages": turns}, template=first + CHATML)
    assert marked(document).startswith("<|im_start|>assistant\n[Hello<|im_end|>\n]<|im_start|>user")


@pytest.mark.parametrize("fault", ["{{ messages[0].content + 3 }}", "{{ messages | length // 0 }}"])
def test_a_template_that_fails_is_told_with_the_row(fault):
    with pytest.raises(ValueError, match="x line 1: the chat template refuses it"):
        render({"messages": CHAT}, template=fault)

"""Rows of a data set as text: what a document says, and on which parts of it the loss is.

The columns of a row decide what it is:

    messages               a conversation of {"role", "content"}; the loss is on the assistant's
                           turns, as the tokenizer's chat template writes them
    prompt, completion     `prompt completion <eos>`; the loss is on the completion
    question, answer       `question <think> solution </think> answer <eos>`, for GSM8K's answers of
                           the form "solution #### answer"; the loss is on what follows <think>;
                           question and solution as the task gsm8k has them
    text                   `text <eos>`; the loss is on all of it

(without the spaces).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from ..tasks import split_of
from ..tasks.word_problems import prompt_of, steps_of

SCHEMAS = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "worked": ("question", "answer"),
    "text": ("text",),
}

# "user: Hi\nassistant: Hello<eos>": for tokenizers that come without a template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ 'assistant: ' + message.content + eos_token }}"
    "{% else %}{{ message.role + ': ' + message.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


class Document(NamedTuple):
    """One text to learn, in parts."""

    parts: list[tuple[str, bool]]  # text, and whether the loss is on it
    key: str  # equal for documents that must not stand on both sides of the validation split
    held: bool = False  # the key is not of the training split that the tasks see in such rows
    chat: bool = False  # begins as its template says, and not as the tokenizer begins every text


class Row(NamedTuple):
    """A row of a data set, and where it is for whoever must find it."""

    where: str
    values: dict[str, Any]


def schema_of(row: Row, column: str | None) -> str:
    """What a row is: a key of SCHEMAS; `column` names the one that holds the text."""
    has = ", ".join(row.values)
    if column is not None:
        if column not in row.values:
            raise ValueError(f"{row.where} has no column {column!r}; it has {has}")
        return "text"
    for schema, columns in SCHEMAS.items():
        if all(name in row.values for name in columns):
            return schema
    known = ", or ".join(" and ".join(columns) for columns in SCHEMAS.values())
    raise ValueError(
        f"{row.where} has the columns {has}; it needs {known} "
        "(or say which one holds the text, as in jsonl:PATH:COLUMN)"
    )


def renderer(
    schema: str, column: str | None, eos: str = "", template: str | None = None, bos: str = ""
) -> Callable[[Row], Iterator[Document]]:
    """The function that turns a row of this schema into documents; ValueError for one that is not.

    eos: the token that ends a document. template: a chat template (Jinja), None: PLAIN_TEMPLATE;
    it is given eos and bos.
    """

    def text(row: Row) -> Iterator[Document]:
        [value] = _texts(row, (column or "text",))
        if value:
            yield Document([(value + eos, True)], value)

    def completion(row: Row) -> Iterator[Document]:
        prompt, completion = _texts(row, SCHEMAS["completion"])
        yield Document([(prompt, False), (completion + eos, True)], prompt)

    def worked(row: Row) -> Iterator[Document]:
        question, answer = _texts(row, SCHEMAS["worked"])
        solution, _, final = answer.rpartition("####")
        prompt, trace = prompt_of(question), "".join(f"{line}\n" for line in steps_of(solution))
        parts = [(prompt + "<think>", False), (f"{trace}</think>{final.strip()}{eos}", True)]
        yield Document(parts, prompt, held=split_of(prompt) != "train")

    def messages(row: Row) -> Iterator[Document]:
        return _conversation(row, partial(write_chat, template or PLAIN_TEMPLATE, eos, bos))

    kinds = dict(text=text, completion=completion, worked=worked, messages=messages)
    return kinds[schema]


def _texts(row: Row, columns: tuple[str, ...]) -> list[str]:
    """The texts in these columns of a row."""
    found = []
    for name in columns:
        if name not in row.values:
            raise ValueError(
                f"{row.where} has no column {name!r}, which the first row has; "
                f"it has {', '.join(row.values)}"
            )
        value = row.values[name]
        if not isinstance(value, str):
            raise ValueError(f"{row.where}: {name} is {value!r}, which is not a text")
        if not _encodes(value):
            raise ValueError(f"{row.where}: {name} holds half a surrogate pair, which is no text")
        found.append(value)
    return found


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_chat(
    template: str, eos: str, bos: str, turns: list[dict[str, str]], answering: bool = False
) -> str:
    """A conversation as text, as inference writes it; raises what the template does.

    answering: with what opens an answer behind it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], _ = render_jinja_template(
        [turns],
        chat_template=template,
        add_generation_prompt=answering,
        eos_token=eos,
        bos_token=bos,
        enable_thinking=True,
    )
    return text


def _conversation(row: Row, write: Callable[..., str]) -> Iterator[Document]:
    """One document where later turns leave earlier ones as they were, else one for each answer.

    (Some templates rewrite the past: Qwen3's drops the thoughts of earlier answers.)
    """
    turns = _turns(row)
    key = next((turn["content"] for turn in turns if turn["role"] == "user"), "")

    def render(turns: list[dict[str, str]], answering: bool = False) -> str:
        try:
            return write(turns, answering)
        except Exception as error:  # a template may do anything
            raise ValueError(f"{row.where}: the chat template refuses it: {error}") from None

    answers = []  # (what stands before an answer, what stands when it is there)
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            whole = render(turns[: i + 1])
            # A template may open the answer with more than an answer in the past begins with.
            try:
                before = render(turns[:i], True), render(turns[:i]) if i else ""
            except ValueError:
                if i:
                    raise
                before = ()  # some templates fail where nothing was said yet
            said = next((b for b in before if whole.startswith(b)), None)
            if said is None:  # the answer's own words then tell where it begins
                words = turn["content"].strip()
                if not words or words not in whole:
                    raise ValueError(
                        f"{row.where}: the chat template rewrites what stands before turn {i + 1}, "
                        "so that its answer is not to be told from it; take another tokenizer"
                    )
                said = whole[: whole.rindex(words)]
            answers.append((said, whole))
    if not answers:
        raise ValueError(f"{row.where}: messages has no turn of the assistant to learn from")
    grows = all(b.startswith(a) for (_, a), (b, _) in zip(answers, answers[1:], strict=False))
    groups = [answers] if grows else [[answer] for answer in answers]
    for group in groups:
        parts, said = [], 0
        for before, whole in group:
            parts += [(before[said:], False), (whole[len(before) :], True)]
            said = len(whole)
        yield Document(parts, key, chat=True)


def _turns(row: Row) -> list[dict[str, str]]:
    turns = row.values.get("messages")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{row.where}: messages is {turns!r}; it must be a list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(k), str) and _encodes(turn[k]) for k in ("role", "content")
        ):
            raise ValueError(
                f"{row.where}: messages holds {turn!r}; a turn has a role and a content, both text"
            )
    return turns

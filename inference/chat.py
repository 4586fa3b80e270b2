"""Text around a model: its chat template, the spelling of thoughts, and what a terminal may see."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..models import GPTConfig, hub

THINK, THINK_END = "<think>", "</think>"


class ChatTokenizer:
    """A Transformers tokenizer that renders a prompt as its model expects it.

    path: a folder or a Hub id. With a chat template the prompt becomes the user's message behind
    the `system` one; without one it stays as it is. think: open a thought behind it where the
    template does not; without a template one is opened wherever the tokenizer has <think> and
    </think>, the mark of a model that thinks. kind: the class of Transformers that opens it; one
    that knows no kinds of model takes a third of the time. Raises ValueError where no tokenizer can
    be had.
    """

    def __init__(self, path: str, *, system: str | None, think: bool, kind: str = "AutoTokenizer"):
        import transformers

        if not (Path(path).is_dir() or hub.HUB_ID.fullmatch(path)):
            raise ValueError(f"there is no folder {path} with a tokenizer")
        self.path, self.system = path, system
        try:
            self.tokenizer: Any = getattr(transformers, kind).from_pretrained(path)
        except Exception as error:  # what it raises depends on the tokenizer and on the network
            raise ValueError(
                f"no tokenizer of {path} could be loaded: {first_line(error)}"
            ) from None
        self.template = bool(self.tokenizer.chat_template)
        if system is not None and not self.template:
            raise ValueError(
                f"system is {system!r}; the tokenizer of {path} has no chat template to put it into"
            )
        thinks = {THINK, THINK_END} <= self.tokenizer.get_vocab().keys()
        self.think = think or (thinks and not self.template)

    def render(self, prompt: str) -> str:
        """The prompt as the model reads it; ValueError for one that is empty."""
        if not prompt:
            raise ValueError("the prompt is empty; there is nothing to answer")
        if not self.template:
            return prompt + THINK * self.think
        messages = [{"role": "user", "content": prompt}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        try:
            text = self._write(messages, add_generation_prompt=True)
        except Exception as error:  # a template may raise what it likes: "no system role", say
            raise ValueError(
                f"the chat template of {self.path} refuses the prompt: {first_line(error)}"
            ) from None
        return text if opens_thought(text) or not self.think else self._opened(text, messages)

    def _write(self, messages: list[dict[str, str]], **options: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, enable_thinking=True, **options
        )

    def _opened(self, text: str, messages: list[dict[str, str]]) -> str:
        """The rendered prompt with a thought opened where the template would write an answer's:
        it may stand behind a space that the prompt's own end leaves out."""
        answer = f"{THINK}\n?\n{THINK_END}\n\n!"
        try:
            whole = self._write([*messages, {"role": "assistant", "content": answer}])
        except Exception:  # it writes prompts alone
            whole = text
        between, found, _ = whole.removeprefix(text).partition(THINK)
        known = whole.startswith(text) and found and between.isspace()
        return f"{text}{between if known else ''}{THINK}\n"

    def encode(self, prompt: str) -> tuple[tuple[int, ...], bool]:
        """The rendered prompt's tokens, and whether they end inside a thought."""
        text = self.render(prompt)
        check_text(text, "prompt")
        tokens = tuple(self.tokenizer.encode(text, add_special_tokens=not self.template))
        unknown = {self.tokenizer.unk_token_id} - {
            None,
            self.tokenizer.bos_token_id,  # GPT-2 has one token for all three
            self.tokenizer.eos_token_id,
        }
        if unknown & set(tokens):
            raise ValueError(
                f"the prompt {printable(prompt)[:80]!r} holds what the tokenizer of {self.path} "
                "does not know"
            )
        return tokens, opens_thought(text)


def opens_thought(text: str) -> bool:
    return text.rstrip().endswith(THINK)


def thoughtful(text: str, opened: bool) -> str:
    """A completion's text with the <think> that its prompt, or its server, kept."""
    if opened:
        return THINK + text
    if text.lstrip().startswith(THINK):
        return text.lstrip()
    return THINK + text if THINK_END in text else text


def think_tokens(
    text: str, tokens: Sequence[int], opened: bool, think: int | None, think_end: int | None
) -> int:
    """How many tokens of a completion lie inside its thought; text: what it says, as `thoughtful`
    gives it; think, think_end: the ids of <think>, which it need not hold, and </think>."""
    if not text.startswith(THINK):
        return 0
    end = tokens.index(think_end) if think_end in tokens else len(tokens)
    return end if opened or think not in tokens[:end] else end - tokens.index(think) - 1


def check_cue(cue: str, tokens: Sequence[int], ends: Iterable[int], think_end: int | None) -> None:
    """ValueError for a cue whose tokens would end the thought that it is to take up again."""
    if {*ends, think_end} & {*tokens}:
        raise ValueError(f"cue is {cue!r}; it may hold neither {THINK_END} nor what ends a text")


def check_text(text: str, what: str) -> None:
    """ValueError for a lone surrogate, half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"the {what} has {half!r}, which is no character of Unicode") from None


def no_thoughts(path: str | Path) -> str:
    """What to tell who wants budgets, or longer thoughts, of a model that has none."""
    return (
        f"the tokenizer of {path} has no tokens {THINK} and {THINK_END}, which budgets and longer "
        "thoughts need; take a model that thinks, or leave them away (in a sweep: --budgets with "
        "no number)"
    )


def printable(text: str) -> str:
    """The text without control characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The gist of another library's error, on one line, for a terminal."""
    return printable(hub.first_line(error))[:200]


def known_shape(path: str | Path) -> GPTConfig | None:
    """The GPTConfig of a checkpoint, for FLOPs; None for what no GPT expresses."""
    try:
        return hub.load_config(path)
    except ValueError:
        return None

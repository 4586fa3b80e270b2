"""Speakers: a prompt's text in, finished texts out, whatever draws them.

A sweep and the shell know no tokens: they put an `Ask` to a `Speaker` and get a `Completion`. Three
kinds of models speak: one of this machine on ponder's engine (`LocalSpeaker`), any causal model of
Transformers (`transformers_engine`), and one behind a server (`remote`).
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..models import hub
from ..models.gpt import GPT, GPTConfig
from ..models.memory import available, parameter_count, require
from .chat import (
    THINK,
    THINK_END,
    ChatTokenizer,
    no_thoughts,
    opens_thought,
    think_tokens,
    thoughtful,
)
from .config import GenerateConfig, SweepConfig
from .decoder import ROWS, bf16_pays
from .engine import LocalEngine, Request, Sample, SamplingParams

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Ask:
    """One sample to draw: seed and index tell the samples of one prompt apart; key is the caller's
    own."""

    prompt: str
    params: SamplingParams
    seed: int
    index: int
    key: Any = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished sample. Its text begins with <think> where the model thought, and lacks the token
    that ended it.

    sampled_tokens were drawn from the model, forced_tokens (a forced </think>, cues) put in;
    think_tokens of both lie inside the thinking. logprob is the natural log-probability of what was
    sampled, None where the speaker does not know it; seconds is the sample's share of the time.
    """

    ask: Ask
    text: str
    prompt_tokens: int
    sampled_tokens: int
    forced_tokens: int
    think_tokens: int
    logprob: float | None
    finish: Literal["stop", "length"]
    seconds: float


Watch: TypeAlias = Callable[[Ask, str], None]  # gets what a running sample's text has grown by


class Speaker(Protocol):
    """What answers asks.

    identity: what its samples depend on, besides the asks; among it "model" and "precision". shape:
    the model's, for FLOPs; None where it is not known. failures: how often each reason kept a
    sample from arriving; `generate` leaves such samples out.
    """

    identity: dict[str, str]
    shape: GPTConfig | None
    failures: Counter[str]

    def fit(
        self, prompts: Sequence[str], *, budgets: Sequence[int | None], max_tokens: int | None
    ) -> int:
        """The most new tokens for asks of these prompts; ValueError where something cannot fit."""
        ...

    def generate(self, asks: Iterable[Ask], *, watch: Watch | None = None) -> Iterator[Completion]:
        """The completion of each ask, in the order in which they finish; asks that share a prompt
        should be adjacent."""
        ...


def open_speaker(
    config: SweepConfig | GenerateConfig,
    *,
    slots: int,
    precision: str = "auto",
    budgets: bool,
    cue: str | None = None,
) -> Speaker:
    """The speaker that the configuration names; budgets tells whether its thinking gets any, cue
    what takes a closed thought up again, where that is wanted."""
    if config.model.startswith(("http://", "https://")):
        if cue is not None:
            raise ValueError(
                "a server does not let thoughts be drawn out (--extend) or taken up again: that "
                "needs a model of this machine"
            )
        from .remote import RemoteSpeaker

        return RemoteSpeaker(
            config.model,
            config.server,
            system=config.system,
            tokenizer=config.tokenizer,
            budgets=budgets,
        )
    if config.engine == "transformers":
        from .transformers_engine import TransformersSpeaker

        return TransformersSpeaker(
            config.model,
            slots=slots,
            precision=precision,
            system=config.system,
            budgets=budgets,
            cue=cue,
        )
    return LocalSpeaker(
        config.model,
        slots=slots,
        precision=precision,
        system=config.system,
        budgets=budgets,
        cue=cue,
        invariant=config.invariant,
    )


def room(
    prompt_tokens: int,
    *,
    context: int,
    budgets: Sequence[int | None],
    max_tokens: int | None,
) -> int:
    """max_tokens, or what the context leaves; ValueError where a prompt, max_tokens or a budget
    does not fit."""
    left = context - prompt_tokens
    if left < 1:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens as the model reads it; its context of "
            f"{context} leaves room for at most {context - 1}"
        )
    if max_tokens is not None and max_tokens > left:
        raise ValueError(
            f"max_tokens is {max_tokens}; after {prompt_tokens} prompt tokens the context of "
            f"{context} has room for {left}"
        )
    most = left if max_tokens is None else max_tokens
    largest = max((b for b in budgets if b is not None), default=0)
    # A budget needs room for itself, </think> and an answer of one token at least.
    if largest + 2 > most and any(b is not None for b in budgets):
        where = f"max_tokens of {max_tokens}" if max_tokens else f"a context of {context}"
        raise ValueError(
            f"a budget of {largest} does not fit: prompts of up to {prompt_tokens} tokens in "
            f"{where} leave room for {max(0, most - 2)}"
        )
    return most


def model_hash(folder: Path) -> str:
    """What the model is, whatever its folder is called: a hash of configuration and weights."""
    digest = hashlib.sha256()
    names = ("config.json", "tokenizer.json", hub.TEMPLATE)
    for path in sorted([folder / n for n in names] + list(folder.glob("*.safetensors"))):
        if path.exists():
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:16]


def local_folder(path: str) -> Path:
    """Where the files of a loaded checkpoint lie: its folder, or the Hub's in the cache."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, local_files_only=True))
    return folder


def device() -> str:
    """This process's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    torch.cuda.set_device(number)  # where kernels are launched
    return f"cuda:{number}"


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or its GPU, has too little memory for what was tried."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, ValueError) and error.__cause__:  # the engine's sentence about it
        return out_of_memory(error.__cause__)
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


class LocalSpeaker:
    """A model of this machine on ponder's engine, with its tokenizer and its chat template.

    Without a template prompts are read as they stand, and <think> behind them where the tokenizer
    has it: it is the mark of a model that thinks. With one, a thought is opened where the template
    does it, and with budgets always. precision is fp32, bf16, or auto: bf16 on a GPU, and on a CPU
    where it is measured to be faster. cue: what `extend` puts in the place of a </think>.
    invariant: the samples are the same to the bit whatever the slots. Where memory runs out it goes
    on with half the slots. ValueError for budgets or a cue where the tokenizer has no <think> and
    </think>.
    """

    def __init__(
        self,
        path: str,
        *,
        slots: int,
        precision: str = "auto",
        system: str | None = None,
        budgets: bool = False,
        cue: str | None = None,
        invariant: bool = False,
    ):
        self.folder, self.invariant = Path(path), invariant
        self.chat: ChatTokenizer | None = None
        if system is not None or hub.load_template(path) is not None:
            self.chat = ChatTokenizer(path, system=system, think=budgets)
        self.tokenizer: Tokenizer = (
            self.chat.tokenizer.backend_tokenizer if self.chat else hub.load_tokenizer(path)
        )
        think, self.think_end = map(self.tokenizer.token_to_id, (THINK, THINK_END))
        self.thought = () if think is None or self.think_end is None else (think,)
        if (budgets or cue is not None) and not self.thought:
            raise ValueError(no_thoughts(path))
        self.ends = hub.load_ends(path, self.tokenizer)
        self.cue = () if cue is None else self._known(cue, "cue")
        on = device()
        free = available(torch.device(on))
        if free is not None:
            weights = {"weights": 4 * parameter_count(hub.load_config(path))}
            require(weights, free, f"the model {path}", "take a smaller one")
        self.model: GPT = hub.load(path, device=on, dtype=torch.float32)
        self.model.eval()
        if precision == "auto":
            bf16 = on != "cpu" or bf16_pays(self.model, slots)
            precision = "bf16" if bf16 else "fp32"
        self.dtype = DTYPE[precision]
        if on != "cpu":
            self.model.to(self.dtype)
        self.shape: GPTConfig | None = self.model.config
        self.identity = {"model": model_hash(local_folder(path)), "precision": precision}
        self.failures: Counter[str] = Counter()
        self.engine = self._engine(slots)

    def _engine(self, slots: int) -> LocalEngine:
        return LocalEngine(
            self.model,
            slots=slots,
            eos=self.ends,
            think_end=self.think_end,
            cue=self.cue,
            dtype=self.dtype,
            invariant=self.invariant,
        )

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The tokens that the model reads; ValueError for what the vocabulary cannot say."""
        if self.chat:
            return self.chat.encode(prompt)[0]
        if not prompt:
            raise ValueError("the prompt is empty; there is nothing to answer")
        return (*self._known(prompt, "prompt"), *self.thought)

    def opened(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt's tokens end inside a thought."""
        return opens_thought(self._text(prompt[-4:]))

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _known(self, text: str, what: str) -> tuple[int, ...]:
        """The text's tokens; ValueError for what the vocabulary cannot say."""
        encoding = self.tokenizer.encode(text)
        unknown = self.tokenizer.token_to_id("<unk>")
        if unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            raise ValueError(
                f"the {what} has {text[start:end]!r}, which the tokenizer of {self.folder} "
                "does not know"
            )
        return tuple(encoding.ids)

    def fit(
        self, prompts: Sequence[str], *, budgets: Sequence[int | None], max_tokens: int | None
    ) -> int:
        longest = max((self.encode(prompt) for prompt in prompts), key=len)
        most = room(
            len(longest),
            context=self.model.config.context,
            budgets=budgets,
            max_tokens=max_tokens,
        )
        # Refused here, where nothing has started yet.
        plan = self.engine.plan([Request(longest, SamplingParams(max_tokens=most), 0, 0)])
        if plan.slots < self.engine.slots:
            self.engine = self._engine(plan.slots)
        return most

    def generate(self, asks: Iterable[Ask], *, watch: Watch | None = None) -> Iterator[Completion]:
        encode = lru_cache(maxsize=64)(self.encode)
        requests = (Request(encode(a.prompt), a.params, a.seed, a.index, key=a) for a in asks)
        yield from map(self._completion, self.sample(requests, watch=watch))

    def sample(
        self,
        requests: Iterable[Request],
        *,
        ends: Collection[int] = (),
        watch: Watch | None = None,
    ) -> Iterator[Sample]:
        """As the engine's `generate`; where memory runs out it goes on with half the slots. watch:
        where every request's key is an Ask."""
        source = iter(requests)
        unfinished: dict[int, Request] = {}

        def noted(request: Request) -> Request:
            unfinished[id(request)] = request
            return request

        while True:
            watcher = watch and _TokenWatch(self, watch)
            again = list(unfinished.values())
            try:
                # A chain, once at its end, would not see what a source has to give later.
                for sample in self.engine.generate(
                    map(noted, chain(again, source) if again else source), ends=ends, watch=watcher
                ):
                    del unfinished[id(sample.request)]
                    yield sample
                return
            except (RuntimeError, MemoryError, ValueError) as error:
                if not out_of_memory(error):
                    raise
            # Not in the handler: its traceback holds on to what filled the memory.
            least = self.engine.rows if self.invariant else ROWS
            self.engine = self._engine(halved(self.engine.slots, least))

    def decode(self, tokens: Sequence[int], prompt: Sequence[int]) -> str:
        """The text of a completion, with <think> before it where the prompt opened a thought, and
        without the token that ended it."""
        whole = tokens[:-1] if tokens and tokens[-1] in self.ends else tokens
        return thoughtful(self._text(whole), self.opened(prompt))

    def _completion(self, sample: Sample) -> Completion:
        tokens, prompt = sample.tokens, sample.request.prompt
        text = self.decode(tokens, prompt)
        return Completion(
            ask=sample.request.key,
            text=text,
            prompt_tokens=len(prompt),
            sampled_tokens=sample.sampled_tokens,
            forced_tokens=sample.forced_tokens,
            think_tokens=think_tokens(text, tokens, self.opened(prompt), self.think_end),
            logprob=sample.logprob,
            finish=sample.finish,
            seconds=sample.seconds,
        )


def halved(slots: int, least: int = 1) -> int:
    """Fewer slots for the same work, told on stderr; ValueError where there are none to spare."""
    if slots <= least:
        raise ValueError(
            f"the memory does not hold even {slots} samples at once; take a smaller model, a "
            "smaller --max-tokens, or bf16"
        )
    print(f"ponder: out of memory; {slots // 2} slots instead of {slots}", file=sys.stderr)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return slots // 2


class _TokenWatch:
    """Turns the tokens of running samples into text, whole characters at a time."""

    def __init__(self, speaker: LocalSpeaker, watch: Watch):
        self.speaker, self.watch = speaker, watch
        self.streams: dict[int, DecodeStream] = {}

    def __call__(self, request: Request, tokens: list[int]) -> None:
        ask: Ask = request.key
        begins = id(ask) not in self.streams
        lead = THINK if begins and self.speaker.opened(request.prompt) else ""
        stream = self.streams.setdefault(id(ask), DecodeStream(skip_special_tokens=False))
        for token in tokens:
            if token not in self.speaker.ends:
                lead += stream.step(self.speaker.tokenizer, token) or ""
            self.watch(ask, lead)
            lead = ""

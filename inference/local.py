"""A model of this machine on ponder's own engine."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..models import hub
from ..models.decoder import bf16_pays
from ..models.gpt import GPT, GPTConfig
from ..models.memory import available, parameter_count, require
from .chat import (
    THINK,
    THINK_END,
    ChatTokenizer,
    check_cue,
    check_text,
    no_thoughts,
    opens_thought,
    think_tokens,
    thoughtful,
)
from .engine import LocalEngine, Request, Sample, SamplingParams
from .machine import device, halved, local_folder, model_hash, out_of_memory
from .speaker import DTYPE, Ask, Completion, Watch, room


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
        try:
            shape = hub.load_config(path)
        except hub.NotAGPT as error:
            raise ValueError(f"{error}; --engine transformers takes any causal model") from None
        self.chat: ChatTokenizer | None = None
        if system is not None or hub.load_template(path) is not None:
            self.chat = ChatTokenizer(
                path, system=system, think=budgets, kind="PreTrainedTokenizerFast"
            )
        self.tokenizer: Tokenizer = (
            self.chat.tokenizer.backend_tokenizer if self.chat else hub.load_tokenizer(path)
        )
        self.think, self.think_end = map(self.tokenizer.token_to_id, (THINK, THINK_END))
        self.thought = () if self.think is None or self.think_end is None else (self.think,)
        if (budgets or cue is not None) and not self.thought:
            raise ValueError(no_thoughts(path))
        self.ends = hub.load_ends(path, self.tokenizer)
        self.cue = ()
        if cue is not None:
            self.cue = self._known(cue, "cue", special=False)
            check_cue(cue, self.cue, self.ends, self.think_end)
        on = device()
        free = available(torch.device(on))
        if free is not None:
            weights = {"weights": 4 * parameter_count(shape)}
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

    @property
    def slots(self) -> int:
        return self.engine.slots

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

    def _known(self, text: str, what: str, *, special: bool = True) -> tuple[int, ...]:
        """The text's tokens; special: with what the tokenizer puts around a text, <bos> say.
        ValueError for what the vocabulary cannot say."""
        check_text(text, what)
        encoding = self.tokenizer.encode(text, add_special_tokens=special)
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

    def length(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

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
            self.engine = self._engine(halved(self.engine.slots, self.engine.least))

    def decode(self, tokens: Sequence[int], prompt: Sequence[int]) -> str:
        """The text of a completion, with <think> before it where the prompt opened a thought, and
        without the token that ended it."""
        whole = tokens[:-1] if tokens and tokens[-1] in self.ends else tokens
        return thoughtful(self._text(whole), self.opened(prompt))

    def _completion(self, sample: Sample) -> Completion:
        tokens, prompt = sample.tokens, sample.request.prompt
        text, opened = self.decode(tokens, prompt), self.opened(prompt)
        return Completion(
            ask=sample.request.key,
            text=text,
            prompt_tokens=len(prompt),
            sampled_tokens=sample.sampled_tokens,
            forced_tokens=sample.forced_tokens,
            think_tokens=think_tokens(text, tokens, opened, self.think, self.think_end),
            logprob=sample.logprob,
            finish=sample.finish,
            seconds=sample.seconds,
        )


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

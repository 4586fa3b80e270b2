"""Any causal model that Transformers loads, for sweeps: slower than ponder's engine, open to all.

The rows of a batch are samples of one prompt, so nothing is padded: the prompt is read once, its
cache repeated, and the rows go on in step until all have ended. Tokens are drawn by ponder's
`sample_tokens`, from the streams that its engine uses. A batch always has the same number of rows,
so that a sample depends on the model, the prompt, its parameters, its seed and its index alone.
"""

import inspect
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from ..kernels import sample_tokens
from ..models import register
from .chat import (
    THINK,
    THINK_END,
    ChatTokenizer,
    check_cue,
    check_text,
    first_line,
    known_shape,
    no_thoughts,
    think_tokens,
    thoughtful,
)
from .engine import stream_key
from .forcing import NEVER, Forcing
from .machine import device, halved, local_folder, model_hash, out_of_memory
from .speaker import DTYPE, Ask, Completion, Watch, room


class TransformersSpeaker:
    """A model of `AutoModelForCausalLM` with its tokenizer and chat template.

    path: a folder or a Hub id; no code of the checkpoint's own is run. slots: the rows of a batch,
    halved where memory runs out. precision auto is bf16 on a GPU and fp32 on a CPU. With budgets
    every prompt ends in <think>. cue: what `extend` puts in the place of a </think>. ValueError for
    budgets or a cue where the tokenizer has no <think> and </think>, each one token.
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
    ):
        from transformers import AutoModelForCausalLM

        from ..models.auto import CACHE

        self.device, self.slots = device(), slots
        if precision == "auto":
            precision = "fp32" if self.device == "cpu" else "bf16"
        register()  # models of type ponder
        self.chat = ChatTokenizer(path, system=system, think=budgets)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=DTYPE[precision], use_safetensors=True
            )
            self.model: Any = model.to(self.device).eval()
        except Exception as error:  # what it raises depends on the checkpoint and on the network
            raise ValueError(f"no model of {path} could be loaded: {first_line(error)}") from None
        self.think, self.think_end = map(self._token, (THINK, THINK_END))
        if (budgets or cue is not None) and None in (self.think, self.think_end):
            raise ValueError(no_thoughts(path))
        self.ends = self._ends()
        self.cue: tuple[int, ...] = ()
        if cue is not None:
            check_text(cue, "cue")
            self.cue = tuple(self.chat.tokenizer.encode(cue, add_special_tokens=False))
            check_cue(cue, self.cue, self.ends.tolist(), self.think_end)
        self._cache = CACHE
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.shape = known_shape(path)
        self.identity = {
            "model": model_hash(local_folder(path)),
            "precision": precision,
            "engine": "transformers",
        }
        self.failures: Counter[str] = Counter()

    def _token(self, text: str) -> int | None:
        """The id of a text that is one token; None where it is several, or unknown."""
        tokenizer = self.chat.tokenizer
        token = tokenizer.convert_tokens_to_ids(text)
        return None if token is None or token == tokenizer.unk_token_id else token

    def _ends(self) -> Tensor:
        """The tokens that end a completion: a chat model may have several."""
        found = {self.chat.tokenizer.eos_token_id}
        for source in (self.model.generation_config, self.model.config.get_text_config()):
            ends = getattr(source, "eos_token_id", None)
            found |= set(ends if isinstance(ends, list) else [ends])
        return torch.tensor(sorted(found - {None}), dtype=torch.int64, device=self.device)

    def fit(
        self, prompts: Sequence[str], *, budgets: Sequence[int | None], max_tokens: int | None
    ) -> int:
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None and max_tokens is None:
            raise ValueError(
                f"config.json of {self.chat.path} names no longest context; say --max-tokens"
            )
        encoded = [self.chat.encode(prompt)[0] for prompt in prompts]
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if (most := max(max(tokens, default=0) for tokens in encoded)) >= vocabulary:
            raise ValueError(
                f"the tokenizer of {self.chat.path} says token {most}; the model knows 0 to "
                f"{vocabulary - 1}"
            )
        longest = max(map(len, encoded))
        return room(longest, context=context or NEVER, budgets=budgets, max_tokens=max_tokens)

    def length(self, text: str) -> int:
        return len(self.chat.tokenizer.encode(text, add_special_tokens=False))

    def generate(self, asks: Iterable[Ask], *, watch: Watch | None = None) -> Iterator[Completion]:
        encode = lru_cache(maxsize=1)(self.chat.encode)
        for _, group in groupby(asks, key=lambda ask: ask.prompt):
            while batch := list(islice(group, self.slots)):
                while batch:
                    try:
                        finished = self._batch(*encode(batch[0].prompt), batch[: self.slots], watch)
                    except (RuntimeError, MemoryError) as error:
                        if not out_of_memory(error):
                            raise
                        finished = []
                    if not finished:  # outside the handler, which holds on to the memory
                        self.slots = halved(self.slots)
                    yield from finished
                    batch = batch[len(finished) :]

    @torch.inference_mode()
    def _batch(
        self, prompt: tuple[int, ...], opened: bool, asks: list[Ask], watch: Watch | None
    ) -> list[Completion]:
        """The completions of at most `slots` asks of one prompt; idle rows repeat the last ask."""
        start = time.perf_counter()
        rows = asks + asks[-1:] * (self.slots - len(asks))
        params = [ask.params for ask in rows]

        def column(values: Iterable[Any], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=self.device)

        temperature = column((p.temperature for p in params), torch.float32)
        top_p = column((p.top_p for p in params), torch.float32)
        min_p = column((p.min_p for p in params), torch.float32)
        top_k = column(p.top_k for p in params)
        seeds = column(stream_key(prompt, ask.seed, ask.index) for ask in rows)
        most = column(p.max_tokens for p in params)
        forcing = Forcing(len(rows), think_end=self.think_end, cue=self.cue, device=self.device)
        forcing.start(column(range(len(rows))), params)
        count = torch.zeros_like(most)
        done = column((i >= len(asks) for i in range(len(rows))), torch.bool)
        logprob = torch.zeros_like(temperature)
        columns: list[Tensor] = []
        screen = _Screen(self, asks, opened, watch) if watch else None

        logits, cache = self._read(prompt, len(rows))
        while True:
            token, chosen = sample_tokens(
                logits,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seeds=seeds,
                positions=torch.full_like(seeds, len(columns)),
            )
            forced = forcing(token, torch.full_like(count, len(columns)), done)
            logprob += chosen.masked_fill(done | forced, 0.0)
            columns.append(token)
            count += ~done
            done |= torch.isin(token, self.ends) | (count == most)
            if screen:
                screen.show(columns, count)
            if done.all():
                break
            out = self.model(input_ids=token[:, None], use_cache=True, **{self._cache: cache})
            logits, cache = out.logits[:, -1], out[self._cache]

        drawn = torch.stack(columns, 1)[: len(asks)].tolist()
        seconds = (time.perf_counter() - start) / len(asks)
        return [
            self._completion(ask, len(prompt), opened, tokens[:n], put, total, seconds)
            for ask, tokens, n, put, total in zip(
                *(asks, drawn, count.tolist(), forcing.forced.tolist(), logprob.tolist()),
                strict=False,
            )
        ]

    def _read(self, prompt: tuple[int, ...], rows: int) -> tuple[Tensor, Any]:
        """The logits behind the prompt (rows, V), and a cache of that many rows."""
        tokens = torch.tensor([prompt], device=self.device)
        last = {"logits_to_keep": 1} if self._keeps_logits else {}
        out = self.model(input_ids=tokens, use_cache=True, **last)
        cache = out.get(self._cache)
        if cache is None:
            raise ValueError(
                f"the model of {self.chat.path} keeps no cache; samples of it cannot be drawn"
            )
        if not hasattr(cache, "batch_repeat_interleave"):
            out = self.model(input_ids=tokens.expand(rows, -1), use_cache=True, **last)
            return out.logits[:, -1], out[self._cache]
        cache.batch_repeat_interleave(rows)
        return out.logits[:, -1].repeat(rows, 1), cache

    def _completion(
        self,
        ask: Ask,
        prompt_tokens: int,
        opened: bool,
        tokens: list[int],
        forced: int,
        logprob: float,
        seconds: float,
    ) -> Completion:
        text = self._text(tokens, opened)
        return Completion(
            ask=ask,
            text=text,
            prompt_tokens=prompt_tokens,
            sampled_tokens=len(tokens) - forced,
            forced_tokens=forced,
            think_tokens=think_tokens(text, tokens, opened, self.think, self.think_end),
            logprob=logprob,
            finish="stop" if tokens[-1] in self.ends.tolist() else "length",
            seconds=seconds,
        )

    def _text(self, tokens: list[int], opened: bool) -> str:
        if tokens and tokens[-1] in self.ends.tolist():
            tokens = tokens[:-1]
        text = self.chat.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return thoughtful(text, opened)


class _Screen:
    """Tells a watcher what every row's text has grown by, whole characters at a time."""

    def __init__(self, speaker: TransformersSpeaker, asks: list[Ask], opened: bool, watch: Watch):
        self.speaker, self.asks, self.opened, self.watch = speaker, asks, opened, watch
        self.shown = [0] * len(asks)

    def show(self, columns: list[Tensor], count: Tensor) -> None:
        tokens = torch.stack(columns, 1).tolist()
        for row, (ask, n) in enumerate(zip(self.asks, count.tolist(), strict=False)):
            text = self.speaker._text(tokens[row][:n], self.opened)
            if not text.endswith("\ufffd"):  # a character's bytes are not all there yet
                self.watch(ask, text[self.shown[row] :])
                self.shown[row] = len(text)

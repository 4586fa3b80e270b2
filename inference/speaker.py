"""Speakers: a prompt's text in, finished texts out, whatever draws them.

A sweep and the shell know no tokens: they put an `Ask` to a `Speaker` and get a `Completion`. Three
kinds of models speak: one of this machine on ponder's engine (`local`), any causal model of
Transformers (`transformers_engine`), and one behind a server (`remote`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch

from ..models.gpt import GPTConfig
from .config import GenerateConfig, SweepConfig
from .engine import SamplingParams

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

    @property
    def slots(self) -> int:
        """How many samples it draws at once, at most; seconds depend on it."""
        ...

    def fit(
        self, prompts: Sequence[str], *, budgets: Sequence[int | None], max_tokens: int | None
    ) -> int:
        """The most new tokens for asks of these prompts; ValueError where something cannot fit."""
        ...

    def length(self, text: str) -> int:
        """How many tokens a piece of a completion is; known where thinking gets budgets."""
        ...

    def generate(self, asks: Iterable[Ask], *, watch: Watch | None = None) -> Iterator[Completion]:
        """The completion of each ask, in the order in which they finish; asks that share a prompt
        should be adjacent."""
        ...


def open_speaker(
    config: SweepConfig | GenerateConfig,
    *,
    slots: int,
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
    options: dict[str, Any] = dict(slots=slots, budgets=budgets, cue=cue)
    options |= dict(precision=config.precision, system=config.system)
    if config.engine == "transformers":
        from .transformers_engine import TransformersSpeaker

        return TransformersSpeaker(config.model, **options)
    from .local import LocalSpeaker

    return LocalSpeaker(config.model, **options, invariant=config.invariant)


def sampling(config: SweepConfig | GenerateConfig, **more: Any) -> SamplingParams:
    """How the configuration draws a token, and `more` of a SamplingParams."""
    filters = dict(top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
    return SamplingParams(temperature=config.temperature, **filters, **more)


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

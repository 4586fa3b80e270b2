"""What is asked of an engine and what it gives: parameters, requests, samples."""

import hashlib
import math
from array import array
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class SamplingParams:
    """How one sample is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 filter nothing.

    max_tokens bounds the completion, forced tokens and <eos> included. budget is the number of
    tokens that a thought may have before </think> is forced; None never forces it, 0 forces it at
    once. extend is how many times the model may not close its thought: the engine's cue is put in
    the place of its </think>, and it goes on, as far as the budget. Raises ValueError for values
    out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    budget: int | None = None
    extend: int = 0

    def __post_init__(self):
        for name, value, valid, rule in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0: no limit)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("budget", self.budget, self.budget is None or self.budget >= 0, "at least 0 or None"),
            ("extend", self.extend, self.extend >= 0, "at least 0"),
        ):
            if not valid:
                raise ValueError(f"{name} is {value}; it must be {rule}")


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to draw. The prompt ends with <think> where the model is to think.

    seed and index name the random stream: samples of one prompt differ by index. key is the
    caller's own and comes back with the sample.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    index: int
    key: Any = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished completion.

    tokens holds the whole completion: sampled_tokens of them drawn from the model and
    forced_tokens (a forced </think>, cues) put in; it ends with <eos> where finish is "stop", and
    was cut at max_tokens, or at a token that was to end it, where it is "length". logprob is the
    sum of the sampled tokens' natural log-probabilities under the model itself (temperature 1, no
    filter). seconds is the sample's share of the wall-clock time: every step is divided among the
    samples then alive, and every prefill among the first requests that wait for it.
    """

    request: Request
    tokens: tuple[int, ...]
    sampled_tokens: int
    forced_tokens: int
    logprob: float
    finish: Literal["stop", "length"]
    seconds: float


def stream_key(prompt: tuple[int, ...], seed: int, index: int) -> int:
    """The 63-bit key of a sample's random stream.

    The stream's counter is the token's position in the completion, so the draws depend neither on
    slots nor on parameters: a sample with a budget has the unbudgeted sample's tokens up to the
    cut, and samples at two temperatures share their draws.
    """
    text = f"{seed} {index} ".encode() + array("q", prompt).tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1

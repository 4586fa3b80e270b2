"""Engine: many samples of many prompts at once, each as if it had been drawn alone.

A fixed number of slots decodes together; a slot whose sample has finished takes the next request.
Each distinct prompt is prefilled once and its keys and values are copied into the slots of its
samples. A sample depends on the model, its prompt, its parameters, its seed and its index, and on
nothing else: every shape that the model sees is fixed (all slots are computed whether they are in
use or not; prompts are prefilled in blocks of a size that their own length decides), and each
sample draws from a random stream of its own.
"""

import copy
import hashlib
import math
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..kernels import sample_tokens
from ..models import GPT, KVCache
from .decoder import ROWS, Decoder

LENGTH_STEP = 32  # attended lengths and prompt blocks are rounded up to a multiple of it
NEVER = 1 << 62


@dataclass(frozen=True)
class SamplingParams:
    """How one sample is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 filter nothing.

    max_tokens bounds the completion, forced tokens and <eos> included. budget is the number of
    tokens that may be sampled as thinking before </think> is forced; None never forces it, 0
    forces it at once. Raises ValueError for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    budget: int | None = None

    def __post_init__(self):
        for name, value, valid, rule in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0: no limit)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("budget", self.budget, self.budget is None or self.budget >= 0, "at least 0 or None"),
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
    forced_tokens (a forced </think>) put in; it ends with <eos> where finish is "stop", and was
    cut at max_tokens where it is "length". logprob is the sum of the sampled tokens' natural
    log-probabilities under the model itself (temperature 1, no filter). seconds is the sample's
    share of the wall-clock time: every step is divided among the samples then alive, and every
    prefill among the first requests that wait for it.
    """

    request: Request
    tokens: tuple[int, ...]
    sampled_tokens: int
    forced_tokens: int
    logprob: float
    finish: Literal["stop", "length"]
    seconds: float


class Engine(Protocol):
    """What draws samples: the local model here, or a server."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """The sample of each request, in the order in which they finish."""
        ...


def stream_key(prompt: tuple[int, ...], seed: int, index: int) -> int:
    """The 63-bit key of a sample's random stream.

    The stream's counter is the token's position in the completion, so the draws depend neither on
    slots nor on parameters: a sample with a budget has the unbudgeted sample's tokens up to the
    cut, and samples at two temperatures share their draws.
    """
    text = f"{seed} {index} ".encode() + array("q", prompt).tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


class Network(Protocol):
    """What the engine asks of a model: `GPT` has it, and so has `Decoder`."""

    def hidden(self, tokens: Tensor, cache: KVCache) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class LocalEngine:
    """Samples from a model on this machine, `slots` of them at a time.

    model: a GPT, or anything with its `config`, `hidden` and `logits`. slots is rounded up to a
    multiple of 8. eos and think_end are the ids of <eos> and </think>; without think_end no request
    may have a budget. device defaults to the model's own. So does dtype; on a CPU it is that of
    matrix products and of the cache (bf16 is about 1.5 times as fast where the CPU has such
    products, and slower elsewhere), and the rest is fp32. Weights are read anew by each `generate`.

    Throughput grows with the slots until the machine is busy, memory with slots × the longest
    running sequence. The numbers that a row gets do not depend on what the other rows hold, but
    may differ in the last bit between two numbers of slots.
    """

    def __init__(
        self,
        model: GPT,
        *,
        slots: int = 64,
        eos: int,
        think_end: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        vocabulary = model.config.vocab_size
        for name, token in (("eos", eos), ("think_end", think_end)):
            if token is not None and not 0 <= token < vocabulary:
                raise ValueError(f"{name} is {token}; the model's tokens are 0 to {vocabulary - 1}")
        if eos == think_end:
            raise ValueError(f"eos and think_end are both {eos}; they must differ")
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1")
        own = next(model.parameters(), torch.empty(0))
        self.device = own.device if device is None else torch.device(device)
        self.dtype = own.dtype if dtype is None else dtype
        self.model, self.eos, self.think_end = model, eos, think_end
        self.slots = _round_up(slots, ROWS)
        # On a GPU the host looks at the results of several steps at once, so as not to stall it.
        self.steps_per_look = 1 if self.device.type == "cpu" else 8

    def network(self) -> Network:
        """What computes the logits."""
        if self.device.type == "cpu" and isinstance(self.model, GPT):
            return Decoder(self.model, self.dtype)
        own = next(self.model.parameters(), torch.empty(0))
        if (own.device, own.dtype) == (self.device, self.dtype):
            return self.model
        return copy.deepcopy(self.model).to(self.device, self.dtype)

    def generate(
        self,
        requests: Iterable[Request],
        *,
        watch: Callable[[Request, list[int]], None] | None = None,
    ) -> Iterator[Sample]:
        """The sample of each request, in the order in which they finish.

        `requests` is read as slots fall free, up to two fillings of the slots ahead. Those that
        share a prompt should be adjacent: a prompt is forgotten when no waiting request has it.
        watch is called with a running request and the tokens that its completion has newly got.

        Raises ValueError, when it reads the request and before it samples it, for a prompt that is
        empty, holds tokens outside the vocabulary, or leaves the context too little room for
        max_tokens, and for a budget where the engine has no think_end.
        """
        waiting: deque[Request] = deque()
        source = map(self._checked, requests)
        network = self.network()
        prompts = _Prompts(self, network)
        slots = _Slots(self, network)
        while True:
            take = len(slots.free)
            while len(waiting) < take + self.slots:
                request = next(source, None)
                if request is None:
                    break
                waiting.append(request)
                prompts.expect(request.prompt)
            if take and waiting:
                batch = [waiting.popleft() for _ in range(min(take, len(waiting)))]
                prompts.prefill(batch, waiting)
                slots.fill(batch, prompts)
            if not slots.running:
                return
            finished = slots.step()
            if watch:
                slots.show(watch)
            yield from slots.collect(finished)

    def _checked(self, request: Request) -> Request:
        prompt, params = request.prompt, request.params
        context, vocabulary = self.model.config.context, self.model.config.vocab_size
        if not prompt:
            raise ValueError("the prompt is empty; it must hold at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            token = next(t for t in prompt if not 0 <= t < vocabulary)
            raise ValueError(f"the prompt holds token {token}; the model has 0 to {vocabulary - 1}")
        room = context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; the model's context of {context} leaves "
                f"room for at most {context - 1}"
            )
        if params.max_tokens > room:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_tokens of {params.max_tokens} are more "
                f"than the model's context of {context}; max_tokens of at most {room} fits"
            )
        if params.budget is not None and self.think_end is None:
            raise ValueError(
                f"budget is {params.budget}, but the engine knows no </think> token to force; "
                "give it think_end"
            )
        return request


class _Prompt:
    """A prefilled prompt: one row of a block's cache, and the time it took that none paid yet."""

    def __init__(self, block: KVCache, row: int, seconds: float):
        self.block, self.row, self.seconds = block, row, seconds


class _Prompts:
    """The keys and values of the prompts that waiting requests need.

    Prompts are prefilled in blocks of fixed shape, right-padded to a length that a prompt's own
    length decides, so that no prompt's numbers depend on its companions.
    """

    def __init__(self, engine: LocalEngine, network: Network):
        self.network = network
        self.new_cache = partial(
            KVCache, engine.model.config, device=engine.device, dtype=engine.dtype
        )
        self.device, self.context = engine.device, engine.model.config.context
        self.waiting: Counter[tuple[int, ...]] = Counter()
        self.ready: dict[tuple[int, ...], _Prompt] = {}
        self.block_tokens = 512 if engine.device.type == "cpu" else 2048

    def expect(self, prompt: tuple[int, ...]) -> None:
        self.waiting[prompt] += 1

    def take(self, prompt: tuple[int, ...]) -> tuple[KVCache, int, float]:
        """The block and row that hold the prompt, and the seconds that this request owes for it."""
        entry = self.ready[prompt]
        seconds = entry.seconds / self.waiting[prompt]
        entry.seconds -= seconds
        self.waiting[prompt] -= 1
        if not self.waiting[prompt]:
            del self.waiting[prompt], self.ready[prompt]
        return entry.block, entry.row, seconds

    def prefill(self, batch: Iterable[Request], ahead: Iterable[Request]) -> None:
        """Make the batch's prompts ready; requests further ahead fill what is left of a block."""
        needed: dict[int, dict[tuple[int, ...], None]] = {}
        for request in batch:
            if request.prompt not in self.ready:
                needed.setdefault(self._width(request.prompt), {})[request.prompt] = None
        if not needed:
            return
        spare = {width: -len(prompts) % self._rows(width) for width, prompts in needed.items()}
        for request in ahead:
            prompt, width = request.prompt, self._width(request.prompt)
            if spare.get(width) and prompt not in self.ready and prompt not in needed[width]:
                needed[width][prompt] = None
                spare[width] -= 1
        for width, prompts in needed.items():
            source = iter(prompts)
            while block := list(islice(source, self._rows(width))):
                self._prefill_block(block, width)

    def _width(self, prompt: tuple[int, ...]) -> int:
        return min(_round_up(len(prompt)), self.context)

    def _rows(self, width: int) -> int:
        return max(1, self.block_tokens // width)

    @torch.inference_mode()
    def _prefill_block(self, prompts: list[tuple[int, ...]], width: int) -> None:
        start = time.perf_counter()
        padded = [p + (0,) * (width - len(p)) for p in prompts]
        padded += [(0,) * width] * (self._rows(width) - len(prompts))
        block = self.new_cache(len(padded), width)
        self.network.hidden(torch.tensor(padded, device=self.device), block)
        seconds = (time.perf_counter() - start) / len(prompts)
        for row, prompt in enumerate(prompts):
            self.ready[prompt] = _Prompt(block, row, seconds)


class _Run:
    """What the host knows of the sample in a slot."""

    def __init__(self, request: Request, length: int, seconds: float):
        self.request = request
        self.length = length  # cached tokens at step 0 of the slots' clock: may be negative
        self.seconds = seconds
        self.shown = 0  # tokens of the completion that a watcher has seen


class _Slots:
    """The rows that decode together: their state on the device, their requests on the host."""

    def __init__(self, engine: LocalEngine, network: Network):
        self.engine, self.network = engine, network
        n = engine.slots
        self.running: dict[int, _Run] = {}
        self.free = list(range(n))
        self.steps = 0
        self.seconds = 0.0  # what a sample that has run all the time owes
        self.integers = torch.zeros(7, n, dtype=torch.int64, device=engine.device)
        self.numbers = torch.zeros(4, n, device=engine.device)
        # token: the next one to feed; count: tokens of the completion so far; force_at: the count
        # at which </think> is forced; most: max_tokens.
        self.token, self.length, self.count, self.force_at, self.most, self.seed, self.top_k = (
            self.integers
        )
        self.temperature, self.top_p, self.min_p, self.logprob = self.numbers
        self.top_p.fill_(1.0)  # sample_tokens looks at idle rows too
        self.done = torch.ones(n, dtype=torch.bool, device=engine.device)
        self.tokens = torch.zeros(n, 1, dtype=torch.int64, device=engine.device)
        self.cache = KVCache(engine.model.config, n, 0, device=engine.device, dtype=engine.dtype)
        self.cache.lengths = self.length
        self.cache.empty = False
        self.peak = self.next_fit = 0

    @torch.inference_mode()
    def fill(self, batch: list[Request], prompts: _Prompts) -> None:
        """Put each request into a free slot, behind its prompt's keys and values."""
        start = time.perf_counter()
        engine = self.engine
        rows = [self.free.pop() for _ in batch]
        integers, numbers, most = [], [], 0
        copies: dict[KVCache, list[tuple[int, int]]] = {}
        for row, request in zip(rows, batch, strict=True):
            prompt, params = request.prompt, request.params
            block, block_row, seconds = prompts.take(prompt)
            copies.setdefault(block, []).append((block_row, row))
            # The last token of the prompt is fed once more, for the logits behind it; where
            # </think> is forced at once they are not needed, and it is fed instead.
            at_once = params.budget == 0 and params.max_tokens > 1
            token = engine.think_end if at_once else prompt[-1]
            length = len(prompt) - (not at_once)
            force_at = NEVER if at_once or params.budget is None else params.budget
            seed = stream_key(prompt, request.seed, request.index)
            integers.append(
                (token, length, at_once, force_at, params.max_tokens, seed, params.top_k)
            )
            numbers.append((params.temperature, params.top_p, params.min_p, 0.0))
            most = max(most, params.max_tokens)
            self.running[row] = _Run(request, length - self.steps, seconds - self.seconds)
        index = torch.tensor(rows, device=engine.device)
        self.integers.index_copy_(1, index, torch.tensor(integers, device=engine.device).t())
        self.numbers.index_copy_(1, index, torch.tensor(numbers, device=engine.device).t())
        self.done.index_fill_(0, index, False)
        if most >= self.tokens.shape[1]:
            self.tokens = torch.nn.functional.pad(self.tokens, (0, most + 1 - self.tokens.shape[1]))
        if engine.think_end is not None:
            self.tokens[index, 0] = engine.think_end  # overwritten where it is not forced
        for block, pairs in copies.items():
            if block.capacity > self.cache.capacity:
                self.cache.resize(_round_up(block.capacity))
            source, target = torch.tensor(pairs, device=engine.device).t()
            for old, new in ((block.keys, self.cache.keys), (block.values, self.cache.values)):
                prefix = new[:, :, :, : block.capacity]
                prefix.index_copy_(1, target, old.index_select(1, source))
        self.seconds += (time.perf_counter() - start) / len(self.running)

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Decode a token of every slot (a few, on a GPU); the rows that finished."""
        start = time.perf_counter()
        n = self.engine.steps_per_look
        self._fit(max(run.length for run in self.running.values()) + self.steps + n)
        for _ in range(n):
            self._step()
        self.steps += n
        finished = [row for row, done in enumerate(self.done.tolist()) if done]
        if self.free:
            finished = [row for row in finished if row in self.running]
        self.seconds += (time.perf_counter() - start) / len(self.running)
        return finished

    def show(self, watch: Callable[[Request, list[int]], None]) -> None:
        """Tell watch what every running sample has got since the last time."""
        counts = self.count.tolist()
        for row, run in self.running.items():
            new = self.tokens[row, run.shown : counts[row]].tolist()
            run.shown = counts[row]
            if new:
                watch(run.request, new)

    def _step(self) -> None:
        engine, network = self.engine, self.network
        hidden = network.hidden(self.token[:, None], self.cache)
        token, logprob = sample_tokens(
            network.logits(hidden[:, -1]),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seeds=self.seed,
            positions=self.count,
        )
        idle = self.done
        if engine.think_end is not None:
            forced = self.count == self.force_at
            token.masked_fill_(forced, engine.think_end)
            self.force_at.masked_fill_(token == engine.think_end, NEVER)
            idle = idle | forced
        self.logprob += logprob.masked_fill_(idle, 0.0)
        self.tokens.scatter_(1, self.count[:, None], token[:, None])
        self.count += ~self.done  # a finished row writes behind its tokens
        self.done |= (token == engine.eos) | (self.count == self.most)
        self.length += 1
        self.length.masked_fill_(self.done, 0)
        self.token.copy_(token)

    def collect(self, rows: list[int]) -> list[Sample]:
        """The finished samples of these rows, which fall free."""
        if not rows:
            return []
        index = torch.tensor(rows, device=self.engine.device)
        counts = self.count[index].tolist()
        tokens = self.tokens[index, : max(counts)].tolist()
        logprobs = self.logprob[index].tolist()
        samples = []
        for row, count, drawn, logprob in zip(rows, counts, tokens, logprobs, strict=True):
            run = self.running.pop(row)
            drawn = tuple(drawn[:count])
            budget = run.request.params.budget
            forced = (
                budget is not None
                and budget < count
                and (self.engine.think_end not in drawn[:budget])
            )
            samples.append(
                Sample(
                    request=run.request,
                    tokens=drawn,
                    sampled_tokens=count - forced,
                    forced_tokens=int(forced),
                    logprob=logprob,
                    finish="stop" if drawn[-1] == self.engine.eos else "length",
                    seconds=run.seconds + self.seconds,
                )
            )
        self.free += rows
        return samples

    def _fit(self, positions: int) -> None:
        """Keep the cache's capacity near what is needed: every step reads all of it.

        It grows at once, and shrinks where the most that was needed for a while is less.
        """
        needed = _round_up(positions)
        self.peak = max(self.peak, needed)
        if needed > self.cache.capacity:
            self.cache.resize(needed)
        elif self.steps >= self.next_fit:
            if self.peak < self.cache.capacity:
                self.cache.resize(self.peak)
            self.peak, self.next_fit = needed, self.steps + LENGTH_STEP


def _round_up(length: int, step: int = LENGTH_STEP) -> int:
    return -(-length // step) * step

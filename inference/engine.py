"""Engine: many samples of many prompts at once, each as if it had been drawn alone.

A fixed number of slots decodes together; a slot whose sample has finished takes the next request.
Each distinct prompt is prefilled once, and its samples share its keys and values. A sample depends
on the model, its prompt, its parameters, its seed and its index, and on nothing else: each draws
from a random stream of its own, and what computes the logits gives a row the same numbers whatever
stands beside it. `Decoder` does that by itself; PyTorch's operations where every shape that they
see is fixed (all slots are computed whether they are in use or not; prompts are prefilled in blocks
of a size that their own length decides).
"""

import copy
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from ..models import GPT, KVCache
from ..models.decoder import Decoder, fits
from ..models.memory import available
from .memory import Plan
from .prompts import Prompts, round_up
from .request import Request, Sample, SamplingParams, stream_key
from .slots import Slots

__all__ = ["Engine", "LocalEngine", "Request", "Sample", "SamplingParams", "stream_key"]

ROWS = 8  # MKL rounds otherwise in the last rows of a product whose number is no multiple of it
GPU_BLOCK = 256  # rows that decode together where the number of slots must not matter
# Rows (samples × query heads of a key-value head) whose product with a shared prompt is one.
CPU_GROUP, GROUP = 8, 64


class Engine(Protocol):
    """What draws samples: the local model here, or a server."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """The sample of each request, in the order in which they finish."""
        ...


class Network(Protocol):
    """What the engine asks of a model: `GPT` has it, and so has `Decoder`."""

    def hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """tokens (B, T) behind what the cache holds → (B, T, C)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) → (..., V) in fp32."""
        ...


class LocalEngine:
    """Samples from a model on this machine, `slots` of them at a time.

    model: a GPT, or anything with its `config`, `hidden` and `logits`. slots is rounded up to a
    multiple of 8 where PyTorch decodes, that is on a GPU, and on a CPU without a C compiler or with
    a model that is no plain GPT. eos and think_end are the ids of <eos> and </think>; without
    think_end no request may have a budget. cue holds the tokens that `extend` puts in the place of
    a </think>. device defaults to the model's own. So does dtype; on a CPU it is that of matrix
    products and of the cache (bf16 is up to twice as fast where the CPU has such products, and
    slower elsewhere), and the rest is fp32. Weights are read anew by each `generate`.

    Throughput grows with the slots until the machine is busy, memory with slots × the longest
    running sequence; before anything starts the engine reckons what that takes, and has fewer slots
    where it does not fit. The numbers that a row gets do not depend on what the other rows hold,
    but may differ in the last bit between two numbers of slots where PyTorch decodes. With
    `invariant` they do not: on a GPU slots decode in blocks of 256 rows, and are rounded up to a
    multiple of it; on a CPU the C decoder has it so in any case.
    """

    def __init__(
        self,
        model: GPT,
        *,
        slots: int = 64,
        eos: int | tuple[int, ...],
        think_end: int | None = None,
        cue: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        invariant: bool = False,
    ):
        vocabulary = model.config.vocab_size
        self.eos = (eos,) if isinstance(eos, int) else tuple(eos)
        named = *(("eos", t) for t in self.eos), *(("cue", t) for t in cue)
        for name, token in (("think_end", think_end), *named):
            if token is not None and not 0 <= token < vocabulary:
                raise ValueError(f"{name} is {token}; the model's tokens are 0 to {vocabulary - 1}")
        if think_end in self.eos:
            raise ValueError(f"eos and think_end are both {think_end}; they must differ")
        if {*self.eos, think_end} & {*cue}:
            raise ValueError(f"cue is {cue}; it may hold neither eos nor think_end")
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1")
        own = next(model.parameters(), torch.empty(0))
        self.device = own.device if device is None else torch.device(device)
        self.dtype = own.dtype if dtype is None else dtype
        self.model, self.think_end, self.cue = model, think_end, cue
        config, gpu = model.config, self.device.type == "cuda"
        self.native = self.device.type == "cpu" and fits(model, self.dtype)
        if invariant and not gpu and not self.native:
            raise ValueError(
                "invariant is true; on a CPU it needs a GPT in fp32 or bf16 and a C compiler"
            )
        # Slots; C's rows are each computed alone.
        self.least = 1 if self.native else GPU_BLOCK if gpu and invariant else ROWS
        self.slots, self.invariant = round_up(slots, self.least), invariant
        self.rows = GPU_BLOCK if gpu and invariant else self.slots  # that decode together
        group = GROUP if gpu or self.native else CPU_GROUP
        self.group = max(1, group * config.n_kv_head // config.n_head)
        # On a GPU the host looks at the results of several steps at once, so as not to stall it.
        self.steps_per_look = 16 if gpu else 1
        # A prefill's; PyTorch's products on a CPU are as fast from 128 rows on.
        self.block_tokens = 2048 if gpu or self.native else 128

    def network(self) -> Network:
        """What computes the logits."""
        if self.native:
            return Decoder(self.model, self.dtype)
        if self._is_ready():
            return self.model
        return copy.deepcopy(self.model).to(self.device, self.dtype)

    def _is_ready(self) -> bool:
        """Whether the model can be used as it is."""
        own = next(self.model.parameters(), torch.empty(0))
        return (own.device, own.dtype) == (self.device, self.dtype)

    def group_of(self, requests: Iterable[Request]) -> int:
        """How many rows a group has that share a prompt's keys and values. On a GPU every place
        costs, taken or not, and no bit depends on how many there are."""
        if self.device.type != "cuda":
            return self.group
        most = max(Counter(request.prompt for request in requests).values(), default=1)
        return min(self.group, 1 << (most - 1).bit_length())

    def plan(self, requests: Iterable[Request]) -> Plan:
        """What fits into the memory that is free now: `slots`, or fewer with a warning.

        Raises ValueError where the requests fit with no number of slots.
        """
        choices = [self.slots]
        while choices[-1] > self.least:
            choices.append(round_up(choices[-1] // 2, self.least))
        itemsize, weights = self.dtype.itemsize, 0
        if self.native or not self._is_ready():
            count = sum(p.numel() for p in self.model.parameters())
            weights = count * itemsize + 4 * self.model.config.vocab_size * self.model.config.n_embd
        return Plan(
            requests,
            choices,
            available(self.device),
            ahead=self.steps_per_look,
            shape=self.model.config,
            itemsize=itemsize,
            weights=weights,
            block_tokens=self.block_tokens,
            triton=False,  # what is free now is besides the CUDA context
        )

    def generate(
        self,
        requests: Iterable[Request],
        *,
        ends: Collection[int] = (),
        watch: Callable[[Request, list[int]], None] | None = None,
    ) -> Iterator[Sample]:
        """The sample of each request, in the order in which they finish. ends: tokens behind which
        a sample ends, as it does behind <eos>.

        `requests` is read as slots fall free, up to two fillings of the slots ahead. Those that
        share a prompt should be adjacent: a prompt is forgotten when no waiting request has it.
        watch is called with a running request and the tokens that its completion has newly got.

        Raises ValueError, when it reads the request and before it samples it, for a prompt that is
        empty, holds tokens outside the vocabulary, or leaves the context too little room for
        max_tokens, and for a budget where the engine has no think_end; and for requests whose
        samples have no room in memory: see `plan`. The same where memory runs out all the same.
        """
        try:
            yield from self._generate(requests, ends, watch)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"memory ran out with {self.slots} slots; the samples until then are whole, and "
                "fewer slots or a smaller max_tokens need less"
            ) from error

    def _generate(
        self,
        requests: Iterable[Request],
        ends: Collection[int],
        watch: Callable[[Request, list[int]], None] | None,
    ) -> Iterator[Sample]:
        source = map(self._checked, requests)
        waiting = deque(islice(source, 2 * self.slots))
        if not waiting:
            return
        plan = self.plan(waiting)
        rows = min(self.rows, plan.slots)
        network = self.network()
        group = self.group_of(waiting)
        blocks = [Slots(self, network, rows, group, ends) for _ in range(plan.slots // rows)]
        prompts = Prompts(self, network)
        for request in waiting:
            prompts.expect(request.prompt)
        clock = 0.0  # seconds that a sample which has run from the start owes
        while True:
            free = sum(len(block.free) for block in blocks)
            for request in islice(source, max(0, free + plan.slots - len(waiting))):
                plan.admit(request)
                waiting.append(request)
                prompts.expect(request.prompt)
            batch = deque(waiting.popleft() for _ in range(min(free, len(waiting))))
            prompts.prefill(batch, waiting)
            start = time.perf_counter()
            for block in blocks:
                if part := [batch.popleft() for _ in range(min(len(block.free), len(batch)))]:
                    block.fill(part, prompts, clock)
            running = [block for block in blocks if block.running]
            if not running:
                return
            finished = [block.step() for block in running]
            alive = sum(len(block.running) for block in running)
            clock += (time.perf_counter() - start) / alive
            samples = []
            for block, done in zip(running, finished, strict=True):
                if watch:
                    block.show(watch)
                samples += block.collect(done, clock)
            yield from samples

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
        if params.extend and (self.think_end is None or not self.cue):
            raise ValueError(
                f"extend is {params.extend}, but the engine knows no cue to put in the place of "
                "</think>; give it think_end and cue"
            )
        return request

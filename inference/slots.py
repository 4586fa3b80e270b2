"""Slots: the rows that decode together, from a request to its finished sample."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch

from ..kernels import sample_tokens
from ..models import KVCache, Prefix
from .forcing import Forcing
from .graphs import Graphed, capture
from .prompts import LENGTH_STEP, Groups, Prompts, round_up
from .request import Request, Sample, stream_key


class Run:
    """What the host knows of the sample in a slot."""

    def __init__(self, request: Request, step: int, seconds: float):
        self.request = request
        self.step = step  # of the slots' clock, at which it began
        self.seconds = seconds
        self.shown = 0  # tokens of the completion that a watcher has seen


class Slots:
    """`rows` samples at a time: their state on the device, their requests on the host.

    Where PyTorch computes them, all rows are, in use or not, so that the shapes that the model sees
    are fixed.
    """

    def __init__(
        self, engine: Any, network: Any, rows: int, group: int, ends: Collection[int] = ()
    ):
        """group: rows that may share a prompt's keys and values; ends: the tokens behind which a
        sample ends, besides <eos>."""
        self.engine, self.network = engine, network
        self.sample_tokens = network.sample_tokens if engine.native else sample_tokens
        device, dtype, config = engine.device, engine.dtype, engine.model.config
        self.running: dict[int, Run] = {}
        self.free = list(range(rows))[::-1]  # adjacent rows for adjacent requests
        self.steps = 0
        self.integers = torch.zeros(6, rows, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(4, rows, dtype=torch.float32, device=device)
        # token: the next one to feed; count: tokens of the completion so far; most: max_tokens.
        self.token, self.length, self.count, self.most, self.seed, self.top_k = self.integers
        self.temperature, self.top_p, self.min_p, self.logprob = self.numbers
        self.top_p.fill_(1.0)  # sample_tokens looks at idle rows too
        self.done = torch.ones(rows, dtype=torch.bool, device=device)
        self.last = torch.zeros(config.vocab_size, dtype=torch.bool, device=device)
        self.last[[*engine.eos, *ends]] = True
        self.forcing = Forcing(rows, think_end=engine.think_end, cue=engine.cue, device=device)
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.cache = KVCache(config, rows, 0, device=device, dtype=dtype)
        self.cache.lengths = self.length
        self.cache.empty = False
        self.prefix = Prefix(config, rows, LENGTH_STEP, group, device=device, dtype=dtype)
        self.cache.prefix, self.groups = self.prefix, Groups(self.prefix)
        # It is given the step anew each time: one that it kept would keep these slots, their cache
        # and its graph until Python looks for cycles.
        self.decode = Graphed(partial(capture, device) if device.type == "cuda" else None)
        self.peak = self.next_fit = 0

    @torch.inference_mode()
    def fill(self, batch: list[Request], prompts: Prompts, seconds: float) -> None:
        """Put each request into a free slot, behind its prompt's keys and values.

        seconds: what a sample that had run from the engine's start would owe by now.
        """
        rows = [self.free.pop() for _ in batch]
        integers, numbers, most = [], [], 0
        for row, request in zip(rows, batch, strict=True):
            prompt, params = request.prompt, request.params
            source, owed = prompts.take(prompt)
            self.groups.add(row, prompt, source)
            seed = stream_key(prompt, request.seed, request.index)
            # The last token of the prompt is fed once more, for the logits behind it.
            integers.append((prompt[-1], 0, 0, params.max_tokens, seed, params.top_k))
            numbers.append((params.temperature, params.top_p, params.min_p, 0.0))
            most = max(most, params.max_tokens)
            self.running[row] = Run(request, self.steps, owed - seconds)
        self.groups.update()
        self._fit(self.engine.steps_per_look)
        device = self.engine.device
        index = torch.tensor(rows, device=device)
        for told, known in ((self.integers, integers), (self.numbers, numbers)):
            told.index_copy_(1, index, told.new_tensor(known).t())
        self.forcing.start(index, [request.params for request in batch])
        self.done.index_fill_(0, index, False)
        if most >= self.tokens.shape[1]:
            self.tokens = torch.nn.functional.pad(self.tokens, (0, most + 1 - self.tokens.shape[1]))

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Decode a token of every slot (a few, on a GPU); the rows that finished."""
        n = self.engine.steps_per_look
        self._fit(n)
        cache, prefix = self.cache, self.prefix
        moving = cache.keys, cache.values, self.tokens, prefix.keys, prefix.values
        moving += prefix.lengths, prefix.order, prefix.taken
        self.decode(self._step, n, key=tuple((x.data_ptr(), x.shape) for x in moving))
        self.steps += n
        finished = [row for row, done in enumerate(self.done.tolist()) if done]
        return [row for row in finished if row in self.running]

    def show(self, watch: Callable[[Request, list[int]], None]) -> None:
        """Tell watch what every running sample has got since the last time."""
        counts = self.count.tolist()
        for row, run in self.running.items():
            new = self.tokens[row, run.shown : counts[row]].tolist()
            run.shown = counts[row]
            if new:
                watch(run.request, new)

    def _step(self) -> None:
        rows = None  # all of them
        if self.engine.native and self.free:
            rows = torch.tensor(sorted(self.running), device=self.engine.device)
        given = self.token, self.temperature, self.top_k, self.top_p, self.min_p, self.seed
        given = *given, self.count
        if rows is not None:
            given = tuple(x[rows] for x in given)
        tokens, temperature, top_k, top_p, min_p, seeds, positions = given
        network, which = self.network, () if rows is None else (rows,)
        hidden = network.hidden(tokens[:, None], self.cache, *which)
        token, logprob = self.sample_tokens(
            network.logits(hidden[:, -1]),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            positions=positions,
        )
        if rows is not None:
            token = torch.zeros_like(self.token).index_copy_(0, rows, token)
            logprob = torch.zeros_like(self.logprob).index_copy_(0, rows, logprob)
        forced = self.forcing(token, self.count, self.done)
        self.logprob += logprob.masked_fill_(self.done | forced, 0.0)
        self.tokens.scatter_(1, self.count[:, None], token[:, None])
        self.count += ~self.done  # a finished row writes behind its tokens
        self.done |= self.last[token] | (self.count == self.most)
        self.length += 1
        self.length.masked_fill_(self.done, 0)
        self.token.copy_(token)

    def collect(self, rows: list[int], seconds: float) -> list[Sample]:
        """The finished samples of these rows, which fall free. seconds: as in `fill`."""
        if not rows:
            return []
        index = torch.tensor(rows, device=self.engine.device)
        counts = self.count[index].tolist()
        tokens = self.tokens[index, : max(counts)].tolist()
        logprobs = self.logprob[index].tolist()
        samples = []
        forced_counts = self.forcing.forced[index].tolist()
        for row, count, drawn, logprob, forced in zip(
            rows, counts, tokens, logprobs, forced_counts, strict=True
        ):
            run = self.running.pop(row)
            self.groups.remove(row, run.request.prompt)
            drawn = tuple(drawn[:count])
            samples.append(
                Sample(
                    request=run.request,
                    tokens=drawn,
                    sampled_tokens=count - forced,
                    forced_tokens=forced,
                    logprob=logprob,
                    finish="stop" if drawn[-1] in self.engine.eos else "length",
                    seconds=run.seconds + seconds,
                )
            )
        self.free += rows[::-1]
        return samples

    def _fit(self, steps: int) -> None:
        """Keep the cache's capacity near what is needed, where every step reads all of it: it grows
        at once, and shrinks where the most that was needed for a while is less.

        C and a GPU read what is valid alone. C's cache doubles, up to the longest sample; on a GPU
        there is room for that from the beginning, so that a captured step is of use for long.
        """
        capacity, running = self.cache.capacity, self.running.values()
        if self.engine.device.type == "cuda":
            needed = self._longest(steps)
            if needed > capacity:
                self.cache.resize(needed)
            return
        needed = round_up(self.steps + steps - min(run.step for run in running))
        self.peak = max(self.peak, needed)
        if needed > capacity:
            ahead = min(2 * needed, self._longest(steps)) if self.engine.native else 0
            self.cache.resize(max(needed, ahead))
        elif self.steps >= self.next_fit and not self.engine.native:
            if self.peak < capacity:
                self.cache.resize(self.peak)
            self.peak, self.next_fit = needed, self.steps + LENGTH_STEP

    def _longest(self, steps: int) -> int:
        """What the longest of the running samples may need."""
        return round_up(max(run.request.params.max_tokens for run in self.running.values()) + steps)

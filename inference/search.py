"""Search: strategies that decide while sampling, step by step, which lines of thought to follow.

A step is a number of tokens, or ends where the task says. A search is a generator: it yields the
requests that it wants sampled and is sent their samples, so that `stream` can advance the searches
of many problems together, all on one run of the engine. A judge says how promising a completion so
far is. To add a search, write a class with `name` and `search`, and put it into SEARCHES.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ..models import GPTConfig
from ..models.flops import prefill_flops, sample_flops
from .engine import Engine, Request, Sample, SamplingParams

Tokens = tuple[int, ...]
# The value of each completion so far, higher is better: (prompt, completions) -> numbers in [0, 1].
# In a judge's place None stands for `Node.confidence`, which costs nothing.
Judge = Callable[[Tokens, Sequence[Tokens]], Sequence[float]]


@dataclass(frozen=True)
class Node:
    """A completion so far: its tokens, how many of them were forced, whether it has ended, the sum
    of the log-probabilities of `sampled` tokens of it, and the judge's value."""

    tokens: Tokens = ()
    forced: int = 0
    ended: bool = False
    logprob: float = 0.0
    sampled: int = 0
    value: float = 0.0

    @property
    def confidence(self) -> float:
        """The probability of a sampled token, at the (geometric) mean."""
        return math.exp(self.logprob / max(1, self.sampled))


@dataclass(frozen=True)
class Found:
    """What a search comes to: the best completion, and what all of them cost.

    sampled_tokens and forced_tokens count every token of every branch once; pruned_tokens, of
    both, are those that no finished completion holds. read: the lengths of what was read before
    anything was drawn, the prompt and, as each step begins from text alone, the prefixes of all
    later steps; drawn: of every sample the tokens before it and its own; judged: the lengths, the
    prompt included, of what the judge read. seconds are the samples', judge_seconds the judge's.
    """

    best: Node
    finished: tuple[Node, ...]
    sampled_tokens: int
    forced_tokens: int
    pruned_tokens: int
    read: tuple[int, ...]
    drawn: tuple[tuple[int, int], ...]
    judged: tuple[int, ...]
    seconds: float
    judge_seconds: float

    @property
    def prompt_tokens(self) -> int:
        """Tokens that were read, those read again counted again."""
        return sum(self.read)

    def flops(self, shape: GPTConfig) -> int:
        """Operations of the model, what it read several times counted as often."""
        return sum(prefill_flops(shape, n) for n in self.read) + sum(
            sample_flops(shape, start, n) for start, n in self.drawn
        )


@dataclass(frozen=True)
class Steps:
    """How every search samples: params of a completion (max_tokens, and the thinking budget, over
    the whole of it), the tokens of a step, the seed, the id that ends a thought, and the cue
    with which a thought is taken up again."""

    params: SamplingParams
    step: int
    seed: int
    think_end: int | None = None
    cue: Tokens = ()

    def __post_init__(self):
        if self.step < 1:
            raise ValueError(f"a step of {self.step} tokens; it must have at least 1")

    def request(self, prompt: Tokens, node: Node, index: int) -> Request:
        """One more step of a node. The prompt of a request names its random stream, so siblings
        differ by index, and steps by what they follow."""
        params, used = self.params, len(node.tokens)
        budget = params.budget
        if budget is not None:
            closed = self.think_end in node.tokens
            budget = None if closed else max(0, budget - used)
        most = min(self.step, params.max_tokens - used)
        params = replace(params, max_tokens=most, budget=budget)
        return Request(prompt + node.tokens, params, self.seed, index)

    def extend(self, node: Node, sample: Sample) -> Node:
        """The node behind a sample of its request."""
        tokens = node.tokens + sample.tokens
        return Node(
            tokens=tokens,
            forced=node.forced + sample.forced_tokens,
            ended=sample.finish == "stop" or len(tokens) >= self.params.max_tokens,
            logprob=node.logprob + sample.logprob,
            sampled=node.sampled + sample.sampled_tokens,
        )


Search = Generator[list[Request], list[Sample], Found]


class Searcher(Protocol):
    """A way to search."""

    @property
    def name(self) -> str: ...

    def search(self, prompt: Tokens, steps: Steps, judge: Judge | None) -> Search:
        """The search of one prompt; judge None: a line's mean token probability is its value."""
        ...


class _Queue:
    """Requests for an engine that asks for them as its slots fall free. It may run dry and be
    filled again, which an engine that asks once more gets to see."""

    def __init__(self):
        self.waiting: deque[Request] = deque()

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        if not self.waiting:
            raise StopIteration
        return self.waiting.popleft()


def stream(
    generate: Callable[[Iterable[Request]], Iterator[Sample]],
    searches: Iterable[Search],
    busy: float = math.inf,
) -> Iterator[tuple[int, Found]]:
    """The place and the outcome of each search, as they come to an end.

    generate: an engine's. Another search begins where fewer than `busy` requests are under way, so
    that a caller who keeps what is finished loses little when it is stopped.
    """
    source = enumerate(searches)
    queue = _Queue()
    under_way: dict[int, tuple[Search, list[Sample | None]]] = {}
    owed = 0  # samples that searches wait for

    def advance(place: int, search: Search, samples: list[Sample] | None) -> Found | None:
        nonlocal owed
        try:
            requests = next(search) if samples is None else search.send(samples)
            while not requests:
                requests = search.send([])
        except StopIteration as stop:
            return stop.value
        under_way[place] = search, [None] * len(requests)
        owed += len(requests)
        queue.waiting += [replace(r, key=(place, i)) for i, r in enumerate(requests)]
        return None

    def begin() -> None:
        while owed < busy and (one := next(source, None)):
            found = advance(*one, None)
            assert found is None, "a search draws something"

    begin()
    while queue.waiting:
        for sample in generate(queue):
            place, i = sample.request.key
            search, samples = under_way[place]
            samples[i] = sample
            owed -= 1
            whole = [s for s in samples if s is not None]
            if len(whole) == len(samples):
                del under_way[place]
                found = advance(place, search, whole)
                if found is not None:
                    yield place, found
            begin()


def run(engine: Engine, searches: Iterable[Search]) -> list[Found]:
    """The outcomes of all searches, in their order."""
    return [
        found for _, found in sorted(stream(engine.generate, searches), key=lambda pair: pair[0])
    ]


@dataclass
class _Ledger:
    """One search's dealings: what it asks for, what comes back, what that has cost."""

    prompt: Tokens
    steps: Steps
    judge: Judge | None
    drawn: list[tuple[Node, Node]] = field(default_factory=list)  # (parent, child)
    seconds: float = 0.0
    read: list[int] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)
    judge_seconds: float = 0.0
    asked: dict[Tokens, int] = field(default_factory=dict)

    def grow(self, parents: Sequence[Node]) -> Generator[list[Request], list[Sample], list[Node]]:
        """A child of each parent, judged; a parent may be named several times."""
        requests = []
        for parent in parents:
            index = self.asked.get(parent.tokens, 0)
            self.asked[parent.tokens] = index + 1
            requests.append(self.steps.request(self.prompt, parent, index))
        samples = yield requests
        children = [self.steps.extend(p, s) for p, s in zip(parents, samples, strict=True)]
        if self.judge is None:
            values = [child.confidence for child in children]
        else:
            begun = time.perf_counter()
            values = self.judge(self.prompt, [child.tokens for child in children])
            self.judge_seconds += time.perf_counter() - begun
            self.judged += [len(self.prompt) + len(child.tokens) for child in children]
        children = [replace(c, value=float(v)) for c, v in zip(children, values, strict=True)]
        self.drawn += zip(parents, children, strict=True)
        # An engine reads a prompt once for all the samples that are asked of it together.
        self.read += [len(prompt) for prompt in {r.prompt: None for r in requests}]
        self.seconds += sum(sample.seconds for sample in samples)
        return children

    def found(self, finished: Sequence[Node]) -> Found:
        """The most valued of the finished (the first of equals)."""
        new = [len(child.tokens) - len(parent.tokens) for parent, child in self.drawn]
        forced = sum(child.forced - parent.forced for parent, child in self.drawn)
        kept = sum(
            n
            for n, (_, child) in zip(new, self.drawn, strict=True)
            if any(f.tokens[: len(child.tokens)] == child.tokens for f in finished)
        )
        return Found(
            best=max(finished, key=lambda node: node.value),
            finished=tuple(finished),
            sampled_tokens=sum(new) - forced,
            forced_tokens=forced,
            pruned_tokens=sum(new) - kept,
            read=tuple(self.read),
            drawn=tuple(
                (len(self.prompt) + len(parent.tokens), n)
                for n, (parent, _) in zip(new, self.drawn, strict=True)
            ),
            judged=tuple(self.judged),
            seconds=self.seconds,
            judge_seconds=self.judge_seconds,
        )


@dataclass(frozen=True)
class BeamSearch:
    """Keep the best of the beams after every step and grow each kept one several times.

    beams lines in all, `width` children of each that is kept, so beams / width are kept. A line
    that has ended keeps its place and is not grown. Source: Snell et al. 2024, "Scaling LLM
    Test-Time Compute Optimally", section 5.1 (beam search against a process verifier).
    """

    beams: int = 8
    width: int = 4
    name: str = "beam"

    def __post_init__(self):
        _check(self.name, self.beams, self.width)

    def search(self, prompt: Tokens, steps: Steps, judge: Judge | None) -> Search:
        ledger = _Ledger(prompt, steps, judge)
        lines = yield from ledger.grow([Node()] * self.beams)
        while not all(line.ended for line in lines):
            kept = sorted(lines, key=lambda n: -n.value)[: self.beams // self.width]
            ended = [line for line in kept if line.ended]
            grown = yield from ledger.grow(
                [line for line in kept if not line.ended for _ in range(self.width)]
            )
            lines = ended + grown
        return ledger.found(lines)


@dataclass(frozen=True)
class DiverseTreeSearch(BeamSearch):
    """Beam search in independent subtrees, each keeping its one best line, so that one early
    favourite cannot take all beams.

    beams / width subtrees. Source: Beeching, Tunstall and Rush 2024, "Scaling Test-Time Compute
    with Open Models" (DVTS).
    """

    name: str = "dvts"

    def search(self, prompt: Tokens, steps: Steps, judge: Judge | None) -> Search:
        ledger = _Ledger(prompt, steps, judge)
        roots = [Node()] * (self.beams // self.width)
        while not all(root.ended for root in roots):
            alive = [i for i, root in enumerate(roots) if not root.ended]
            grown = yield from ledger.grow([roots[i] for i in alive for _ in range(self.width)])
            for place, i in enumerate(alive):
                children = grown[place * self.width : (place + 1) * self.width]
                roots[i] = max(children, key=lambda node: node.value)
        return ledger.found(roots)


@dataclass(frozen=True)
class Rebase:
    """Divide each step's samples among the lines by a softmax of their values: promising ones get
    more, and none is cut off while it is nearly as good.

    beams samples a step; those that end take their share with them. Source: Wu et al. 2024,
    "Inference Scaling Laws: An Empirical Analysis of Compute-Optimal Inference", section 3.2.
    """

    beams: int = 8
    temperature: float = 0.2
    name: str = "rebase"

    def __post_init__(self):
        _check(self.name, self.beams, 1)

    def search(self, prompt: Tokens, steps: Steps, judge: Judge | None) -> Search:
        ledger = _Ledger(prompt, steps, judge)
        ended: list[Node] = []
        lines = yield from ledger.grow([Node()] * self.beams)
        while True:
            ended += [line for line in lines if line.ended]
            alive = [line for line in lines if not line.ended]
            if not alive:
                return ledger.found(ended)
            shares = self.shares([line.value for line in alive], self.beams - len(ended))
            lines = yield from ledger.grow(
                [line for line, share in zip(alive, shares, strict=True) for _ in range(share)]
            )

    def shares(self, values: Sequence[float], count: int) -> list[int]:
        """count divided in proportion to exp(value / temperature), by largest remainders."""
        weights = np.exp((np.array(values) - max(values)) / self.temperature)
        exact = count * weights / weights.sum()
        whole = np.floor(exact).astype(int)
        rest = np.argsort(whole - exact, kind="stable")[: count - whole.sum()]
        whole[rest] += 1
        return whole.tolist()


@dataclass
class _Branch:
    node: Node
    parent: "_Branch | None" = None
    children: list["_Branch"] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    def ucb(self, exploration: float) -> float:
        assert self.parent is not None
        spread = math.sqrt(math.log(self.parent.visits) / self.visits)
        return self.total / self.visits + exploration * spread

    @property
    def closed(self) -> bool:
        """Whether nothing is left to grow below."""
        return self.node.ended or (bool(self.children) and all(c.closed for c in self.children))


@dataclass(frozen=True)
class TreeSearch:
    """Monte Carlo tree search: go down by upper confidence bounds, grow the leaf, hand the value of
    what grew up the path; the judge's value stands in for a rollout.

    expansions leaves are grown, `width` children each; then the best line is followed to its end.
    Source: Kocsis and Szepesvári 2006, "Bandit Based Monte-Carlo Planning" (UCT).
    """

    expansions: int = 8
    width: int = 4
    exploration: float = 0.5
    name: str = "mcts"

    def __post_init__(self):
        _check(self.name, self.expansions * self.width, self.width)

    def search(self, prompt: Tokens, steps: Steps, judge: Judge | None) -> Search:
        ledger = _Ledger(prompt, steps, judge)
        root = _Branch(Node())
        finished: list[Node] = []
        for _ in range(self.expansions):
            if root.closed:
                break
            leaf = root
            while leaf.children:
                open_ones = [c for c in leaf.children if not c.closed]
                leaf = max(open_ones, key=lambda c: c.ucb(self.exploration))
            children = yield from ledger.grow([leaf.node] * self.width)
            for child in children:
                branch = _Branch(child, leaf)
                leaf.children.append(branch)
                finished += [child] if child.ended else []
                climb: _Branch | None = branch
                while climb is not None:
                    climb.visits += 1
                    climb.total += child.value
                    climb = climb.parent
        line = root.node
        at = root
        while at.children:
            at = max(at.children, key=lambda c: c.node.value)
            line = at.node
        while not line.ended:
            children = yield from ledger.grow([line] * self.width)
            line = max(children, key=lambda node: node.value)
        if line not in finished:
            finished.append(line)
        return ledger.found(finished)


@dataclass(frozen=True)
class Revision:
    """One chain of thought with several attempts in it: where it closes, the answer is noted, the
    cue is put in the place of </think>, and the model tries again with all of it in view.

    Ends before `attempts` where no room is left. An attempt's confidence is of its own tokens.
    Source: Snell et al. 2024, section 6 (sequential revisions against parallel samples).
    """

    attempts: int = 8
    name: str = "revise"

    def __post_init__(self):
        _check(self.name, self.attempts, 1)

    def search(self, prompt: Tokens, steps: Steps, judge: Judge | None) -> Search:
        most = steps.params.max_tokens
        ledger = _Ledger(prompt, replace(steps, step=most), judge)
        start, finished = Node(), []
        while len(finished) < self.attempts and len(start.tokens) < most:
            (line,) = yield from ledger.grow([start])
            finished.append(line)
            if steps.think_end not in line.tokens:
                break
            thought = line.tokens[: line.tokens.index(steps.think_end)]
            start = Node(thought + steps.cue, forced=start.forced + len(steps.cue))
        return ledger.found(finished)


def _check(name: str, beams: int, width: int) -> None:
    if width < 1 or beams < width or beams % width:
        raise ValueError(
            f"{name}: {beams} beams of width {width}; the beams must be a multiple of the width, "
            "both at least 1"
        )


# Each of so many lines, expansions or attempts, and so many children of a line that is grown.
SEARCHES: dict[str, Callable[[int, int], Searcher]] = {
    "beam": BeamSearch,
    "dvts": DiverseTreeSearch,
    "rebase": lambda size, width: Rebase(size),
    "mcts": TreeSearch,
    "revise": lambda size, width: Revision(size),
}

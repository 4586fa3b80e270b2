"""A sweep's searches: which are wanted, how they run on the model, what is kept of each."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

from .. import tasks
from ..models.flops import verifier_flops
from ..models.verifier import step_ends
from .config import SweepConfig
from .engine import SamplingParams
from .local import LocalSpeaker
from .search import SEARCHES, Found, Judge, Node, Search, Steps, stream
from .search_table import Line, SearchKey, SearchRecord, missing, parse_search
from .speaker import Speaker
from .store import Store, params_text
from .verifier import Scorer

# Which of the options beside its size a search depends on.
SETTINGS: dict[str, tuple[str, ...]] = {
    "beam": ("width", "step"),
    "dvts": ("width", "step"),
    "rebase": ("step",),
    "mcts": ("width", "step"),
    "revise": (),
}


@dataclass(frozen=True)
class Judging:
    """A judge, what it is called in the store, and the operations that it takes to read so many
    tokens (NaN: unknown)."""

    name: str = "confidence"
    judge: Judge | None = None
    flops: Callable[[int], float] = lambda tokens: 0


def judging(verifier: Scorer | None, speaker: LocalSpeaker) -> Judging:
    """The judge of a sweep's searches, chosen here and nowhere else."""
    if verifier is None:
        return Judging()
    return Judging(
        name=verifier.hash,
        judge=verifier.judge(speaker.tokenizer),
        flops=lambda tokens: int(verifier_flops(verifier.shape, tokens)),
    )


class Searches:
    """The searches that a sweep's configuration names, on its model.

    params: how tokens are drawn, max_tokens of a whole completion; verifier: what judges lines,
    their own confidence where there is none. Raises ValueError where there are searches, and the
    speaker is not ponder's own engine, or the task has no steps of its own that they should take.
    """

    def __init__(
        self,
        config: SweepConfig,
        task: tasks.Task,
        speaker: Speaker,
        params: SamplingParams,
        verifier: Scorer | None = None,
    ):
        self.options, self.seed, self.params = config.searches, config.seed, params
        self.task, self.speaker = task, speaker
        self.ends: Collection[int] = ()
        if self.options.search:
            if not isinstance(speaker, LocalSpeaker):
                raise ValueError(
                    f"search is {' '.join(self.options.search)}; searches go on from tokens that "
                    "ponder's own engine drew: take a model of this machine and --engine ponder"
                )
            self.judging = judging(verifier, speaker)
            if self.options.step == "task":
                self.ends = step_ends(speaker.tokenizer, getattr(task, "step_end", ""))
                if not self.ends:
                    raise ValueError(
                        f"step is task, and {task.name} has no steps of its own (countdown, "
                        "permute and word problems have); say how many tokens a step has"
                    )

    def names(self) -> list[str]:
        """What the searches are called in the store."""
        names = []
        for name in dict.fromkeys(self.options.search):
            settings = "".join(f" {s}={getattr(self.options, s)}" for s in SETTINGS[name])
            for lines in sorted({*self.options.lines}):
                names.append(f"{name} lines={lines}{settings} judge={self.judging.name}")
        return names

    def wanted(self, store: Store, problems: Iterable[int]) -> list[SearchKey]:
        """The searches of these problems that the store lacks."""
        return missing(
            store,
            problems=problems,
            searches=self.names(),
            params=params_text(self.params),
            seed=self.seed,
        )

    def run(self, keys: list[SearchKey], problems: list[tasks.Problem]) -> Iterator[SearchRecord]:
        """The search of each key, as they come to an end."""
        for stepping, ends in (True, self.ends), (False, ()):
            chosen = [
                k for k in keys if ("step" in SETTINGS[parse_search(k.search)[0]]) == stepping
            ]
            yield from self._run(chosen, problems, ends)

    def _run(
        self, keys: list[SearchKey], problems: list[tasks.Problem], ends: Collection[int]
    ) -> Iterator[SearchRecord]:
        speaker, step = self.speaker, self.options.step
        if not keys or not isinstance(speaker, LocalSpeaker):
            return
        most = self.params.max_tokens
        steps = Steps(
            *(self.params, most if step == "task" else step, self.seed),
            *(speaker.think_end, speaker.cue),
        )
        encode = lru_cache(maxsize=64)(speaker.encode)

        def search(key: SearchKey) -> Search:
            name, size, _ = parse_search(key.search)
            searcher = SEARCHES[name](size, min(size, self.options.width))
            return searcher.search(encode(problems[key.problem].prompt), steps, self.judging.judge)

        # Two fillings of the slots: enough to keep them busy, little to lose.
        busy = 2 * speaker.engine.slots
        sample = partial(speaker.sample, ends=ends)
        for place, found in stream(sample, map(search, keys), busy):
            key = keys[place]
            yield _record(key, found, speaker, self.judging, self.task, problems[key.problem])


def _record(
    key: SearchKey,
    found: Found,
    speaker: LocalSpeaker,
    chosen: Judging,
    task: tasks.Task,
    problem: tasks.Problem,
) -> SearchRecord:
    prompt = speaker.encode(problem.prompt)

    def line(node: Node) -> Line:
        return Line(*tasks.judge(task, problem, speaker.decode(node.tokens, prompt)), node.value)

    others = [node for node in found.finished if node is not found.best]
    return SearchRecord(
        key=key,
        text=speaker.decode(found.best.tokens, prompt),
        lines=tuple(map(line, [found.best, *others])),
        prompt_tokens=found.prompt_tokens,
        sampled_tokens=found.sampled_tokens,
        forced_tokens=found.forced_tokens,
        pruned_tokens=found.pruned_tokens,
        flops=math.nan if speaker.shape is None else found.flops(speaker.shape),
        judge_flops=sum(map(chosen.flops, found.judged)),
        seconds=found.seconds + found.judge_seconds,
    )

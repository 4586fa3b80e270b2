"""What a sweep and a generation are; no torch here, so that `ponder sweep --help` is quick."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

LARGEST = (1 << 31) - 1  # of a count
LARGEST_SEED = (1 << 63) - 1
MOST_PROBLEMS = 100_000  # they are drawn before the first sample, without a word for up to a minute
SAMPLES, PROBLEMS = (1, 4, 16), 500  # where a sweep names none
LARGEST_CONCURRENCY = 4096  # requests, each of which has a thread
LONGEST_TIMEOUT = 1e6  # seconds, eleven days


@dataclass(frozen=True)
class ServerOptions:
    """How a server is asked; its key is read from PONDER_API_KEY or OPENAI_API_KEY."""

    concurrency: int = 16
    """requests under way at once"""
    timeout: float = 600.0
    """seconds that one answer may take"""
    retries: int = 6
    """how often an answer that failed is asked for again, after longer and longer waits"""


def outside(
    name: str, value: float | tuple[int, ...] | None, low: float, high: float = LARGEST
) -> list[str]:
    """The fault of a number, or of some, that are not from low to high; None is none. A field that
    must hold some numbers must not be empty."""
    if value is None:
        return []
    numbers = value if isinstance(value, tuple) else (value,)
    if numbers and all(low <= number <= high for number in numbers):
        return []
    said, one = (list(numbers), "each") if numbers is value else (value, "it")
    rule = f"at least {low}" if high == math.inf else f"from {low} to {high}"
    return [f"{name} is {said}; {one} must be {rule}"]


SearchName = Literal["beam", "dvts", "rebase", "mcts", "revise"]


@dataclass(frozen=True)
class SearchOptions:
    """Searches, which decide while they sample what to follow; each is one row for each size."""

    search: tuple[SearchName, ...] = ()
    """step beam search, diverse verifier tree search, REBASE, Monte Carlo tree search, attempts one
    after the other in one chain of thought; thinking is unlimited, `temperature` the sweep's"""
    lines: tuple[int, ...] = (4, 16)
    """sizes: the lines of beam, dvts and rebase, the expansions of mcts, the attempts of revise"""
    width: int = 4
    """children of each line that is kept, of each leaf that is expanded; at most the size"""
    step: int | Literal["task"] = 16
    """tokens of a step, after which lines are judged; task: a step ends with the task's own, where
    it has them (countdown, permute; lines, for word problems), as a process verifier wants it"""

    def faults(self) -> list[str]:
        """What is wrong with the fields."""
        faults = outside("width", self.width, 1)
        if self.step != "task":
            faults += outside("step", self.step, 1)
        if bad := outside("lines", self.lines, 1):
            faults += bad
        elif self.width >= 1 and {"beam", "dvts"} & {*self.search}:
            odd = [n for n in self.lines if n % min(n, self.width)]
            if odd:
                faults.append(
                    f"lines is {list(self.lines)}; for beam and dvts each must be a multiple of "
                    f"the width, {self.width}"
                )
        return faults


@dataclass(frozen=True)
class SweepConfig:
    """Sample a model on a task at several thinking budgets, and evaluate what they bought."""

    model: str
    """a folder that `ponder train` left, any checkpoint of a type that GPT is, or the
    URL of an OpenAI-compatible server, as in http://localhost:8000/v1#NAME"""
    task: str = "last_digit"
    """last_digit, permute, multiply, countdown, gsm8k and the like, gym:NAME, or FILE.py:CLASS for
    one of your own; settings behind a colon, as in permute:length=2-6"""
    out: Path = Path("runs/sweep")
    """the folder that gets sweep/, report/ and run.json"""
    samples: tuple[int, ...] | None = None
    """sizes of the votes; the largest is drawn, the smaller ones are subsets of it. None: 1 4 16,
    or what a resumed sweep has"""
    budgets: tuple[int, ...] | None = None
    """most thinking tokens before </think> is forced; unlimited thinking is always measured too.
    None: 0 to four fifths of the task's longest chain of thought, each the end of a step"""
    extend: tuple[int, ...] = ()
    """how many times the end of an unlimited thought is suppressed, and the cue put in its place;
    the model should have been trained with retries"""
    cue: str | None = None
    """what takes a thought up again; None: the task's own"""
    problems: int | None = None
    """held-out problems; None: 500, or all where there are fewer, or what a resumed sweep has"""
    split: Literal["test", "val", "train"] = "test"
    """the problems to sample; train: for a verifier to learn from"""
    verifier: str | None = None
    """a folder that `ponder train --verifier` left: it scores every sample, once, and chooses"""
    temperature: float = 1.0
    """of the samples; the greedy ones, at 0, come besides"""
    top_k: int = 0
    """draw from this many most probable tokens; 0: off"""
    top_p: float = 1.0
    """draw from the fewest tokens that hold this much probability; 1: off"""
    min_p: float = 0.0
    """draw from tokens with at least this part of the most probable one's chance; 0: off"""
    max_tokens: int | None = None
    """most new tokens of a sample; None: what the context leaves"""
    seed: int = 0
    """of the problems and the samples"""
    engine: Literal["ponder", "transformers"] = "ponder"
    """transformers: any causal model that Transformers loads"""
    system: str | None = None
    """the system message, where a chat template renders the prompts"""
    tokenizer: str | None = None
    """of a server's model: the folder or Hub id whose chat template renders the prompts, which
    budgets need; None: the model's own name"""
    searches: tyro.conf.OmitArgPrefixes[SearchOptions] = SearchOptions()
    """what searches there are, and their width"""
    server: ServerOptions = ServerOptions()
    """how a served model is asked"""
    slots: int | None = None
    """samples decoded at once; None: 512, or 16 with Transformers"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, and on a CPU where decoding is measured to be faster in it; run.json
    says which it was"""
    invariant: bool = False
    """the same samples to the bit whatever the slots, at some cost in speed (ponder's engine)"""
    resume: bool = False
    """go on with the samples that `out` holds; more samples, budgets, problems, extensions and
    searches than before add to them, and what is there stays and counts"""

    def check(self) -> None:
        """Raise one ValueError that names every field that cannot be."""
        faults = outside("samples", self.samples, 1)
        faults += outside("budgets", self.budgets or None, 0, math.inf)
        faults += outside("extend", self.extend or None, 1)
        faults += outside("problems", self.problems, 1, MOST_PROBLEMS)
        if self.cue == "":
            faults.append("cue is empty; it must hold a character at least")
        if not 0 < self.temperature < math.inf:
            faults.append(
                f"temperature is {self.temperature}; votes need a finite one above 0 "
                "(greedy answers are always measured)"
            )
        faults += self.searches.faults() + common_faults(self)
        if faults:
            raise ValueError("; ".join(faults))


def growing(config: SweepConfig, before: Mapping[str, Any]) -> set[str]:
    """The fields in which a sweep may ask for more than its folder was asked before, as run.json
    tells: what they add leaves the samples that are there as they are."""
    fields = {"samples", "problems", "extend"}
    if before.get("budgets"):  # where there were none, a chat template did not open the thought
        fields.add("budgets")
    had, more = before.get("searches", {}), config.searches
    if not before.get("extend") and "revise" not in had.get("search", ()):
        fields.add("cue")
    same = (had.get("width"), had.get("step")) == (more.width, more.step)
    if same or not had.get("search") or not more.search:
        fields.add("searches")
    return fields


def grown(config: SweepConfig, before: Mapping[str, Any]) -> SweepConfig:
    """The sweep that asks for all that was asked of its folder `before` (the configuration in
    run.json; {}: nothing) and is asked now: no count shrinks. What cannot grow is as now.
    ValueError for searches that do not go together."""
    if not before:
        return replace(config, samples=config.samples or SAMPLES)

    def union(*given: Iterable[int] | None) -> tuple[int, ...]:
        return tuple(sorted({n for numbers in given for n in numbers or ()}))

    grows, searches = growing(config, before), config.searches
    precision = config.precision
    if precision == "auto":  # what was measured then: a busier moment would measure another
        precision = before.get("precision", "auto")
    had = before.get("searches", {})
    if "searches" in grows and had.get("search"):
        more = searches if searches.search else SearchOptions(lines=())
        searches = SearchOptions(
            search=tuple(dict.fromkeys([*had["search"], *more.search])),
            lines=union(had["lines"], more.lines),
            width=had["width"],
            step=had["step"],
        )
        if faults := searches.faults():
            raise ValueError("; ".join(faults))
    return replace(
        config,
        samples=union(config.samples, before.get("samples")),
        budgets=union(config.budgets, before.get("budgets")),
        extend=union(config.extend, before.get("extend")),
        problems=max(config.problems or 1, before.get("problems", 1)),
        cue=config.cue if "cue" in grows else config.cue or before.get("cue"),
        searches=searches,
        precision=precision,
    )


def common_faults(config: "SweepConfig | GenerateConfig") -> list[str]:
    """What is wrong with the fields that both have."""
    faults = []
    if not config.model:
        faults.append("model is empty; give a folder, an id on the Hub, or a server's URL")
    server = config.server
    faults += outside("max_tokens", config.max_tokens, 1) + outside("slots", config.slots, 1)
    faults += outside("server.concurrency", server.concurrency, 1, LARGEST_CONCURRENCY)
    faults += outside("server.retries", server.retries, 0, math.inf)
    if not 0 < server.timeout <= LONGEST_TIMEOUT:
        faults.append(
            f"server.timeout is {server.timeout}; it must be above 0 and at most {LONGEST_TIMEOUT}"
        )
    served = config.model.startswith(("http://", "https://"))
    if served and config.engine != "ponder":
        faults.append(f"engine is {config.engine!r}; a server is its own engine")
    if served and config.precision != "auto":
        faults.append(f"precision is {config.precision!r}; that is the server's affair")
    if config.invariant and (served or config.engine != "ponder"):
        faults.append("invariant is true; only ponder's own engine promises that")
    if config.tokenizer is not None and not served:
        faults.append(f"tokenizer is {config.tokenizer!r}; a model of this machine has its own")
    if not 0 < config.top_p <= 1:
        faults.append(f"top_p is {config.top_p}; it must be above 0 and at most 1")
    faults += outside("top_k", config.top_k, 0) + outside("seed", config.seed, 0, LARGEST_SEED)
    return faults + outside("min_p", config.min_p, 0, 1)


@dataclass(frozen=True)
class GenerateConfig:
    """Let a model answer prompts, its thinking dimmed."""

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """texts to answer, each as it is"""
    model: str
    """a folder that `ponder train` left, any checkpoint of a type that GPT is, or the
    URL of an OpenAI-compatible server, as in http://localhost:8000/v1#NAME"""
    file: Path | None = None
    """a file of prompts, one a line, or a .jsonl file of {"prompt": ...}; - is standard input"""
    samples: int = 1
    """samples of each prompt"""
    budget: int | None = None
    """most thinking tokens before </think> is forced"""
    temperature: float = 0.0
    """0: greedy, the most probable token each time"""
    top_k: int = 0
    """draw from this many most probable tokens; 0: off"""
    top_p: float = 1.0
    """draw from the fewest tokens that hold this much probability; 1: off"""
    min_p: float = 0.0
    """draw from tokens with at least this part of the most probable one's chance; 0: off"""
    max_tokens: int | None = None
    """most new tokens; None: what the context leaves"""
    seed: int = 0
    """of the samples"""
    engine: Literal["ponder", "transformers"] = "ponder"
    """transformers: any causal model that Transformers loads"""
    system: str | None = None
    """the system message, where a chat template renders the prompts"""
    tokenizer: str | None = None
    """of a server's model: the folder or Hub id whose chat template renders the prompts, which a
    budget needs; None: the model's own name"""
    server: ServerOptions = ServerOptions()
    """how a served model is asked"""
    slots: int | None = None
    """samples decoded at once; None: as many as there are, up to 256"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, and on a CPU where decoding is measured to be faster in it"""
    invariant: bool = False
    """the same samples to the bit whatever the slots, at some cost in speed (ponder's engine)"""

    def check(self) -> None:
        """Raise one ValueError that names every field that cannot be."""
        faults = []
        if not self.prompts and self.file is None:
            faults.append("there is no prompt; give one, or --file PATH (- is standard input)")
        faults += outside("samples", self.samples, 1) + outside("budget", self.budget, 0, math.inf)
        if not 0 <= self.temperature < math.inf:
            faults.append(f"temperature is {self.temperature}; it must be at least 0, and finite")
        if self.samples > 1 and self.temperature == 0:
            faults.append(
                f"samples is {self.samples} and temperature 0: all of a prompt would be the same; "
                "say --temperature 1, or another one"
            )
        faults += common_faults(self)
        if faults:
            raise ValueError("; ".join(faults))

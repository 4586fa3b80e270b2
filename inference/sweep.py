"""A sweep: samples and searches of a model on a task, kept in a store, evaluated, reported."""

import queue
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from .. import tasks
from ..provenance import alone_in, note, open_run, read_run, write_aside
from . import Unfinished, search_table
from .config import LARGEST, PROBLEMS, SAMPLES, SweepConfig, growing, grown
from .engine import SamplingParams
from .evaluation import evaluate
from .report import summary, unfinished, write_report
from .scores import score
from .search_sweep import Searches
from .server import Refused
from .shards import Shard, joined, merge
from .speaker import Ask, Completion, Speaker, open_speaker, sampling
from .store import Key, Record, Store, params_text, parse_params
from .verifier import Scorer, open_verifier

T = TypeVar("T")
GREEDY = SamplingParams(temperature=0.0)
KEEP_EVERY_SECONDS = 2.0  # at most this much sampling is lost when a sweep is killed
# What does not decide which samples there are.
PRACTICAL = ("out", "resume", "slots", "server", "verifier")


def sweep(config: SweepConfig) -> Path:
    """Sample what the store lacks, evaluate, write the report, print its summary; returns its page.

    Every finished sample is kept within seconds: a sweep that was killed goes on where it was
    (`resume`) and ends with the same samples; SIGTERM ends it as Ctrl-C does. Under a launcher
    (torchrun, accelerate launch) the problems are dealt out to its processes. Raises Unfinished,
    after the report of what there is, where a server left samples out, and ValueError where
    another process is at work in the folder.
    """
    config.check()
    with _terminable(), ExitStack() as held, joined() as shard:
        return _sweep(config, shard, held)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt in here, where this is the thread that gets it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sweep(config: SweepConfig, shard: Shard, held: ExitStack) -> Path:
    claimed = shard.agreed(lambda: _claim(config, held), tell=Opened.facts)
    opened = claimed if shard.first else _open(config, **claimed)
    failures = _draw(opened, shard)
    lacking, page = shard.agreed(lambda: _finish(opened))
    if lacking and not shard.first:
        raise SystemExit(1)
    if lacking:
        reasons = ", ".join(f"{reason} {n} times" for reason, n in failures.most_common(4))
        why = f" ({reasons})" if reasons else ""
        raise Unfinished(
            f"{lacking} samples did not arrive{why}; what arrived is in {config.out}: say "
            "--resume to ask for the rest"
        )
    return Path(page)


@dataclass(frozen=True)
class Opened:
    """A sweep that can be drawn: whom it asks, for what."""

    config: SweepConfig  # grown by what its folder was asked before, with numbers for every None
    task: tasks.Task
    problems: list[tasks.Problem]
    speaker: Speaker
    most: int  # new tokens of a sample
    searches: Searches
    verifier: Scorer | None

    @property
    def folder(self) -> Path:
        """Where samples are kept."""
        return self.config.out / "sweep"

    def identity(self) -> dict[str, Any]:
        """The configuration that run.json keeps."""
        known = {k: v for k, v in asdict(self.config).items() if k not in PRACTICAL}
        of_model, code = self.speaker.identity, tasks.code_of(self.task)
        return known | {
            "task_code": code,  # of a task of one's own
            "task_cue": code and _cue(self.config, self.task),
            "model_hash": of_model["model"],
            "precision": of_model["precision"],
        }

    def facts(self) -> dict[str, Any]:
        """What another process opens it with."""
        return {"before": self.identity(), "most": self.most}

    def store(self, path: Path | None = None) -> Store:
        """The samples of all, or those at `path`."""
        of = {**self.speaker.identity, "task": self.config.task, "split": self.config.split}
        return Store(path or self.folder / "samples.sqlite", identity=of)

    def wanted(self, store: Store, problems: range) -> list[Key]:
        """The samples of these problems that the store lacks, a problem's side by side, so that
        they share one prefill."""
        keys, config = [], self.config
        for params, samples in ((GREEDY, 1), (sampling(config), max(config.samples or SAMPLES))):
            for extend in (0, *dict.fromkeys(config.extend)):
                keys += store.missing(
                    problems=problems,
                    budgets=[None] if extend else [*dict.fromkeys(config.budgets or ()), None],
                    params=params_text(replace(params, extend=extend)),
                    seed=config.seed,
                    samples=samples,
                )
        return sorted(keys, key=lambda key: key.problem)

    def ask(self, key: Key) -> Ask:
        """How the sample of that key is drawn."""
        known = parse_params(key.params)
        params = replace(
            sampling(self.config) if known["temperature"] else GREEDY,
            max_tokens=self.most,
            budget=key.budget,
            extend=int(known.get("extend", 0)),
        )
        prompt = self.problems[key.problem].prompt
        return Ask(prompt, params, seed=self.config.seed, index=key.sample, key=key)


def _claim(config: SweepConfig, held: ExitStack) -> Opened:
    """Open the sweep and take its folder, until `held` is let go; ValueError where it holds
    another one."""
    run = read_run(config.out).get("sweep", {}) if (config.out / "run.json").exists() else {}
    before = _earlier(config, run.get("configuration", {}))
    opened = _open(config, before, run.get("most_new_tokens"))
    opened.folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(alone_in(opened.folder))
    grows, told = growing(config, before), config.out / "run.json"
    if "cue" in grows:
        grows.add("task_cue")
    text = told.read_text(encoding="utf-8") if told.exists() else None
    identity = opened.identity()
    code = identity["task_code"]
    if before:  # run.json names a changed file once its verdicts are in: a killed run judges again
        identity["task_code"] = before.get("task_code")
    changed = identity["task_code"] != code
    open_run(config.out, "sweep", identity, resume=config.resume, grows=grows)
    try:
        with opened.store() as store:
            store.add_problems(opened.problems)
            merge(opened.folder, store)  # what a killed run left
            if changed:
                _judge_again(opened, store)
    except ValueError:  # not the problems that they were, or no verdicts: the folder is as it was
        if text is not None:
            write_aside(told, text)
        raise
    facts: dict[str, Any] = {}
    if changed:
        known = read_run(config.out)["sweep"]["configuration"]
        facts["configuration"] = known | {"task_code": code}
    if opened.most <= LARGEST:  # which longer prompts that come later must not change
        facts["most_new_tokens"] = opened.most
    if opened.speaker.shape is not None:  # for reports when the model is not there any more
        facts["shape"] = asdict(opened.speaker.shape)
    note(config.out, "sweep", facts)
    more = {
        name: whole
        for name in ("samples", "budgets", "extend", "problems")
        if (asked := getattr(config, name)) and asked != (whole := getattr(opened.config, name))
    }
    if before and more:
        counts = ", ".join(
            f"{name} {' '.join(map(str, whole)) if isinstance(whole, tuple) else whole}"
            for name, whole in more.items()
        )
        print(f"ponder: {config.out} has {counts}: what was asked before counts", file=sys.stderr)
    if twins := len(opened.problems) - len({problem.prompt for problem in opened.problems}):
        print(
            f"ponder: {twins} of the {len(opened.problems)} problems have the prompt of another, "
            "and with it its samples: the intervals take them for problems of their own",
            file=sys.stderr,
        )
    return opened


def _judge_again(opened: Opened, store: Store) -> None:
    """Judge the stored samples by the task's file as it is now, all or none, and say so. Searches
    keep verdicts without the texts of all their lines: they are let go, to be drawn again."""
    task, problems = opened.task, opened.problems
    kinds = {kind for (kind,) in store.rows("SELECT DISTINCT search FROM search")}
    if others := kinds - {*opened.searches.names()}:
        raise ValueError(
            f"{store.path} holds searches of another judge, such as {min(others)!r}, and what a "
            "changed task says of their lines is known only if they are drawn again: say the "
            "--verifier that they had"
        )
    [(count,)] = store.rows("SELECT ifnull(max(problem), -1) + 1 FROM sample")
    if count > len(problems):  # some were in what a killed run left
        raise ValueError(
            f"{store.path} holds samples of {count} problems, which a changed task must judge "
            f"again: say --problems {count}"
        )
    samples, searches = store.judge_again(lambda i, text: tasks.judge(task, problems[i], text))
    if samples or searches:
        redrawn = f", and {searches} searches will be drawn again" if searches else ""
        print(
            f"ponder: {opened.config.task} has changed: the {samples} samples of "
            f"{opened.config.out} were judged again{redrawn}",
            file=sys.stderr,
        )


def _earlier(config: SweepConfig, before: dict[str, Any]) -> dict[str, Any]:
    """The configuration in run.json without what was asked for and not begun, where less is asked
    for now."""
    path = config.out / "sweep" / "samples.sqlite"
    if not before or not path.exists():
        return before
    with Store(path, identity=None) as store:
        [(samples, problems)] = store.rows("SELECT max(sample) + 1, max(problem) + 1 FROM sample")
    if config.samples:
        most = max(samples or 0, *config.samples)
        before = before | {"samples": [k for k in before.get("samples", ()) if k <= most]}
    if config.problems:
        before = before | {"problems": min(before.get("problems", 1), problems or 1)}
    return before


def _open(config: SweepConfig, before: Mapping[str, Any], most: int | None) -> Opened:
    """Draw the problems and load the model; ValueError for what it cannot be asked. before, most:
    the configuration in run.json, and the new tokens of its samples."""
    config = grown(config, before)
    task = tasks.get(config.task)
    if config.problems is None:
        problems = tasks.at_most(task, config.split, PROBLEMS, config.seed)
        config = replace(config, problems=len(problems))
    else:
        problems = tasks.problems_of(task, config.split, config.problems, config.seed)
    prompts = [problem.prompt for problem in problems]
    verifier = open_verifier(config.verifier) if config.verifier else None
    speaker = open_speaker(
        config,
        slots=config.slots or (16 if config.engine == "transformers" else 512),
        budgets=config.budgets != (),
        cue=_cue(config, task),
    )
    budgets = config.budgets
    if budgets is None:
        room = speaker.fit(prompts, budgets=[], max_tokens=config.max_tokens)
        budgets = own_budgets(task, problems, speaker.length, room)
    try:
        most = speaker.fit(prompts, budgets=budgets, max_tokens=most or config.max_tokens)
    except ValueError as error:
        if most is None:
            raise
        raise ValueError(
            f"{error}; the samples in {config.out} were drawn with that max_tokens: give this "
            "sweep another --out"
        ) from None
    # Not of what is there already, and a server's answers are shorter than what they may be.
    if verifier is not None and speaker.shape is not None and not config.resume:
        verifier.check(prompts, most)
    searches = Searches(config, task, speaker, sampling(config, max_tokens=most), verifier)
    config = replace(config, budgets=budgets)
    return Opened(config, task, problems, speaker, most, searches, verifier)


def _cue(config: SweepConfig, task: tasks.Task) -> str | None:
    """What takes a thought up again; None where nothing asks for it."""
    if not config.extend and "revise" not in config.searches.search:
        return None
    cue = config.cue or getattr(task, "cue", None)
    if cue is None:
        raise ValueError(
            f"{task.name} has no cue of its own to take a thought up again with; say --cue TEXT, "
            "one that the model was trained on"
        )
    return cue


def own_budgets(
    task: tasks.Task, problems: list[tasks.Problem], length: Callable[[str], int], most: int
) -> tuple[int, ...]:
    """Thinking budgets that fit a task: fifths of the steps, as far as whole ones go, of the
    longest chain of thought that the task has for these problems, none of it beyond `most` new
    tokens. length: how many tokens a text is. ValueError where the task has none."""
    traces = {task.trace(problem): problem for problem in problems}
    for whole in sorted(filter(None, traces), key=len, reverse=True):
        if length(whole) + 2 > most:  # </think> and an answer are to come
            continue
        ends = [0]
        for steps in range(1, len(whole) + 1):
            ends.append(length(cut := task.trace(traces[whole], steps)))
            if cut == whole:
                break
        return tuple(dict.fromkeys(ends[round((len(ends) - 1) * i / 5)] for i in range(5)))
    raise ValueError(
        f"{task.name} has no worked chain of thought of at most {max(0, most - 2)} tokens to take "
        "budgets from; say which, as in --budgets 0 256 1024, or --budgets with no number"
    )


def _draw(opened: Opened, shard: Shard) -> Counter[str]:
    """Draw this process's part of what the store lacks; why samples of any did not arrive."""
    speaker, out = opened.speaker, opened.config.out
    mine = shard.problems(len(opened.problems))
    with opened.store() as whole:
        wanted, keys = opened.wanted(whole, mine), opened.searches.wanted(whole, mine)
        begun = len(whole) > 0
    if shard.first and (wanted or keys):  # seconds depend on it; a sweep that goes on may change it
        before = read_run(out)["sweep"].get("slots", [])
        note(out, "sweep", {"slots": sorted({*before, speaker.slots})})
    part = partial(opened.store, shard.store(opened.folder))
    with part() as store:
        store.add_problems(opened.problems)
    completions = speaker.generate(map(opened.ask, wanted))
    records = (_record(c, opened.task, opened.problems) for c in completions)
    try:
        _keep(records, part, Store.add, _bar(len(wanted), "sample", shard))
    except Refused:
        if not begun:  # else all that is lacking may be what a server refuses
            raise
    if keys:
        found = opened.searches.run(keys, opened.problems)
        _keep(found, part, search_table.add, _bar(len(keys), "search", shard))
    return sum(map(Counter, shard.gathered(speaker.failures)), Counter[str]())


def _record(completion: Completion, task: tasks.Task, problems: list[tasks.Problem]) -> Record:
    key: Key = completion.ask.key
    answer, correct = tasks.judge(task, problems[key.problem], completion.text)
    return Record(
        key=key,
        text=completion.text,
        answer=answer,
        correct=correct,
        prompt_tokens=completion.prompt_tokens,
        sampled_tokens=completion.sampled_tokens,
        forced_tokens=completion.forced_tokens,
        think_tokens=completion.think_tokens,
        logprob=completion.logprob,
        finish=completion.finish,
        seconds=completion.seconds,
    )


def _bar(total: int, unit: str, shard: Shard) -> tqdm:
    return tqdm(total=total, unit=unit, dynamic_ncols=True, disable=not shard.first)


def _keep(
    records: Iterable[T],
    opened: Callable[[], Store],
    add: Callable[[Store, list[T]], None],
    bar: tqdm,
) -> None:
    """Put the records into the store as they come, a batch every few seconds, in a thread: the
    next one may be long in coming."""
    arrived: queue.SimpleQueue[T | None] = queue.SimpleQueue()

    def keep() -> None:
        with opened() as store:  # SQLite wants it to be this thread's
            for batch in _batches(arrived):
                add(store, batch)
                bar.update(len(batch))

    with bar, ThreadPoolExecutor(1) as pool:
        kept = pool.submit(keep)
        try:
            for record in records:
                arrived.put(record)
                if kept.done():  # it failed
                    break
        finally:  # also when sampling was interrupted: what is finished is kept
            arrived.put(None)
            kept.result()


def _batches(arrived: "queue.SimpleQueue[T | None]") -> Iterator[list[T]]:
    """What comes up to a None, none of it later than KEEP_EVERY_SECONDS."""
    while True:
        batch, end = [arrived.get()], time.monotonic() + KEEP_EVERY_SECONDS
        with suppress(queue.Empty):
            while batch[-1] is not None and (left := end - time.monotonic()) > 0:
                batch.append(arrived.get(timeout=left))
        yield [record for record in batch if record is not None]
        if batch[-1] is None:
            return


def _finish(opened: Opened) -> tuple[int, str]:
    """Merge, evaluate, report; how many samples are lacking, and the report's page."""
    config, page = opened.config, opened.config.out / "report" / "index.html"
    with opened.store() as store:
        merge(opened.folder, store)
        lacking = len(opened.wanted(store, range(len(opened.problems))))
        results = []
        if opened.verifier is not None:
            score(store, opened.verifier, say=True)
        if len(store):
            results = evaluate(
                store,
                shape=opened.speaker.shape,
                samples=config.samples,
                seed=config.seed,
                model=config.model,
            )
        if results or not lacking:
            run = read_run(config.out)["sweep"]
            write_report(page.parent, results, store, run=run)
            print(summary(results, unfinished(run, store)))
    return lacking, str(page)

"""Prompts from the shell: the thinking dimmed, the answers plain, and what they cost."""

import io
import json
import os
import re
import sys
import time
from collections.abc import Sequence

from ..models.flops import prefill_flops, sample_flops
from . import Unfinished
from .chat import THINK, THINK_END, printable
from .config import GenerateConfig
from .speaker import Ask, Completion, Speaker, open_speaker, sampling

DIM, BOLD, PLAIN = "\033[2m", "\033[1m", "\033[0m"
TAG = re.compile("(</?think>)")
BEGUN = re.compile("<(/?(t(h(i(nk?)?)?)?)?)?$")


def generate(config: GenerateConfig) -> None:
    """Print the samples of each prompt, then a line with tokens, FLOPs and seconds.

    Raises Unfinished, after all that arrived is printed, where a server left samples out.
    """
    start = time.perf_counter()
    prompts = [*config.prompts, *_read(config)]
    count = len(prompts) * config.samples
    speaker = open_speaker(
        config,
        # Transformers batches one prompt's samples; ponder's engine, those of all.
        slots=config.slots or min(256, config.samples if config.engine != "ponder" else count),
        budgets=config.budget is not None,
    )
    most = speaker.fit(prompts, budgets=[config.budget], max_tokens=config.max_tokens)
    params = sampling(config, max_tokens=most, budget=config.budget)
    asks = [
        Ask(prompt, params, config.seed, index, key=number * config.samples + index)
        for number, prompt in enumerate(prompts)
        for index in range(config.samples)
    ]
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every console can write every character
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.name == "nt":  # its older consoles print the codes of dim and bold as they are
        import colorama  # type: ignore  # tqdm brings it there

        colorama.just_fix_windows_console()
    screen = Screen(dim=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    # A single sample is shown as it grows; several run side by side and are shown in order.
    watch = screen.show if count == 1 else None
    arrived: dict[int, Completion] = {}
    shown = 0
    try:
        for completion in speaker.generate(asks, watch=watch and (lambda _, text: watch(text))):
            arrived[completion.ask.key] = completion
            while shown in arrived and not watch:
                screen.sample(arrived[shown], titled=len(prompts) > 1)
                shown += 1
        if not watch:  # what stands behind one that never arrived
            for number in sorted(n for n in arrived if n > shown):
                screen.sample(arrived[number], titled=len(prompts) > 1)
    finally:  # an interrupted sample leaves the terminal as it was
        screen.end(line=bool(watch))
    completions = list(arrived.values())
    print(_costs(completions, speaker, time.perf_counter() - start), file=sys.stderr)
    if len(arrived) < count:
        reasons = ", ".join(f"{why} {n} times" for why, n in speaker.failures.most_common(4))
        raise Unfinished(f"{count - len(arrived)} of {count} samples did not arrive ({reasons})")


def _read(config: GenerateConfig) -> list[str]:
    """The prompts of the file: its lines, or the "prompt" of each line of a .jsonl file."""
    if config.file is None:
        return []
    try:
        # Standard input as a file: in UTF-8 whatever the locale, and its lines end in any way.
        data = sys.stdin.buffer.read() if str(config.file) == "-" else config.file.read_bytes()
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{config.file} cannot be read as text: {error}") from None
    # Not splitlines, for which U+2028 in a JSON string would end a line.
    lines = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise ValueError(f"{config.file} holds no prompt; one a line is expected")
    if config.file.suffix != ".jsonl":
        return list(lines.values())
    prompts = []
    for number, line in lines.items():
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError, RecursionError):
            prompts.append(None)
        if not isinstance(prompts[-1], str):
            raise ValueError(f'{config.file}: line {number} is no {{"prompt": "..."}}')
    return prompts


def _costs(completions: Sequence[Completion], speaker: Speaker, seconds: float) -> str:
    """The line that says what the samples cost; a prompt is read once for all its samples."""
    prompts = {c.ask.prompt: c.prompt_tokens for c in completions}
    sampled = sum(c.sampled_tokens for c in completions)
    forced = sum(c.forced_tokens for c in completions)
    flops = "FLOPs unknown"
    shape = speaker.shape
    if shape is not None:
        total = sum(prefill_flops(shape, n) for n in prompts.values())
        total += sum(
            sample_flops(shape, c.prompt_tokens, c.sampled_tokens + c.forced_tokens)
            for c in completions
        )
        flops = f"{total:.3g} FLOPs"
    line = (
        f"{sum(prompts.values())} prompt + {sampled} sampled + {forced} forced tokens, {flops}, "
        f"{seconds:.2f} s"
    )
    cut = sum(c.finish == "length" for c in completions)
    return f"{line}; {cut} of {len(completions)} samples cut at their last token" if cut else line


class Screen:
    """Prints text as it comes, dimmed from <think> to </think>; no control character reaches the
    terminal."""

    def __init__(self, *, dim: bool):
        self.dim, self.bold, self.plain = (DIM, BOLD, PLAIN) if dim else ("", "", "")
        self.held = ""  # the end of what came, where it may be the beginning of a tag
        self.title = ""  # the prompt that the last sample was of

    def show(self, text: str) -> None:
        text = self.held + text
        begun = BEGUN.search(text)
        whole = begun.start() if begun else len(text)
        self.held = text[whole:]
        for piece in TAG.split(text[:whole]):
            before = self.dim if piece == THINK else ""
            after = self.plain if piece == THINK_END else ""
            print(f"{before}{printable(piece)}{after}", end="")
        sys.stdout.flush()

    def end(self, *, line: bool = True) -> None:
        """The end of a sample, whole or interrupted: nothing stays dimmed."""
        print(printable(self.held) + self.plain, end="\n" * line, flush=True)
        self.held = ""

    def sample(self, completion: Completion, *, titled: bool) -> None:
        """A whole sample; titled: behind its prompt, where several are answered."""
        ask = completion.ask
        if titled and (ask.index == 0 or ask.prompt != self.title):
            print(f"{self.bold}{printable(ask.prompt)}{self.plain}")
        self.title = ask.prompt
        self.show(completion.text)
        self.end()

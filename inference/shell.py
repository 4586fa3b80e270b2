"""One prompt from the shell: the thinking dimmed, the answer plain, and what it cost."""

import sys
import time

from tokenizers.decoders import DecodeStream

from . import cost
from .config import GenerateConfig
from .engine import Request, SamplingParams
from .sweep import Speaker

DIM, PLAIN = "\033[2m", "\033[0m"


def generate(config: GenerateConfig) -> None:
    """Print the samples of one prompt, then a line with tokens, FLOPs and seconds."""
    start = time.perf_counter()
    speaker = Speaker(config.model, slots=min(config.samples, 256))
    prompt = speaker.encode(config.prompt)
    room = speaker.room(len(prompt))
    if config.max_tokens is not None and config.max_tokens > room:
        raise ValueError(
            f"max_tokens is {config.max_tokens}; after {len(prompt)} prompt tokens the context of "
            f"{speaker.model.config.context} has room for {room}"
        )
    params = SamplingParams(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        max_tokens=config.max_tokens or room,
        budget=config.budget,
    )
    screen = _Screen(speaker, dim=sys.stdout.isatty())
    sampled = forced = flops = 0
    shape = speaker.model.config
    # A single sample is shown token by token; several run side by side, each is shown when done.
    requests = [Request(prompt, params, config.seed, i) for i in range(config.samples)]
    watch = screen.tokens if config.samples == 1 else None
    try:
        for sample in speaker.engine.generate(requests, watch=watch):
            if watch is None:
                screen.tokens(sample.request, list(sample.tokens))
            screen.end()
            sampled += sample.sampled_tokens
            forced += sample.forced_tokens
            flops += cost.sample_flops(shape, len(prompt), len(sample.tokens))
    finally:  # an interrupted sample leaves the terminal as it was
        print(screen.plain, end="", flush=True)
    flops += cost.prefill_flops(shape, len(prompt))
    print(
        f"{len(prompt)} prompt + {sampled} sampled + {forced} forced tokens, "
        f"{flops:.3g} FLOPs, {time.perf_counter() - start:.2f} s",
        file=sys.stderr,
    )


class _Screen:
    """Prints completions as their tokens come, dimmed up to </think>."""

    def __init__(self, speaker: Speaker, *, dim: bool):
        self.speaker = speaker
        self.dim, self.plain = (DIM, PLAIN) if dim else ("", "")
        self.begin()

    def begin(self) -> None:
        # It holds back the bytes of a character that is not whole yet.
        self.stream = DecodeStream(skip_special_tokens=False)
        self.open = False

    def tokens(self, request: Request, tokens: list[int]) -> None:
        if not self.open:
            self.open = True
            print(f"{self.dim}<think>", end="")
        for token in tokens:
            if token == self.speaker.eos:
                break
            text = self.stream.step(self.speaker.tokenizer, token)
            print(_printable(text or ""), end="")
            if token == self.speaker.think_end:
                print(self.plain, end="")
        sys.stdout.flush()

    def end(self) -> None:
        print(self.plain, flush=True)
        self.begin()


def _printable(text: str) -> str:
    """Model text without control characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)

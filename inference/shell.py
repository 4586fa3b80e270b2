"""One prompt from the shell: the thinking dimmed, the answer plain, and what it cost."""

import sys
import time

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
    requests = (Request(prompt, params, config.seed, i) for i in range(config.samples))
    dim, plain = (DIM, PLAIN) if sys.stdout.isatty() else ("", "")
    sampled = forced = flops = 0
    shape = speaker.model.config
    for sample in speaker.engine.generate(requests):
        text = speaker.text(sample)
        thought, end, answer = text.rpartition("</think>")
        print(f"{dim}{_printable(thought + end)}{plain}{_printable(answer)}", flush=True)
        sampled += sample.sampled_tokens
        forced += sample.forced_tokens
        flops += cost.sample_flops(shape, len(prompt), len(sample.tokens))
    flops += cost.prefill_flops(shape, len(prompt))
    print(
        f"{len(prompt)} prompt + {sampled} sampled + {forced} forced tokens, "
        f"{flops:.3g} FLOPs, {time.perf_counter() - start:.2f} s",
        file=sys.stderr,
    )


def _printable(text: str) -> str:
    """Model text without control characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)

"""What the terminal shows of a run: one live line, or plain lines where there is no terminal."""

import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

BARS = "▁▂▃▄▅▆▇█"
QUIET_SECONDS = 10.0  # between two plain lines
WIDTH = 24  # of the sparkline, in characters


def sparkline(values: Iterable[float]) -> str:
    """A character a value, from ▁ at the lowest to █ at the highest."""
    values = list(values)
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] for v in values)


class View:
    """Progress, a sparkline of the loss, tokens/s, MFU and the time left."""

    def __init__(self, total: int, done: int, *, enabled: bool = True):
        self.total, self.enabled = total, enabled
        self.live = enabled and sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=done,
            disable=not self.live,
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt} {bar:16} {desc} · {remaining} left",
        )
        self.losses: deque[float] = deque(maxlen=WIDTH)
        self.said = self.started = time.monotonic()
        self.first = done

    def step(self) -> None:
        self.bar.update()

    def row(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl."""
        self.losses.append(row["train_loss"])
        figures = (
            f"loss {row['train_loss']:.4f} {sparkline(self.losses)} · "
            f"{row['tokens_per_second']:,.0f} tokens/s · MFU {row['mfu']:.1%}"
        )
        if row["val_loss"] is not None:
            ranks = f", AUC {row['auc']:.3f}" if row.get("auc") is not None else ""
            self.say(
                f"step {row['step']}: val loss {row['val_loss']:.4f}{ranks}, {row['seconds']:.0f} s"
            )
        if self.live:
            self.bar.set_description_str(figures)
        elif time.monotonic() - self.said > QUIET_SECONDS:
            self.say(f"step {row['step']}/{self.total} {figures} · {self._left(row['step'])} left")

    def samples(self, samples: list[dict[str, Any]]) -> None:
        """Show the first two, a line each."""
        for sample in samples[:2]:
            mark = {True: " ✓", False: " ✗", None: ""}[sample["right"]]
            expected = sample.get("expected")
            right = f" (expected {_shortened(expected, 30)})" if expected else mark
            self.say(
                f"  {_shortened(sample['prompt'], 40)} → {_shortened(sample['text'], 60)}{right}"
            )

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        if self.enabled:
            self.said = time.monotonic()
            self.bar.write(text)
            sys.stdout.flush()

    def _left(self, step: int) -> str:
        rate = (time.monotonic() - self.started) / max(1, step - self.first)
        return tqdm.format_interval(round(rate * (self.total - step)))

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


def _shortened(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"

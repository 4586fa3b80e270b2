"""A training run as a picture and a page: losses, learning rate, gradient norm, throughput.

Drawn from train/metrics.jsonl and train/samples.jsonl alone, while the run goes on or after it.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..figures import BLUE, RED, STYLE
from ..provenance import read_run, write_aside
from .journal import read_rows

PALE = "#9bb7d6"  # of what is drawn over
SMOOTHED = 40  # points of a training loss that is drawn over the single ones

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: training</title>
<style>
body { margin: 0 auto; max-width: 1000px; padding: 2rem 1.25rem 4rem; color: #1c2530;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem }
img { width: 100%; height: auto } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid #e4e7eb;
  vertical-align: top }
th { color: #66717f; font-weight: 500; white-space: nowrap }
td.text { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere }
.expected { color: #66717f }
.right { color: #1d7a4d } .wrong { color: #b3372f }
</style></head><body>
<h1>{{ name }}</h1>
<p>{{ summary }}</p>
<img alt="Loss, learning rate, gradient norm and tokens per second against the step"
  src="data:image/png;base64,{{ picture }}">
{% if samples %}<h2>What the model wrote</h2>
<div class="scroll"><table><tr><th>step<th>prompt<th>text<th></tr>
{% for s in samples %}<tr><td>{{ s.step }}<td class="text">{{ s.prompt }}<td class="text">
{{- s.text }}{% if s.expected %}
<span class="expected">expected: {{ s.expected }}</span>{% endif %}<td>
{%- if s.right is true %}<span class="right">right</span>
{%- elif s.right is false %}<span class="wrong">wrong</span>{% endif %}</tr>
{% endfor %}</table></div>{% endif %}
<h2>How it was made</h2>
<div class="scroll"><table>{% for key, value in made %}<tr><th>{{ key }}<td>{{ value }}</tr>
{% endfor %}</table></div>
</body></html>
"""


def write_training_report(folder: Path) -> Path:
    """Write FOLDER/report/training.png and training.html; returns the page.

    ValueError for a folder that holds no training run, or one that has logged nothing yet.
    """
    runs = read_run(folder)
    if "train" not in runs:
        raise ValueError(f"{folder} holds no training run; its run.json knows {', '.join(runs)}")
    rows = read_rows(folder / "train" / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{folder}/train/metrics.jsonl holds no row yet; wait for the first one")
    report = folder / "report"
    report.mkdir(exist_ok=True)
    run = runs["train"]
    configuration, rate = run["configuration"], "Learning rate"
    if configuration.get("optimizer") == "muon":
        times = configuration["matrix_lr"] / configuration["lr"]
        rate += f" (the matrices': {times:.3g} times it)"
    picture = png(rows, rate)
    write_aside(report / "training.png", picture)
    samples = read_rows(folder / "train" / "samples.jsonl")
    last = samples[-1]["step"] if samples else 0
    made = {"command": run["command"], **run["versions"], **run["machine"], **configuration}
    page = jinja2.Template(PAGE, autoescape=True).render(
        name=folder.resolve().name,
        summary=summary(rows, configuration["steps"]),
        picture=base64.b64encode(picture).decode(),
        samples=[s for s in samples if s["step"] == last],
        made=list(made.items()),
    )
    write_aside(report / "training.html", page)
    return report / "training.html"


def summary(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """The run in two sentences."""
    last = rows[-1]
    evaluated = [row for row in rows if row["val_loss"] is not None]
    text = f"{last['step']} of {steps} steps, {human(last['tokens'])} tokens in "
    text += f"{last['seconds']:.0f} s; median {human(_median(rows, 'tokens_per_second'))} tokens/s "
    text += f"at {_median(rows, 'mfu'):.1%} of the machine's peak. "
    text += f"Training loss {last['train_loss']:.4f}"
    if evaluated:
        best = min(evaluated, key=lambda row: row["val_loss"])
        text += f", validation loss {evaluated[-1]['val_loss']:.4f}"
        if best is not evaluated[-1]:
            text += f" (lowest {best['val_loss']:.4f}, at step {best['step']})"
    return text + "."


def png(rows: Sequence[dict[str, Any]], rate: str) -> bytes:
    """Four panels over the step; rate: the title of the learning rate's."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
        axes = figure.subplots(2, 2, sharex=True)
        _losses(axes[0, 0], rows)
        _panel(axes[0, 1], rows, "lr", rate)
        _panel(axes[1, 0], rows, "grad_norm", "Gradient norm")
        _panel(axes[1, 1], rows, "tokens_per_second", "Tokens per second")
        _mfu(axes[1, 1], rows)
        for panel in axes[1]:
            panel.set_xlabel("Step")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=160)
    return file.getvalue()


def _losses(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    steps, losses = _column(rows, "step"), _column(rows, "train_loss")
    width = max(1, len(rows) // SMOOTHED)
    axes.plot(steps, losses, color=PALE, linewidth=1, alpha=0.6 if width > 1 else 1)
    means = [losses[max(0, i - width + 1) : i + 1] for i in range(len(losses))]
    means = [sum(window) / len(window) for window in means]
    axes.plot(steps, means, color=BLUE, linewidth=1.8, label="training")
    evaluated = [row for row in rows if row["val_loss"] is not None]
    if evaluated:
        x, y = _column(evaluated, "step"), _column(evaluated, "val_loss")
        axes.plot(x, y, "o-", color=RED, markersize=4, linewidth=1.5, label="validation")
    axes.set_title("Loss (nats per token)")
    # What training falls from would flatten what it falls to.
    after = losses[len(losses) // 20 :] + (_column(evaluated, "val_loss") if evaluated else [])
    low, high = min(after), max(after)
    axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
    axes.legend()


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], name: str, title: str) -> None:
    axes.plot(_column(rows, "step"), _column(rows, name), color=BLUE, linewidth=1.3)
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    if name == "tokens_per_second":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: human(y)))


def _mfu(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """A second scale on the right: tokens/s as a fraction of the peak."""
    per_token = _median(rows, "mfu") / max(_median(rows, "tokens_per_second"), 1e-9)
    right = axes.twinx()
    right.set_ylim(0, axes.get_ylim()[1] * per_token or 1)
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    right.set_ylabel("MFU")


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _median(rows: Sequence[dict[str, Any]], name: str) -> float:
    return sorted(_column(rows, name))[len(rows) // 2]


def human(x: float) -> str:
    """1234567 → 1.2M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"

"""The picture of a scaling law: loss against compute, the frontier, and what the law misses."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from ..figures import INK, MUTED, RED, STYLE, shades
from ..provenance import write_aside
from .report import human
from .scaling import Fit, frontier, power_of_size

if TYPE_CHECKING:
    from .scaling_report import Rung


def draw(fit: Fit, rungs: "Sequence[Rung]", path: Path) -> None:
    """Write the PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        done = [r for r in rungs if r.status == "finished"]
        draw_compute(left, fit, done)
        draw_parity(right, fit, done)
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=160)
    write_aside(path, picture.getvalue())


def draw_compute(axes: Axes, fit: Fit, rungs: "Sequence[Rung]") -> None:
    """Loss against the compute of training: runs, law and efficient frontier."""
    law, ladder = fit.law, [r for r in rungs if not r.held_out]
    sizes = sorted({r.parameters for r in ladder})
    for size, colour in zip(sizes, shades(len(sizes)), strict=True):
        mine = sorted((r for r in ladder if r.parameters == size), key=lambda r: r.tokens)
        d = np.array([r.tokens for r in mine])
        per_token = mine[0].flops / mine[0].tokens
        reach = np.geomspace(d.min() / 1.5, d.max() * 1.5, 60)
        axes.plot(per_token * reach, law.loss(size, reach), color=colour, linewidth=1.2)
        losses = np.array([r.val_loss for r in mine])
        axes.plot(per_token * d, losses, "o", color=colour, label=human(size))
    n, per_token = np.array([(r.parameters, r.flops / r.tokens) for r in rungs]).T
    spent = [r.flops for r in rungs]
    compute = np.geomspace(min(spent), max(spent) * 1.5, 80)
    best, _ = frontier(
        law,
        compute,
        power_of_size(n, per_token),
        (sizes[0] / 3, sizes[-1] * 3),  # what the ladder can speak of
    )
    axes.plot(compute, best, color=INK, linestyle=(0, (5, 3)), label="frontier", zorder=3)
    for r in rungs:
        if r.held_out:
            value, low, high = fit.predict(r.parameters, r.tokens)
            axes.errorbar(
                r.flops,
                value,
                yerr=[[value - low], [high - value]],
                color=RED,
                capsize=4,
                fmt="_",
                markersize=9,
                label="its prediction",
            )
            axes.plot(
                [r.flops],
                np.array([r.val_loss]),
                "*",
                color=RED,
                markersize=10,
                label=f"{human(r.parameters)}, held out",
            )
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="FLOPs of the training", ylabel="validation loss (nats a token)")
    _plain_numbers(axes, "y")
    axes.set_title("Loss against compute, by parameters")
    axes.legend(ncols=2, fontsize=8.5)


def draw_parity(axes: Axes, fit: Fit, rungs: "Sequence[Rung]") -> None:
    """What the law says against what was measured."""
    fitted = np.array([fit.law.loss(r.parameters, r.tokens) for r in rungs])
    losses = np.array([r.val_loss for r in rungs])
    error = 100 * (losses / fitted - 1)
    held = np.array([r.held_out for r in rungs])
    axes.axhline(0, color=MUTED, linewidth=1)
    sizes = sorted({r.parameters for r in rungs if not r.held_out})
    colours = dict(zip(sizes, shades(len(sizes)), strict=True))
    colour = [RED if r.held_out else colours[r.parameters] for r in rungs]
    for marker, size, some in (("o", 26, ~held), ("*", 90, held)):
        if some.any():
            chosen = [c for c, s in zip(colour, some, strict=True) if s]
            axes.scatter(fitted[some], error[some], c=chosen, marker=marker, s=size)
    reach = 1.15 * np.abs(error).max()
    axes.set_ylim(-reach, reach)
    axes.set_xscale("log")
    axes.set(xlabel="loss by the law (nats a token)", ylabel="measured above it (%)")
    _plain_numbers(axes, "x")
    axes.set_title("What the law leaves over")


def _plain_numbers(axes: Axes, which: str) -> None:
    """A logarithmic axis of less than a decade, labelled 1.8, 2.0, …"""
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axis.set_minor_formatter(NullFormatter())

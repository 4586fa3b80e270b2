"""The look that the figures of the documentation and of the scaling law share."""

from typing import Any

from matplotlib.axes import Axes

INK, MUTED, GRID = "#1c2530", "#66717f", "#e4e7eb"
BLUE, GREEN, RED, AMBER = "#3b74ad", "#2f7d60", "#c2562d", "#c9952b"
CYCLE = (BLUE, RED, GREEN, AMBER, MUTED)
BLUES = ("#a9c3dd", "#8ab0d3", "#6f9cc9", "#4f87b9", "#3b74ad", "#275f94", "#164a7f")
"""From small to large, for what has an order."""

STYLE: dict[Any, Any] = {
    "figure.figsize": (7.2, 3.8),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler('color', {list(CYCLE)})",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
}


def shades(count: int) -> list[str]:
    """`count` blues from light to dark."""
    last = len(BLUES) - 1
    return [BLUES[round(i * last / max(1, count - 1))] for i in range(count)]


def square(axes: Axes, title: str = "") -> Axes:
    """For points in a plane: equal scales, no grid."""
    axes.set_aspect("equal")
    axes.grid(False)
    axes.set_title(title)
    return axes

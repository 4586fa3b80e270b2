"""How figures are drawn: colours, axes and legends, as SVG for the page and as a PNG."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from ..figures import BLUES, GREEN, GRID, INK, MUTED, RED, STYLE
from .evaluation import Result
from .page import spread

# The PNG is drawn in these colours; in the page each becomes a CSS variable of its name, so that
# the figures follow the reader's light or dark theme. No two are equal.
COLOURS = {
    "paper": "#ffffff",
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "greedy": RED,
    **{f"vote-{i + 1}": blue for i, blue in enumerate(BLUES[::2])},
    "budget-1": "#a5cdb9",
    "budget-2": "#5fa587",
    "budget-3": GREEN,
    "budget-4": "#0d5340",
    "right": "#1d7a4d",
    "outvoted": "#d9a441",
    "never": "#c3cad3",
    "another": "#8a5aa8",
}


def picture(draw: Callable[..., None], *of: Any, note: str, **options: Any) -> bytes:
    """A figure as a PNG, with a line of text below it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5.2), layout="constrained")
        draw(figure.add_subplot(), *of, **options)
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=COLOURS["muted"])
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=180)
    return content.getvalue()


def svg(draw, name: str, *of, width: float = 4.8, height: float = 3.7, **options) -> Markup:
    """A figure as inline SVG in the page's own fonts and colours; size in inches."""
    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": name, "figure.constrained_layout.use": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=72)
        FigureCanvasSVG(figure)
        draw(figure.add_subplot(), *of, **options)
        # Laid out here, once: a figure that has a layout is drawn twice, in a quarter more time.
        ConstrainedLayoutEngine().execute(figure)
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for reference in ('id="', 'href="#', "url(#"):  # ids are one name space for the whole page
        text = text.replace(reference, f"{reference}{name}-")
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour})")
    label = escape(draw.__doc__.strip().splitlines()[0])
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def wide_and_narrow(draw, name: str, *of, columns: int = 3) -> tuple[Markup, Markup]:
    """A figure twice, for wide screens and for narrow ones; columns: of the wide one's legend."""
    wide = svg(draw, f"wide-{name}", *of, width=8.6, height=4.3, columns=columns)
    return wide, svg(draw, f"narrow-{name}", *of, height=4.4)


def standalone(figure: Markup) -> bytes:
    """An inline figure as a file of its own, in the colours of the PNG."""
    text = str(figure)  # a Markup's own methods escape
    for colour, value in COLOURS.items():
        text = text.replace(f"var(--{colour})", value)
    size = r'width="\1pt" height="\2pt" font-family="DejaVu Sans, Arial, sans-serif"'
    return re.sub(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', rf"{size} \g<0>", text, count=1).encode()


def shades(items: Sequence, name: str) -> dict[Any, str]:
    """A shade for each of at most four items, the last the darkest."""
    return {item: COLOURS[f"{name}-{4 - len(items) + i + 1}"] for i, item in enumerate(items)}


def note(
    axes: Axes, text: str, place: tuple[float, float], off: tuple[int, int], side: Any
) -> None:
    """Small text beside a point, `off` points away from it."""
    style: dict[str, Any] = dict(color=COLOURS["muted"], fontsize=8.5, ha=side, va="center")
    axes.annotate(text, place, xytext=off, textcoords="offset points", **style)


def line(
    axes: Axes, x: Sequence[float], rows: list[Result], label: str, colour: str, style: str = "o-"
) -> None:
    """A line with a band, or whiskers where few points would make the band a box."""
    low, high = [r.ci_low for r in rows], [r.ci_high for r in rows]
    if len(rows) < 4:
        axes.vlines(x, low, high, color=colour, linewidth=1, alpha=0.6)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(x, [r.accuracy for r in rows], style, color=colour, label=label)


def staircase(axes: Axes, best: Sequence[Result], costs: Sequence[float], cost) -> None:
    """The most accurate that each cost allows, up to the greatest of `costs`."""
    rows = sorted(best, key=cost)
    if not rows:  # bounds alone, which do not compete
        return
    axes.plot(
        [*(cost(r) for r in rows), max(costs)],
        [*(r.accuracy for r in rows), rows[-1].accuracy],
        color=COLOURS["ink"],
        drawstyle="steps-post",
        linewidth=0.9,
        zorder=1.5,
        label="Pareto frontier",
    )


def cost_axis(axis: Axis, costs: Sequence[float], label: str, tick: Callable[[float], str]) -> None:
    """A logarithmic axis, with the more ticks to a decade the fewer decades there are."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # type: ignore
    ratio = max(costs, default=1) / min(costs, default=1)
    halves = [n / 2 for n in range(2, 20)]
    steps = ((2, halves), (5, halves[::2]), (300, (1, 2, 5)), (math.inf, (1,)))
    axis.set_major_locator(LogLocator(subs=next(subs for most, subs in steps if ratio <= most)))
    axis.set_label_text(label)
    axis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    axis.set_minor_formatter(NullFormatter())


def samples_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(spread(sizes, 8), [str(k) for k in spread(sizes, 8)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Samples per problem")


def finish(axes: Axes, guess: float, columns: int, title: str = "") -> None:
    """Accuracy from nothing to all, or to what is well above everything that is drawn."""
    drawn = axes.dataLim.ymax
    line = axes.axhline(guess, color=COLOURS["muted"], linestyle=(0, (5, 4)), linewidth=1.2)
    line.set_label("best guess")
    top = next((top for top in (0.1, 0.2, 0.4, 0.6, 0.8) if max(drawn, guess) < top), 1.0)
    axes.set_ylim(0, 1.03 * top)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    shares(axes, "Accuracy", columns, title)


def shares(axes: Axes, label: str, columns: int, title: str) -> None:
    """A vertical axis in per cent, and the legend."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    axes.set_ylabel(label)
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=3)
    legend(axes, columns, title)


def legend(axes: Axes, columns: int, title: str = "") -> None:
    """Above the axes, in as many columns as are asked for, needed, and wide enough for."""
    handles, labels = axes.get_legend_handles_labels()
    while True:
        columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))
        legend = axes.figure.legend(
            handles,
            labels,
            title=title or None,
            title_fontproperties=dict(size=12, weight="bold"),
            alignment="left",
            loc="outside upper left",
            borderaxespad=0,
            ncols=columns,
            handlelength=2.4,  # a dash and a half on both sides of a marker
            columnspacing=1.4,
            handletextpad=0.5,
        )
        for text in (legend.get_title(), *legend.get_texts()):
            text.set_parse_math(False)  # a name may hold dollar signs
        if columns == 1 or legend.get_window_extent().width < axes.figure.bbox.width:
            break
        legend.remove()
        columns -= 1

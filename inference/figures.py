"""The figures of a report, as SVG for the page and as a PNG."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from . import stats
from .evaluation import SLACK, Result
from .exchange import Line
from .page import budget_order, duration, human, short_budget, spread, visible, vote_text
from .policy import Policy
from .store import Pool, Store, without_extend

# The PNG is drawn in these colours; in the page each becomes a CSS variable of its name, so that
# the figures follow the reader's light or dark theme. No two are equal.
COLOURS = {
    "paper": "#ffffff",
    "ink": "#1c2530",
    "muted": "#66717f",
    "grid": "#e4e7eb",
    "greedy": "#c2562d",
    "vote-1": "#a9c3dd",
    "vote-2": "#6f9cc9",
    "vote-3": "#3b74ad",
    "vote-4": "#164a7f",
    "budget-1": "#a5cdb9",
    "budget-2": "#5fa587",
    "budget-3": "#2f7d60",
    "budget-4": "#0d5340",
    "right": "#1d7a4d",
    "outvoted": "#d9a441",
    "never": "#c3cad3",
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
}


# What accuracy is drawn against: the axis, a row's cost, how a tick reads.
UNITS: dict[str, tuple[str, Callable[[Result], float], Callable[[float], str]]] = {
    "FLOPs": ("FLOPs per problem", lambda r: r.flops_per_problem, human),
    "Tokens": ("Tokens per problem", lambda r: r.tokens_per_problem, human),
    "Seconds": (
        "Engine time per problem",
        lambda r: r.seconds_per_problem,
        duration,
    ),
}


@dataclass(frozen=True)
class Curves:
    """The results sorted for drawing: one sampling setting, the budgets, the sizes of the vote."""

    rows: list[Result]  # all of this sampling setting, every strategy, search and extension
    greedy: list[Result]  # one for each budget
    votes: dict[int, list[Result]]  # by number of samples; 1 is a single sample
    oracle: dict[int, list[Result]]  # pass@k
    budgets: list[int | None]
    guess: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Curves":
        hot = [without_extend(r.params) for r in results if r.temperature > 0]
        params = max(dict.fromkeys(hot), key=hot.count) if hot else ""

        shown = [r for r in results if r.temperature == 0 or without_extend(r.params) == params]

        def rows(strategy: str) -> list[Result]:
            chosen = [r for r in shown if r.strategy == strategy and not r.setting]
            return sorted(chosen, key=lambda r: (r.samples, budget_order(r.think_budget)))

        votes: dict[int, list[Result]] = {}
        for r in rows("sampling") + rows("self-consistency"):
            votes.setdefault(r.samples, []).append(r)
        oracle: dict[int, list[Result]] = {}
        for r in rows("sampling") + rows("pass@k"):
            oracle.setdefault(r.samples, []).append(r)
        return cls(
            rows=shown,
            greedy=rows("greedy"),
            votes=votes,
            oracle=oracle,
            budgets=sorted({r.think_budget for r in results}, key=budget_order),
            guess=results[0].guess_accuracy,
        )

    @property
    def units(self) -> list[str]:
        """The units in which every row has a cost above zero, as a logarithmic axis needs."""
        costs = {unit: [cost(r) for r in self.rows] for unit, (_, cost, _) in UNITS.items()}
        return [unit for unit, c in costs.items() if all(0 < x < math.inf for x in c)]

    @property
    def by_samples(self) -> bool:
        """Whether a line is one of samples, as there is one budget alone."""
        return len(self.budgets) == 1 and len(self.votes) > 1

    @property
    def along(self) -> str:
        """What grows along a line."""
        grows = "number of samples grows" if self.by_samples else "thinking budget grows"
        figures = "that number" if self.by_samples else "its tokens"
        return f"the {grows}; the small figures are {figures}"

    @property
    def shown_votes(self) -> dict[int, str]:
        """At most four sizes of the vote, the ends among them, each with its colour."""
        return _shades(spread(list(self.votes), 4), "vote")

    def pool(self, store: Store, budget: int | None | Literal["any"] = "any") -> Pool | None:
        """All samples behind the votes at a budget (or at any); None where each problem has one."""
        rows = [r for k, rows in self.votes.items() if k > 1 for r in rows]
        rows += [r for k, rows in self.oracle.items() if k > 1 for r in rows]
        for r in rows:
            if budget in ("any", r.think_budget):
                return store.pool(budget=r.think_budget, params=r.params, seed=r.seed)
        return None

    def best_gain(self) -> tuple[Result, Result] | None:
        """The largest vote and the single sample at the budget where the vote gains most."""
        if len(self.votes) < 2 or 1 not in self.votes:
            return None
        single = {r.think_budget: r for r in self.votes[1]}
        pairs = [(r, single[r.think_budget]) for r in self.votes[max(self.votes)]]
        return max(pairs, key=lambda pair: pair[0].accuracy - pair[1].accuracy)


def _shades(items: Sequence, name: str) -> dict[Any, str]:
    """A shade for each of at most four items, the last the darkest."""
    return {item: COLOURS[f"{name}-{4 - len(items) + i + 1}"] for i, item in enumerate(items)}


def png(results: Sequence[Result]) -> bytes:
    """The picture of accuracy against compute, as a PNG."""
    first = results[0]
    curves = Curves.of(results)
    return picture(
        draw_compute,
        curves,
        columns=7,
        title=visible(f"{first.task}: accuracy against compute spent at inference"),
        note=f"Along a line {curves.along}. "
        f"Bands: 95 % intervals over {first.problems:,} problems.",
    )


def picture(draw: Callable[..., None], *of: Any, note: str, **options: Any) -> bytes:
    """A figure as a PNG, with a line of text below it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5.2), layout="constrained")
        draw(figure.add_subplot(), *of, **options)
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=COLOURS["muted"])
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=180)
    return content.getvalue()


def draw_compute(
    axes: Axes, curves: Curves, unit: str | None = None, columns: int = 3, title: str = ""
) -> None:
    """Accuracy against the compute of a problem: a line for each way to spend it."""
    axis, cost, tick = UNITS[unit or curves.units[0]]
    lines = _lines(curves)
    for label, colour, rows in lines:
        _line(axes, [cost(r) for r in rows], rows, label, colour)
    if curves.by_samples:
        for r in spread([r for rows in curves.votes.values() for r in rows], 9):
            _note(axes, f"{r.samples:,}", (cost(r), r.accuracy), (0, -13), "center")
    else:
        _name_budgets(axes, curves.greedy or curves.votes.get(1, []), cost)
    best = frontier(curves.rows, cost)
    drawn = [r for _, _, rows in lines for r in rows]
    others = [r for r in best if r not in drawn]
    axes.plot(
        [cost(r) for r in others],
        [r.accuracy for r in others],
        "D",
        markersize=4.5,
        color=COLOURS["ink"],
        label="another strategy" if others else None,
    )
    _rings(axes, best, cost)
    _cost_axis(axes, [cost(r) for r in drawn + others], axis, tick)
    _finish(axes, curves.guess, min(columns, 4) if curves.by_samples else columns, title)


def _name_budgets(axes: Axes, rows: Sequence[Result], cost: Callable[[Result], float]) -> None:
    """The rows' budgets beside their points."""
    before = None
    for r, label in _labels(rows, cost):
        # Clear of the line, which arrives from below, and of the ring around a point.
        level = before is not None and abs(r.accuracy - before.accuracy) < 0.05
        side = ((8, 0), "left") if level else ((-8, 0), "right")
        _note(axes, label, (cost(r), r.accuracy), *side)
        before = r


def _note(
    axes: Axes, text: str, place: tuple[float, float], off: tuple[int, int], side: Any
) -> None:
    """Small text beside a point, `off` points away from it."""
    style = dict(color=COLOURS["muted"], fontsize=8.5, ha=side, va="center")
    axes.annotate(text, place, xytext=off, textcoords="offset points", **style)


def _labels(
    rows: Sequence[Result], cost: Callable[[Result], float]
) -> Iterator[tuple[Result, str]]:
    """Rows and their budgets; of budgets that come to the same, one row and both ends."""
    groups: list[list[Result]] = []
    for r in spread(rows, 9):
        first = groups[-1][0] if groups else None
        if (
            first
            and abs(cost(r) / cost(first) - 1) < SLACK
            and abs(r.accuracy - first.accuracy) < SLACK
        ):
            groups[-1].append(r)
        else:
            groups.append([r])
    for group in groups:
        ends = dict.fromkeys(short_budget(r.think_budget) for r in (group[0], group[-1]))
        yield group[-1], "–".join(ends)


def _rings(axes: Axes, best: Sequence[Result], cost: Callable[[Result], float]) -> None:
    axes.plot(
        [cost(r) for r in best],
        [r.accuracy for r in best],
        "o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=COLOURS["ink"],
        markeredgewidth=1.1,
        label="Pareto frontier",
    )


def frontier(rows: Sequence[Result], cost: Callable[[Result], float]) -> list[Result]:
    """The rows that no other one beats, as `evaluation.mark_pareto` has it, in a unit of choice."""
    costs = [math.nan if r.oracle else cost(r) for r in rows]
    best = stats.pareto(costs, [r.accuracy for r in rows], slack=SLACK)
    return [r for r, b in zip(rows, best, strict=True) if b]


def _cost_axis(
    axes: Axes, costs: Sequence[float], label: str, tick: Callable[[float], str]
) -> None:
    axes.set_xscale("log")
    wide = max(costs, default=1) > 300 * min(costs, default=1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_models(
    axes: Axes,
    models: dict[str, list[Result]],
    best: Sequence[Result],
    unit: str,
    title: str = "",
) -> None:
    """Accuracy against the compute of a problem: the Pareto frontier of each model."""
    lines = {visible(model): rows for model, rows in models.items()}
    _compare(axes, lines, best, unit, title=title)


def draw_searches(axes: Axes, curves: Curves, unit: str, columns: int = 3, title: str = "") -> None:
    """Accuracy against the compute of a problem: searches beside independent samples."""
    plain = {
        "self-consistency": "vote",
        "best-of-n": "best-of-n",
        "verifier-best-of-n": "verifier’s best-of-n",
    }
    known = {r.strategy for r in curves.rows}
    lines: dict[str, list[Result]] = {label: [] for n, label in plain.items() if n in known}
    for r in curves.rows:
        if r.think_budget is not None or r.oracle:
            continue
        if r.setting.startswith("extend="):
            if r.strategy in ("greedy", "sampling"):
                lines.setdefault(f"{r.strategy}, extended", []).append(r)
        elif r.strategy == "sampling":  # where both lines begin
            for label in plain.values():
                if label in lines:
                    lines[label].append(r)
        elif r.strategy in plain:
            lines[plain[r.strategy]].append(r)
        elif r.setting and not r.strategy.endswith("-vote"):
            lines.setdefault(r.strategy, []).append(r)
    lines = {label: rows for label, rows in lines.items() if rows}
    drawn = [r for rows in lines.values() for r in rows]
    _compare(axes, lines, frontier(drawn, UNITS[unit][1]), unit, columns, title)


def _compare(
    axes: Axes,
    lines: dict[str, list[Result]],
    best: Sequence[Result],
    unit: str,
    columns: int = 3,
    title: str = "",
) -> None:
    """A line of accuracy against cost for each label, and rings around the best rows."""
    axis, cost, tick = UNITS[unit]
    names = ("vote-4", "greedy", "budget-3", "outvoted", "vote-2", "budget-1", "never", "ink")
    for i, (label, rows) in enumerate(lines.items()):
        rows = sorted(rows, key=cost)
        _line(axes, [cost(r) for r in rows], rows, label, COLOURS[names[i % len(names)]])
    _rings(axes, best, cost)
    rows = [r for of_one in lines.values() for r in of_one]
    _cost_axis(axes, [cost(r) for r in rows], axis, tick)
    _finish(axes, rows[0].guess_accuracy, columns, title)


def draw_coverage(axes: Axes, rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """The chance that any of k samples is right, against k, and the power law through it."""
    shades = _shades([row["budget"] for row in rows], "budget")
    for row in rows:
        k, colour = np.array(row["k"]), shades[row["budget"]]
        axes.plot(
            k, row["coverage"], "o", color=colour, label=f"budget {short_budget(row['budget'])}"
        )
        if row["fit"]:
            fine = np.geomspace(k[0], k[-1], 100)
            axes.plot(fine, row["fit"](fine), color=colour, linewidth=1.4)
    axes.plot([], [], color=COLOURS["muted"], linewidth=1.4, label="exp(a k^−b)")
    _samples_axis(axes, rows[0]["k"])
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    axes.set_ylabel("Coverage (pass@k)")
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=3)
    _legend(axes, 3, title)


def _samples_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(spread(sizes, 8), [str(k) for k in spread(sizes, 8)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Samples per problem")


def draw_exchange(axes: Axes, lines: Sequence[Line], title: str = "") -> None:
    """Lines of equal accuracy over the compute of training and that of a problem."""
    shown = spread(lines, 4)
    shades = _shades([line.accuracy for line in shown], "vote")
    for line in shown:
        training, inference = [p.training for p in line.points], [p.inference for p in line.points]
        label = f"at least {100 * line.accuracy:.0f} %"
        axes.plot(training, inference, "o-", color=shades[line.accuracy], label=label)
    points = [point for line in shown for point in line.points]
    _cost_axis(axes, [p.training for p in points], "FLOPs of training", human)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: human(y)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(UNITS["FLOPs"][0])
    axes.tick_params(length=3)
    _legend(axes, 4, title)


def draw_policy(
    axes: Axes, guess: float, overall: Sequence[Policy], split: Sequence[Policy], unit: str
) -> None:
    """Accuracy of the compute-optimal policy on problems that had no part in choosing it."""
    lines = [("one choice for all", COLOURS["vote-4"], overall)]
    lines += [("a choice by difficulty", COLOURS["budget-3"], split)] if split else []
    for label, colour, policies in lines:
        cost = [p.cost for p in policies]
        three = np.array([p.accuracy for p in policies])
        axes.fill_between(cost, three[:, 1], three[:, 2], color=colour, alpha=0.16, linewidth=0)
        axes.plot(cost, three[:, 0], "o-", color=colour, label=label)
    label, _, tick = UNITS[unit]
    _cost_axis(axes, [p.cost for _, _, policies in lines for p in policies], label, tick)
    _finish(axes, guess, 3)


def draw_outcomes(axes: Axes, shares: dict[int | None, tuple[float, ...]]) -> None:
    """Where the right answer stands among all stored samples of a problem, by budget."""
    names = {
        "right": "most common: a vote finds it",
        "outvoted": "among the samples, but outvoted",
        "never": "in no sample",
    }
    place = np.arange(len(shares))
    left = np.zeros(len(shares))
    for i, (colour, label) in enumerate(names.items()):
        width = np.array([share[i] for share in shares.values()])
        axes.barh(place, width, left=left, height=0.62, color=COLOURS[colour], label=label)
        left += width
    axes.set_yticks(place, [short_budget(b) for b in shares])
    axes.invert_yaxis()
    axes.set_ylabel("Thinking budget")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
    axes.set_xlabel("Share of the problems")
    axes.grid(axis="y", visible=False)
    axes.tick_params(length=3)
    _legend(axes, 1)


def draw_budgets(axes: Axes, curves: Curves) -> None:
    """Accuracy against the thinking budget."""
    place = {budget: i for i, budget in enumerate(curves.budgets)}
    for label, colour, rows in _lines(curves):
        _line(axes, [place[r.think_budget] for r in rows], rows, label, colour)
    ticks = spread(curves.budgets, 9)
    axes.set_xticks([place[b] for b in ticks], [short_budget(b) for b in ticks])
    axes.set_xlabel("Thinking budget (tokens)")
    _finish(axes, curves.guess, 3)


def draw_samples(axes: Axes, curves: Curves) -> None:
    """Accuracy against the number of samples: votes, and what a perfect verifier would reach."""
    for budget, colour in _shades(spread(curves.budgets, 4), "budget").items():
        votes = [r for k in curves.votes for r in curves.votes[k] if r.think_budget == budget]
        oracle = [r for k in curves.oracle for r in curves.oracle[k] if r.think_budget == budget]
        _line(axes, [r.samples for r in votes], votes, f"budget {short_budget(budget)}", colour)
        axes.plot(
            [r.samples for r in oracle],
            [r.accuracy for r in oracle],
            color=colour,
            linestyle=(0, (1, 1.5)),
            linewidth=1.4,
        )
    axes.plot([], [], color=COLOURS["muted"], linestyle=(0, (1, 1.5)), label="pass@k")
    _samples_axis(axes, sorted(set(curves.votes) | set(curves.oracle)))
    _finish(axes, curves.guess, 3)


# What is drawn where samples are all that grows: the lines' names and colours.
BY_SAMPLES = {
    "self-consistency": ("vote", "vote-4"),
    "adaptive-consistency": ("vote, stopped early", "vote-2"),
    "best-of-n": ("best-of-n", "budget-3"),
    "verifier-best-of-n": ("verifier’s best-of-n", "outvoted"),
}


def _lines(curves: Curves) -> list[tuple[str, str, list[Result]]]:
    """(label, colour, rows) of greedy decoding, and of each vote that is shown by budget; or of
    each way to choose by samples, where there is one budget alone."""
    lines = [("greedy", COLOURS["greedy"], curves.greedy)] if curves.greedy else []
    if curves.by_samples:
        for strategy, (label, colour) in BY_SAMPLES.items():
            rows = [r for r in curves.rows if r.strategy == strategy and not r.setting]
            if rows:
                lines.append((label, COLOURS[colour], [*curves.votes.get(1, []), *rows]))
        return lines
    votes = curves.shown_votes.items()
    return lines + [(vote_text(k), colour, curves.votes[k]) for k, colour in votes]


def _line(axes: Axes, x: Sequence[float], rows: list[Result], label: str, colour: str) -> None:
    low, high = [r.ci_low for r in rows], [r.ci_high for r in rows]
    if len(rows) == 1:  # a band of no width would not show
        axes.vlines(x, low, high, color=colour, linewidth=1.2)
    axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(x, [r.accuracy for r in rows], "o-", color=colour, label=label)


def _finish(axes: Axes, guess: float, columns: int, title: str = "") -> None:
    line = axes.axhline(guess, color=COLOURS["muted"], linestyle=(0, (5, 4)), linewidth=1.2)
    line.set_label("best guess")
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    axes.set_ylabel("Accuracy")
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=3)
    _legend(axes, columns, title)


def _legend(axes: Axes, columns: int, title: str = "") -> None:
    """Above the axes, in as many columns as are asked for and needed."""
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.figure.legend(
        handles,
        labels,
        title=title or None,
        title_fontproperties=dict(size=12, weight="bold"),
        alignment="left",
        loc="outside upper left",
        borderaxespad=0,
        ncols=math.ceil(len(handles) / math.ceil(len(handles) / columns)),
        handlelength=1.8,
        columnspacing=1.4,
        handletextpad=0.5,
    )
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)  # a name may hold dollar signs


def svg(draw, name: str, *of, width: float, height: float, **options) -> Markup:
    """A figure as inline SVG in the page's own fonts and colours; size in inches."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot(), *of, **options)
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

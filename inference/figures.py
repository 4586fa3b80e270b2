"""The figures of a report."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from .curves import UNITS, Curves
from .drawing import (
    COLOURS,
    cost_axis,
    finish,
    legend,
    line,
    note,
    picture,
    samples_axis,
    shades,
    shares,
    staircase,
)
from .evaluation import Result, frontier
from .exchange import Line
from .findings import Policies
from .page import WORDS, human, problems_text, short_budget, spread, visible, vote_text, way_text

CLOSE = 0.05, 0.05  # of the axes' width and height: the labels of such points would overlap
VERIFIED = ", verifier"  # behind the name of a search that a trained verifier judged


def png(results: Sequence[Result]) -> bytes:
    """The picture of accuracy against compute, as a PNG."""
    first = results[0]
    curves = Curves.of(results)
    return picture(
        draw_compute,
        curves,
        columns=7,
        title=visible(f"{first.task}: accuracy against compute spent at inference"),
        note=f"Along a line {curves.along}. Bands: 95 % intervals over {problems_text(results)}.",
    )


def draw_compute(
    axes: Axes, curves: Curves, unit: str | None = None, columns: int = 3, title: str = ""
) -> None:
    """Accuracy against the compute of a problem: a line for each way to spend it."""
    axis, cost, tick = UNITS[unit or curves.units[0]]
    lines = _lines(curves)
    for label, colour, rows in lines:
        line(axes, [cost(r) for r in rows], rows, label, colour)
    best = frontier(curves.rows, cost)
    drawn = [r for _, _, rows in lines for r in rows]
    others: dict[str, list[Result]] = {}
    for r in best:
        if r not in drawn:
            name = WORDS.get(r.strategy, r.strategy)
            others.setdefault(name + ", extended" * r.setting.startswith("extend="), []).append(r)
    for (name, rows), marker in zip(others.items(), itertools.cycle("DsvP^X*"), strict=False):
        place = [cost(r) for r in rows], [r.accuracy for r in rows]
        axes.plot(*place, marker, color=COLOURS["ink"], label=name)
        drawn += rows
    costs = [cost(r) for r in drawn]
    staircase(axes, best, costs, cost)
    cost_axis(axes.xaxis, costs, axis, tick)
    finish(axes, curves.guess, min(columns, 4) if curves.by_samples else columns, title)
    if curves.by_samples:
        for r in spread([r for rows in curves.votes.values() for r in rows], 9):
            note(axes, f"{r.samples:,}", (cost(r), r.accuracy), (6, -8), "left")
    else:
        _name_budgets(axes, curves.greedy or curves.votes.get(1, []), cost)


def _name_budgets(axes: Axes, rows: Sequence[Result], cost: Callable[[Result], float]) -> None:
    """The rows' budgets beside their points, those together whose labels would overlap."""
    rows, to_axes = spread(rows, 9), axes.transData - axes.transAxes
    places = to_axes.transform([(cost(r), r.accuracy) for r in rows])
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        if groups and (abs(place - places[groups[-1][0]]) < CLOSE).all():
            groups[-1].append(i)
        else:
            groups.append([i])
    before = None
    for first, last in ((group[0], group[-1]) for group in groups):
        label = "–".join(dict.fromkeys(short_budget(rows[i].think_budget) for i in (first, last)))
        # Clear of the line, which arrives from below.
        level = before is not None and abs(places[last] - places[before])[1] < CLOSE[1]
        left, right = sorted((first, last), key=lambda i: places[i][0])
        i, off, side = (right, 8, "left") if level else (left, -8, "right")
        note(axes, label, (cost(rows[i]), rows[i].accuracy), (off, 0), side)
        before = last


def draw_models(
    axes: Axes,
    models: dict[str, list[Result]],
    best: Sequence[Result],
    unit: str,
    columns: int = 3,
    title: str = "",
) -> None:
    """Accuracy against the compute of a problem: the Pareto frontier of each model."""
    lines = {visible(model): rows for model, rows in models.items()}
    _compare(axes, lines, best, unit, columns, title)


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
        elif r.strategy == "greedy":
            lines.setdefault("greedy", []).append(r)
        elif r.strategy == "sampling":  # where both lines begin
            for label in plain.values():
                if label in lines:
                    lines[label].append(r)
        elif r.strategy in plain:
            lines[plain[r.strategy]].append(r)
        elif r.setting and not r.strategy.endswith("-vote"):
            trained = "judge=" in r.setting and not r.setting.endswith("judge=confidence")
            label = r.strategy + VERIFIED * trained
            lines.setdefault(label, []).append(r)
    lines = {label: rows for label, rows in lines.items() if rows}
    drawn = [r for rows in lines.values() for r in rows]
    _compare(axes, lines, frontier(drawn, UNITS[unit][1]), unit, columns, title)


def _compare(
    axes: Axes,
    lines: dict[str, list[Result]],
    best: Sequence[Result],
    unit: str,
    columns: int,
    title: str,
) -> None:
    """A line of accuracy against cost for each label, and the frontier of the best rows. "NAME,
    verifier" has NAME's colour; NAME is then dashed. Where colours come again, markers differ."""
    axis, cost, tick = UNITS[unit]
    names = "vote-4 greedy budget-3 outvoted vote-2 budget-1 muted another vote-1 ink".split()
    kinds = list(dict.fromkeys(label.removesuffix(VERIFIED) for label in lines))
    for label, rows in lines.items():
        rows = sorted(rows, key=cost)
        again, place = divmod(kinds.index(label.removesuffix(VERIFIED)), len(names))
        style = "osD^"[again % 4] + ("--" if label + VERIFIED in lines else "-")
        colour = COLOURS[names[place]]
        line(axes, [cost(r) for r in rows], rows, label, colour, style)
    rows = [r for of_one in lines.values() for r in of_one]
    costs = [cost(r) for r in rows]
    staircase(axes, best, costs, cost)
    cost_axis(axes.xaxis, costs, axis, tick)
    finish(axes, rows[0].guess_accuracy, columns, title)


def draw_coverage(axes: Axes, rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """The chance that any of k samples is right, against k, the power law through it, and what k
    guesses cover."""
    colours = shades([row["budget"] for row in rows], "budget")
    for row in rows:
        k, colour = np.array(row["k"]), colours[row["budget"]]
        axes.plot(
            k, row["coverage"], "o", color=colour, label=f"budget {short_budget(row['budget'])}"
        )
        if row["fit"]:
            fine = np.geomspace(k[0], k[-1], 100)
            axes.plot(fine, row["fit"](fine), color=colour, linewidth=1.4)
    axes.plot([], [], color=COLOURS["muted"], linewidth=1.4, label="exp(a k^−b)")
    axes.plot(
        rows[0]["k"],
        rows[0]["guesses"],
        color=COLOURS["muted"],
        linestyle=(0, (5, 4)),
        linewidth=1.2,
        label="k guesses",
    )
    samples_axis(axes, rows[0]["k"])
    axes.set_ylim(0, 1.03)
    shares(axes, "Coverage (pass@k)", 3, title)


def draw_exchange(axes: Axes, lines: Sequence[Line], columns: int = 2, title: str = "") -> None:
    """Lines of equal accuracy over the compute of training and that of a problem."""
    shown = spread([of_one for of_one in lines if len(of_one.points) > 1], 4)
    colours = shades([of_one.accuracy for of_one in shown], "vote")
    for of_one in shown:
        training, inference, _ = zip(*of_one.points, strict=True)
        label = f"at least {100 * of_one.accuracy:.0f} %"
        axes.plot(training, inference, "o-", color=colours[of_one.accuracy], label=label)
    points = {point[:2]: point for of_one in shown for point in of_one.points}.values()
    cost_axis(axes.xaxis, [p.training for p in points], "FLOPs of training", human)
    cost_axis(axes.yaxis, [p.inference for p in points], UNITS["FLOPs"][0], human)
    first = {of_one.points[0][:2] for of_one in shown}
    for p in points:  # clear of the line, which falls
        off, side = ((6, 7), "left") if p[:2] in first else ((-6, -8), "right")
        note(axes, way_text(p.setting), p[:2], off, side)
    models: dict[float, str] = {}
    for p in points:
        models[p.training] = visible(p.setting.model)
    names = axes.secondary_xaxis("top")
    names.set_xticks(list(models), list(models.values()), rotation=15, ha="left")
    names.xaxis.set_minor_locator(NullLocator())
    names.spines["top"].set_visible(False)
    axes.margins(0.1, 0.1)
    axes.tick_params(length=3)
    legend(axes, columns, title)


def draw_policy(axes: Axes, found: Policies) -> None:
    """Accuracy of the compute-optimal policy on problems that had no part in choosing it."""
    lines = [("one choice for all", COLOURS["vote-4"], found.overall)]
    lines += [("a choice by difficulty", COLOURS["budget-3"], found.split)] if found.split else []
    for label, colour, policies in lines:
        cost = [p.cost for p in policies]
        three = np.array([p.accuracy for p in policies])
        axes.fill_between(cost, three[:, 1], three[:, 2], color=colour, alpha=0.16, linewidth=0)
        axes.plot(cost, three[:, 0], "o-", color=colour, label=label)
    label, _, tick = UNITS[found.unit]
    cost_axis(axes.xaxis, [p.cost for _, _, policies in lines for p in policies], label, tick)
    finish(axes, found.guess, 3)


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
    if len(shares) > 1:
        axes.set_yticks(place, [short_budget(b) for b in shares])
        axes.set_ylabel("Thinking budget")
    else:
        axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
    axes.set_xlabel("Share of the problems")
    axes.grid(axis="y", visible=False)
    axes.tick_params(length=3)
    legend(axes, 1)


def draw_budgets(axes: Axes, curves: Curves) -> None:
    """Accuracy against the thinking budget."""
    place = {budget: i for i, budget in enumerate(curves.budgets)}
    for label, colour, rows in _lines(curves):
        line(axes, [place[r.think_budget] for r in rows], rows, label, colour)
    ticks = spread(curves.budgets, 9)
    axes.set_xticks([place[b] for b in ticks], [short_budget(b) for b in ticks])
    axes.set_xlabel("Thinking budget (tokens)")
    finish(axes, curves.guess, 3)


def draw_samples(axes: Axes, curves: Curves) -> None:
    """Accuracy against the number of samples: votes, and what a perfect verifier would reach."""
    for budget, colour in shades(spread(curves.budgets, 4), "budget").items():
        votes = [r for k in curves.votes for r in curves.votes[k] if r.think_budget == budget]
        oracle = [r for k in curves.oracle for r in curves.oracle[k] if r.think_budget == budget]
        line(axes, [r.samples for r in votes], votes, f"budget {short_budget(budget)}", colour)
        axes.plot(
            [r.samples for r in oracle],
            [r.accuracy for r in oracle],
            color=colour,
            linestyle=(0, (1, 1.5)),
            linewidth=1.4,
        )
    axes.plot([], [], color=COLOURS["muted"], linestyle=(0, (1, 1.5)), label="pass@k")
    samples_axis(axes, sorted(set(curves.votes) | set(curves.oracle)))
    finish(axes, curves.guess, 3)


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

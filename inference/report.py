"""A sweep's results as results.csv, accuracy_vs_compute.png and one HTML page, index.html.

The page holds all that it shows: no script, no network. Texts that a model or a data set wrote are
escaped, and characters that would not show or would reorder their neighbours are spelled out.
"""

import csv
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .estimators import leaders
from .evaluation import Result, paired_difference
from .store import Record, Store

COLUMNS = (
    *("task", "model", "strategy", "samples", "think_budget", "temperature", "problems"),
    *("accuracy", "ci_low", "ci_high", "prompt_tokens", "sampled_tokens", "forced_tokens"),
    *("flops_per_problem", "seconds_per_problem", "guess_accuracy", "pareto"),
)

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
SHOWN = 4000  # characters of a sample's text that the page prints


def write_report(
    folder: str | Path,
    results: Sequence[Result],
    store: Store,
    *,
    run: Mapping[str, Any] | str | Path | None = None,
    examples: int = 3,
) -> Path:
    """Writes results.csv, accuracy_vs_compute.png and index.html; returns the page's path.

    results: rows of one task and model, as `strategies.evaluate(store)` gives them; store: where
    the worked examples and difficulties are read; run: run.json, or what it holds, printed under
    "How this was made"; examples: how many problems to show. Each file is written aside and
    renamed. Raises ValueError where there are no results.
    """
    if not results:
        raise ValueError(f"{store.path} holds no results to report: run the sweep first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(run, Mapping) or run is None:
        facts = run or {}
    else:
        facts = json.loads(Path(run).read_text(encoding="utf-8"))
    page = html(results, store, run=facts, examples=examples)
    for name, content in (
        ("results.csv", csv_text(results).encode("utf-8", "replace")),
        ("accuracy_vs_compute.png", png(results)),
        ("index.html", page.encode()),
    ):
        aside = folder / f".{name}.new"
        aside.write_bytes(content)
        os.replace(aside, folder / name)
    return folder / "index.html"


def csv_text(results: Iterable[Result]) -> str:
    """The rows as CSV: an unlimited think_budget is "inf", unknown FLOPs are an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        writer.writerow([_csv_field(name, getattr(result, name)) for name in COLUMNS])
    return text.getvalue()


def _csv_field(name: str, value: Any) -> Any:
    if name == "think_budget" and value is None:
        return "inf"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


@dataclass(frozen=True)
class Curves:
    """The results sorted for drawing: one sampling setting, the budgets, the sizes of the vote."""

    greedy: list[Result]  # one for each budget
    votes: dict[int, list[Result]]  # by number of samples; 1 is a single sample
    oracle: dict[int, list[Result]]  # pass@k
    budgets: list[int | None]
    guess: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Curves":
        hot = [r.params for r in results if r.temperature > 0]
        params = max(dict.fromkeys(hot), key=hot.count) if hot else ""

        def rows(strategy: str) -> list[Result]:
            chosen = [
                r
                for r in results
                if r.strategy == strategy and (r.temperature == 0 or r.params == params)
            ]
            return sorted(chosen, key=lambda r: (r.samples, budget_order(r.think_budget)))

        votes: dict[int, list[Result]] = {}
        for r in rows("sampling") + rows("self-consistency"):
            votes.setdefault(r.samples, []).append(r)
        oracle: dict[int, list[Result]] = {}
        for r in rows("sampling") + rows("pass@k"):
            oracle.setdefault(r.samples, []).append(r)
        return cls(
            greedy=rows("greedy"),
            votes=votes,
            oracle=oracle,
            budgets=sorted({r.think_budget for r in results}, key=budget_order),
            guess=results[0].guess_accuracy,
        )

    @property
    def shown_votes(self) -> dict[int, str]:
        """At most four sizes of the vote, the ends among them, each with its colour."""
        return _shades(_spread(list(self.votes), 4), "vote")

    def best_gain(self) -> tuple[Result, Result] | None:
        """The largest vote and the single sample at the budget where the vote gains most."""
        if len(self.votes) < 2 or 1 not in self.votes:
            return None
        single = {r.think_budget: r for r in self.votes[1]}
        pairs = [(r, single[r.think_budget]) for r in self.votes[max(self.votes)]]
        return max(pairs, key=lambda pair: pair[0].accuracy - pair[1].accuracy)


def budget_order(budget: int | None) -> float:
    return math.inf if budget is None else budget


def budget_phrase(budget: int | None) -> str:
    return "unlimited thinking" if budget is None else f"thinking budget {budget:,}"


def budget_text(budget: int | None) -> str:
    return "no limit" if budget is None else f"{budget:,}"


def short_budget(budget: int | None) -> str:
    return "∞" if budget is None else f"{budget:,}"


def vote_text(samples: int) -> str:
    return "1 sample" if samples == 1 else f"vote of {samples}"


def _spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _shades(items: Sequence, name: str) -> dict[Any, str]:
    """A shade for each of at most four items, the last the darkest."""
    return {item: COLOURS[f"{name}-{4 - len(items) + i + 1}"] for i, item in enumerate(items)}


def png(results: Sequence[Result]) -> bytes:
    """The picture of accuracy against compute, as a PNG."""
    first = results[0]
    title = visible(f"{first.task}: accuracy against compute spent at inference")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5.2), layout="constrained")
        draw_compute(figure.add_subplot(), Curves.of(results), columns=6, title=title)
        figure.supxlabel(
            "Along a line the thinking budget grows; the small figures are its tokens. "
            f"Bands: 95 % intervals over {first.problems:,} problems.",
            x=0.01,
            ha="left",
            fontsize=8.5,
            color=COLOURS["muted"],
        )
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=180)
    return content.getvalue()


def draw_compute(axes: Axes, curves: Curves, columns: int = 3, title: str = "") -> None:
    """Accuracy against FLOPs (or tokens) of a problem: a line for each way to spend them."""
    lines = _lines(curves)
    for label, colour, rows in lines:
        _line(axes, [r.cost for r in rows], rows, label, colour)
    before = None
    for r in _spread(curves.greedy or curves.votes.get(1, []), 9):
        # Clear of the line, which arrives from below, and of the ring around a point.
        level = before is not None and abs(r.accuracy - before.accuracy) < 0.05
        axes.annotate(
            short_budget(r.think_budget),
            (r.cost, r.accuracy),
            xytext=(8, 0) if level else (-8, 0),
            textcoords="offset points",
            ha="left" if level else "right",
            va="center",
            color=COLOURS["muted"],
            fontsize=8.5,
        )
        before = r
    best = [r for _, _, rows in lines for r in rows if r.pareto]
    axes.plot(
        [r.cost for r in best],
        [r.accuracy for r in best],
        "o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=COLOURS["ink"],
        markeredgewidth=1.1,
        label="Pareto frontier",
    )
    axes.set_xscale("log")
    costs = [r.cost for _, _, rows in lines for r in rows] or [1]
    wide = max(costs) > 300 * min(costs)
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    known = all(math.isfinite(r.flops_per_problem) for _, _, rows in lines for r in rows)
    axes.set_xlabel(f"{'FLOPs' if known else 'Tokens'} per problem")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: human(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _finish(axes, curves, columns, title)


def draw_budgets(axes: Axes, curves: Curves) -> None:
    """Accuracy against the thinking budget."""
    place = {budget: i for i, budget in enumerate(curves.budgets)}
    for label, colour, rows in _lines(curves):
        _line(axes, [place[r.think_budget] for r in rows], rows, label, colour)
    ticks = _spread(curves.budgets, 9)
    axes.set_xticks([place[b] for b in ticks], [short_budget(b) for b in ticks])
    axes.set_xlabel("Thinking budget (tokens)")
    _finish(axes, curves, 3)


def draw_samples(axes: Axes, curves: Curves) -> None:
    """Accuracy against the number of samples: votes, and what a perfect verifier would reach."""
    for budget, colour in _shades(_spread(curves.budgets, 4), "budget").items():
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
    axes.set_xscale("log", base=2)
    ticks = sorted(set(curves.votes) | set(curves.oracle))
    axes.set_xticks(_spread(ticks, 8), [str(k) for k in _spread(ticks, 8)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Samples per problem")
    _finish(axes, curves, 3)


def _lines(curves: Curves) -> list[tuple[str, str, list[Result]]]:
    """(label, colour, rows by budget) of greedy decoding and of each vote that is shown."""
    lines = [("greedy", COLOURS["greedy"], curves.greedy)] if curves.greedy else []
    votes = curves.shown_votes.items()
    return lines + [(vote_text(k), colour, curves.votes[k]) for k, colour in votes]


def _line(axes: Axes, x: Sequence[float], rows: list[Result], label: str, colour: str) -> None:
    low, high = [r.ci_low for r in rows], [r.ci_high for r in rows]
    if len(rows) == 1:  # a band of no width would not show
        axes.vlines(x, low, high, color=colour, linewidth=1.2)
    axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(x, [r.accuracy for r in rows], "o-", color=colour, label=label)


def _finish(axes: Axes, curves: Curves, columns: int, title: str = "") -> None:
    guess = axes.axhline(curves.guess, color=COLOURS["muted"], linestyle=(0, (5, 4)), linewidth=1.2)
    guess.set_label("best guess")
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    axes.set_ylabel("Accuracy")
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=3)
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
    legend.get_title().set_parse_math(False)  # a name may hold dollar signs


def svg(draw, curves: Curves, name: str, *, width: float, height: float, **options) -> Markup:
    """A figure as inline SVG in the page's own fonts and colours; size in inches."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot(), curves, **options)
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


def html(
    results: Sequence[Result], store: Store, *, run: Mapping[str, Any], examples: int = 3
) -> str:
    """The page as text. Everything that is not markup of this file is escaped."""
    curves = Curves.of(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    environment.filters |= {
        "percent": percent,
        "human": human,
        "budget": budget_text,
        "short_budget": short_budget,
        "budget_phrase": budget_phrase,
        "vote": vote_text,
    }
    several_budgets = len(curves.budgets) > 1
    several_samples = len(curves.votes) > 1
    return environment.get_template("report.html").render(
        first=results[0],
        results=results,
        curves=curves,
        headlines=headlines(curves),
        compute_wide=svg(draw_compute, curves, "wide", width=8.6, height=4.3, columns=6),
        compute_narrow=svg(draw_compute, curves, "narrow", width=4.8, height=4.2),
        by_budget=several_budgets and svg(draw_budgets, curves, "budgets", width=4.8, height=3.7),
        by_samples=several_samples and svg(draw_samples, curves, "samples", width=4.8, height=3.7),
        difficulty=difficulty_tables(curves, store),
        examples=worked_examples(curves, store, examples),
        made=made(run),
        columns=COLUMNS,
        field=_csv_field,
    )


def headlines(curves: Curves) -> list[dict[str, str]]:
    """The numbers that open the page: value, its interval, and what it is."""
    cards = []

    def card(result: Result, what: str) -> None:
        interval = f"{100 * result.ci_low:.1f} to {percent(result.ci_high)}"
        cards.append(dict(value=percent(result.accuracy), interval=interval, what=what))

    if curves.greedy:
        low, high = curves.greedy[0], curves.greedy[-1]
        if low is not high:
            card(low, f"greedy, {budget_phrase(low.think_budget)}")
        card(high, f"greedy, {budget_phrase(high.think_budget)}")
    gain = curves.best_gain()
    if gain:
        vote, single = gain
        at = f"{budget_phrase(vote.think_budget)}, temperature {vote.temperature:g}"
        card(single, f"one sample, {at}")
        card(vote, f"the {vote_text(vote.samples)} such samples")
        better = paired_difference(vote, single)
        cards[-1]["gain"] = (
            f"{100 * better.mean:+.1f} points ({100 * better.low:+.1f} to {100 * better.high:+.1f})"
        )
    return cards


def difficulty_tables(curves: Curves, store: Store, groups: int = 8) -> list[dict[str, Any]]:
    """Accuracy by difficulty and budget, for greedy decoding and for the largest vote."""
    difficulty = {i: p.difficulty for i, p in store.problems().items()}
    most = max(curves.votes, default=1)
    tables = []
    for name, rows in (("Greedy", curves.greedy), (vote_text(most), curves.votes.get(most, []))):
        if not rows:
            continue
        rows = _spread(rows, 9)
        levels = [np.array([difficulty[i] for i in r.ids]) for r in rows]
        known = np.unique(levels[0])
        lines = []
        for group in np.array_split(known, min(groups, len(known))):
            inside = [np.isin(level, group) for level in levels]
            cells = [
                r.scores[m].mean() if m.any() else None for r, m in zip(rows, inside, strict=True)
            ]
            span = f"{group[0]}" if len(group) == 1 else f"{group[0]}–{group[-1]}"
            lines.append(dict(level=span, problems=int(inside[0].sum()), cells=cells))
        budgets = [r.think_budget for r in rows]
        tables.append(dict(name=name.capitalize(), budgets=budgets, lines=lines))
    return tables


def worked_examples(curves: Curves, store: Store, count: int) -> list[dict[str, Any]]:
    """Problems whose first sample is wrong and whose vote is right, over all difficulties."""
    gain = curves.best_gain()
    if gain is None:
        return []
    budget, params, seed = gain[0].think_budget, gain[0].params, gain[0].seed
    pool = store.pool(budget=budget, params=params, seed=seed, samples=gain[0].samples)
    chosen = (pool.answers == leaders(pool.answers)[0][:, -1:]) & (pool.answers >= 0)
    corrected = np.flatnonzero((chosen & pool.correct).any(1) & ~pool.correct[:, 0])
    corrected = corrected[np.argsort(pool.difficulty[corrected], kind="stable")]
    share = chosen.mean(1)
    problems = store.problems()
    examples = []
    for group in np.array_split(corrected, min(count, len(corrected)) or 1):
        if not len(group):
            continue
        p = group[np.abs(share[group] - 0.6).argmin()]  # contested, but won clearly
        index = int(pool.problems[p])
        records = store.records(index, budget=budget, params=params, seed=seed)[: pool.samples]
        tally: dict[str | None, dict[str, Any]] = {}
        for r in records:
            entry = tally.setdefault(r.answer, dict(answer=r.answer, votes=0, right=r.correct))
            entry["votes"] += 1
        examples.append(
            dict(
                problem=problems[index],
                index=index,
                budget=budget,
                temperature=gain[0].temperature,
                votes=sorted(tally.values(), key=lambda v: (v["answer"] is None, -v["votes"])),
                samples=[
                    dict(text=r.text[:SHOWN], cut=max(0, len(r.text) - SHOWN), record=r)
                    for r in telling_first(records)
                ],
            )
        )
    return examples


def telling_first(records: Sequence[Record]) -> list[Record]:
    """The first sample, the first right one, one of every other answer, then the rest."""
    picked = [records[0], next(r for r in records if r.correct)]
    for r in records:
        if r.answer not in {p.answer for p in picked}:
            picked.append(r)
    return picked + [r for r in records if r not in picked]


def made(run: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """run.json as groups of (name, text): one for each command that wrote into it."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {text(inner)}" for name, inner in value.items())
        if isinstance(value, list | tuple):
            return " ".join(map(text, value))
        return "none" if value is None else str(value)

    groups = run if all(isinstance(value, Mapping) for value in run.values()) else {"": run}
    return [
        (command, [(name, text(value)) for name, value in facts.items()])
        for command, facts in groups.items()
    ]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def human(x: float) -> str:
    """A number of at most four characters and a unit: 1234567 → "1.23 M"."""
    if math.isnan(x):
        return "unknown"
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.3g}"


def visible(text: str) -> str:
    """The text with what would not show, or would reorder its neighbours, spelled out."""
    return "".join(
        f"⟨U+{ord(c):04X}⟩"
        if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
        else c
        for c in text
    )

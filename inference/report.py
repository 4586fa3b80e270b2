"""A sweep's results as results.csv, accuracy_vs_compute.png and one HTML page, index.html.

The page holds all that it shows: no script, no network. Texts that a model or a data set wrote are
escaped, and characters that would not show or would reorder their neighbours are spelled out.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .browser import problem_groups
from .curves import Curves
from .drawing import picture, standalone, svg, wide_and_narrow
from .evaluation import Result, paired_difference, unit_of
from .figures import (
    draw_budgets,
    draw_compute,
    draw_coverage,
    draw_outcomes,
    draw_policy,
    draw_samples,
    draw_searches,
    png,
)
from .findings import Findings
from .page import (
    budget_phrase,
    environment,
    percent,
    points,
    problems_text,
    visible,
    vote_text,
    write_files,
)
from .store import Store

COLUMNS = (
    *("task", "model", "strategy", "samples", "think_budget", "temperature", "problems"),
    *("accuracy", "ci_low", "ci_high", "prompt_tokens", "sampled_tokens", "forced_tokens"),
    *("flops_per_problem", "seconds_per_problem", "guess_accuracy", "pareto"),
    *("pruned_tokens", "judge_flops_per_problem", "setting"),
)


def write_report(
    folder: str | Path,
    results: Sequence[Result],
    store: Store,
    *,
    run: Mapping[str, Any] | None = None,
    examples: int = 5,
) -> Path:
    """Writes results.csv, findings.json (what the page says beyond those rows),
    accuracy_vs_compute.png (and, where there is anything to draw, coverage.png and searches.png),
    every figure as SVG, and index.html; returns the page's path.

    results: rows of one task and model, as `evaluation.evaluate(store)` gives them; store: where
    problems, samples and difficulties are read; run: what run.json holds of the sweep, printed
    under "How this was made", and asked how many samples there should be; examples: how many
    problems of each kind to show. Each file is written aside and renamed. Raises ValueError where
    there are no results.
    """
    if not results:
        raise ValueError(f"{store.path} holds no results to report: run the sweep first")
    found = Findings.of(results, store)
    task = visible(results[0].task)
    note = f"95 % intervals over {problems_text(results)}."
    pictures = {}
    if any(row["fit"] for row in found.coverage):
        pictures["coverage.png"] = picture(
            draw_coverage,
            found.coverage,
            title=f"{task}: the chance that any of k samples is right",
            note="Points: pass@k, without bias. Lines: a power law of its logarithm.",
        )
    if found.searches:
        pictures["searches.png"] = picture(
            draw_searches,
            found.curves,
            unit_of(results),
            columns=4,
            title=f"{task}: searches beside independent samples",
            note=f"Along a line there are more samples, lines or attempts. Bands: {note}",
        )
    figures = drawn(found, unit_of(results))
    files = {
        "results.csv": csv_text(results).encode("utf-8", "replace"),
        "findings.json": found.json().encode(),
        "accuracy_vs_compute.png": png(results),
        **pictures,
        **vectors(figures),
    }
    page = html(results, store, found, figures, files, run=run or {}, examples=examples)
    return write_files(folder, files | {"index.html": page.encode()}) / "index.html"


def drawn(found: Findings, unit: str) -> dict[str, Any]:
    """The page's figures, each inline SVG or a pair of it for wide and narrow screens, by the names
    of their files; compute is one for each unit."""
    curves, shares, figures = found.curves, found.outcomes, {}
    figures["accuracy_vs_compute"] = {
        unit: wide_and_narrow(draw_compute, unit, curves, unit, columns=7) for unit in curves.units
    }
    if len(curves.budgets) > 1:
        figures["budgets"] = svg(draw_budgets, "budgets", curves)
    if len(curves.votes) > 1:
        figures["samples"] = svg(draw_samples, "samples", curves)
    if found.searches:
        figures["searches"] = wide_and_narrow(draw_searches, "searches", curves, unit, columns=5)
    if any(row["fit"] for row in found.coverage):
        figures["coverage"] = svg(draw_coverage, "coverage", found.coverage)
    if shares:
        height = 1.6 + 0.34 * len(shares)
        figures["outcomes"] = svg(draw_outcomes, "outcomes", shares, height=height)
    if found.policy:
        figures["policy"] = svg(draw_policy, "policy", found.policy)
    return figures


def vectors(figures: Mapping[str, Any]) -> dict[str, bytes]:
    """The figures of a page as files of their own: of several the first, of a pair the wide one."""
    files = {}
    for name, figure in figures.items():
        if isinstance(figure, Mapping):
            figure = next(iter(figure.values()))
        files[f"{name}.svg"] = standalone(figure[0] if isinstance(figure, tuple) else figure)
    return files


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


def html(
    results: Sequence[Result],
    store: Store,
    found: Findings,
    figures: Mapping[str, Any],
    beside: Iterable[str],
    *,
    run: Mapping[str, Any],
    examples: int,
) -> str:
    """The page as text; beside: the names of the files that it names. Everything that is not markup
    of this file is escaped."""
    curves = found.curves
    return (
        environment()
        .get_template("report.html")
        .render(
            **vars(found),
            first=results[0],
            split=store.identity.get("split", "test"),
            results=results,
            headlines=headlines(curves),
            figures=figures,
            unit=unit_of(results),
            groups=problem_groups(curves, store, examples) if found.outcomes else [],
            made=made(run),
            lacking=unfinished(run, store),
            columns=COLUMNS,
            field=_csv_field,
            beside=beside,
        )
    )


def headlines(curves: Curves) -> list[dict[str, Any]]:
    """The numbers that open the page: value, its interval, and what it is."""
    cards: list[dict[str, Any]] = []

    def card(result: Result, what: str) -> None:
        interval = f"{100 * result.ci_low:.1f} to {percent(result.ci_high)}"
        cards.append(dict(value=percent(result.accuracy), interval=interval, what=what))

    if curves.greedy:
        low, high = curves.greedy[0], curves.greedy[-1]
        if low is not high:
            card(low, f"greedy, {budget_phrase(low.think_budget)}")
        card(high, f"greedy, {budget_phrase(high.think_budget)}")
    gain = curves.gain()
    if gain:
        vote, single = gain
        at = f"{budget_phrase(vote.think_budget)}, temperature {vote.temperature:g}"
        card(single, f"one sample, {at}")
        card(vote, f"the {vote_text(vote.samples)} such samples")
        cards[-1]["gains"] = gains = []
        for other, name in ((single, "one sample"), *((r, "greedy") for r in curves.greedy[-1:])):
            better = paired_difference(vote, other)
            if better is not None and other.think_budget == vote.think_budget:
                span = f"{points(better.low)} to {points(better.high)}"
                text = f"{points(better.mean)} points over {name} ({span})"
                kind = " up" if better.low > 0 else " down" if better.high < 0 else ""
                gains.append(dict(text=text, kind=kind))
    return cards


def made(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A command's part of run.json as names and texts."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {text(inner)}" for name, inner in value.items())
        if isinstance(value, list | tuple):
            return " ".join(map(text, value))
        return "none" if value is None else str(value)

    return [(name, text(value)) for name, value in run.items()]


def unfinished(run: Mapping[str, Any], store: Store) -> str:
    """How many samples of a sweep are there, and what that means; "" where all are. run: what
    run.json holds of it."""
    asked = run.get("configuration", {})
    if not asked.get("problems") or not asked.get("samples"):
        return ""
    problems, samples = asked["problems"], max(asked["samples"])
    settings = {None, *(asked.get("budgets") or ())}, {*(asked.get("extend") or ())}
    whole = problems * sum(map(len, settings)) * (1 + samples)  # greedy, and drawn
    query = "SELECT count(*) FROM sample WHERE problem < ? AND sample < ?"
    [(held,)] = store.rows(query, problems, samples)
    if held >= whole:
        return ""
    return (
        f"unfinished: {held:,} of {whole:,} samples; what finishes first is short, so costs and "
        "accuracies are those of short samples"
    )


def summary(results: Sequence[Result], lacking: str = "") -> str:
    """How accurate unlimited thinking was: a greedy answer, one sample and the largest vote, with
    their 95 % intervals, and the best fixed guess; lines of text, of which the first is a title.
    lacking: what `unfinished` says, to end with."""
    found = {
        (r.strategy, r.samples): r for r in results if r.think_budget is None and not r.setting
    }
    largest = max((k for name, k in found if name == "self-consistency"), default=0)
    named = {
        "greedy": found.get(("greedy", 1)),
        "one sample": found.get(("sampling", 1)),
        vote_text(largest): found.get(("self-consistency", largest)),
    }
    rows = {name: r for name, r in named.items() if r is not None}
    first = next(iter(rows.values()), results[0])
    lines = [f"{first.task}, {first.problems:,} problems, unlimited thinking, 95 % intervals:"]
    for name, r in rows.items():
        interval = f"{100 * r.ci_low:5.1f} to {100 * r.ci_high:.1f} %"
        part = "" if r.problems == first.problems else f"   {r.problems:,} problems"
        lines.append(f"  {name:12}{percent(r.accuracy):>8}   {interval}{part}")
    lines.append(f"  {'fixed guess':12}{percent(first.guess_accuracy):>8}")
    return "\n".join([*lines, f"  {lacking}"] if lacking else lines)

"""Several models on the same problems: which model, strategy and budget is worth its compute.

The page shows each model's own Pareto frontier, the frontier of all together, and the
compute-optimal policy that may choose among them; where it is known what their training took, the
exchange rate between that and thinking longer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .curves import UNITS
from .drawing import picture, svg, wide_and_narrow
from .evaluation import Result, frontier, mark_pareto, unit_of
from .exchange import Duel, Line, duels, equal_accuracy
from .figures import draw_exchange, draw_models, draw_policy
from .findings import Policies, json_of, policies, row_of
from .page import environment, problems_text, visible, write_files
from .report import csv_text, vectors
from .store import Store


def write_comparison(
    folder: str | Path,
    results: Sequence[Sequence[Result]],
    stores: Sequence[Store],
    *,
    training: Mapping[str, float] | None = None,
) -> Path:
    """Writes results.csv (all rows, `pareto` over all models), findings.json (what the page says
    beyond them), figures as PNG and index.html; returns its path.

    results: what `evaluate(store)` gives for each store, each with a name of its model that no
    other has; training: the FLOPs of training by that name, where all are known. Raises ValueError
    for fewer than two models, for two of one name, for different tasks, and for stores that do not
    hold the same problems.
    """
    _check(results, stores)
    rows = mark_pareto([r for of_one in results for r in of_one])
    unit = unit_of(rows)
    known = unit == "FLOPs"
    cost = UNITS[unit][1]
    models = {of_one[0].model: frontier(of_one, cost) for of_one in results}
    best = sorted(frontier(rows, cost), key=cost)
    policy = policies(rows, stores[0])
    fought = duels(results) if known else []
    lines = equal_accuracy(results, training) if training and known else []
    traded = any(len(line.points) > 1 for line in lines)
    figures: dict[str, Any] = {
        "frontier": {
            unit: wide_and_narrow(draw_models, unit, models, best, unit)
            for unit in (["FLOPs", "Tokens"] if known else ["Tokens"])
        }
    }
    if traded:
        figures["exchange"] = svg(draw_exchange, "exchange", lines, height=4.4)
    if policy:
        figures["policy"] = svg(draw_policy, "policy", policy)
    task, note = visible(rows[0].task), f"95 % intervals over {problems_text(rows)}."
    files = {
        "results.csv": csv_text(rows).encode("utf-8", "replace"),
        "findings.json": _told(fought, lines, policy).encode(),
        "frontier.png": picture(
            draw_models,
            models,
            best,
            unit,
            title=f"{task}: the Pareto frontier of each model",
            note=f"Bands: {note} The thin line: the frontier of all.",
        ),
        **vectors(figures),
    }
    if traded:
        files["exchange.png"] = picture(
            draw_exchange,
            lines,
            columns=4,
            title=f"{task}: lines of equal accuracy",
            note="Each point is a model at its cheapest setting that reaches the accuracy: "
            "strategy, thinking tokens × samples.",
        )
    page = environment().get_template("comparison.html")
    text = page.render(
        first=rows[0],
        rows=rows,
        unit=unit,
        best=best,
        cost=cost,
        figures=figures,
        policy=policy,
        duels=fought,
        lines=lines,
        beside=files,
    )
    return write_files(folder, files | {"index.html": text.encode()}) / "index.html"


def _told(fought: list[Duel], lines: list[Line], policy: Policies | None) -> str:
    """What the page says beyond its rows, as JSON."""

    def row(r: Result | None, **more: Any) -> dict[str, Any] | None:
        return r and row_of(r, model=r.model, flops=r.flops_per_problem, **more)

    return json_of(
        {
            "duels": [
                dict(larger=row(d.large), smaller=row(d.small), difference=d.better) for d in fought
            ],
            "lines": [
                dict(
                    accuracy=line.accuracy,
                    rate=line.rate,
                    break_even=line.break_even,
                    points=[row(p.setting, training_flops=p.training) for p in line.points],
                )
                for line in lines
            ],
            "policy": policy and policy.told(),
        }
    )


def _check(results: Sequence[Sequence[Result]], stores: Sequence[Store]) -> None:
    if len(results) < 2 or not all(results):
        raise ValueError(f"a comparison needs results of two models or more, not of {len(results)}")
    names = [of_one[0].model for of_one in results]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two of the models are called {twice[0]!r}: give them names apart")
    tasks = sorted({of_one[0].task for of_one in results})
    if len(tasks) > 1:
        raise ValueError(f"the sweeps are of different tasks, {' and '.join(tasks)}")
    first = stores[0].problems()
    for store in stores[1:]:
        problems = store.problems()
        for i, problem in problems.items():
            if i in first and first[i].prompt != problem.prompt:
                raise ValueError(
                    f"{stores[0].path} and {store.path} hold different problems (problem {i} is "
                    f"{first[i].prompt!r} and {problem.prompt!r}): sweep both with one seed"
                )
        if problems.keys() != first.keys():
            raise ValueError(
                f"{stores[0].path} holds {len(first)} problems and {store.path} {len(problems)}: "
                "sweep both with one number of --problems"
            )

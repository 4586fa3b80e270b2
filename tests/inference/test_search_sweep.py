"""Searches as part of a sweep: kept, resumed, evaluated on the same axes as samples."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ponder import tasks
from ponder.inference.config import SearchOptions, SweepConfig
from ponder.inference.sweep import redraw, sweep

SEARCHES = ("beam", "dvts", "rebase", "mcts", "revise")


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory) -> SweepConfig:
    """A small sweep with every search, done."""
    config = SweepConfig(
        model=str(model),
        out=tmp_path_factory.mktemp("searched") / "out",
        samples=(1, 4),
        budgets=(),
        problems=5,
        slots=8,
        max_tokens=14,
        precision="fp32",
        searches=SearchOptions(search=SEARCHES, lines=(2, 4), width=2, step=4),
    )
    sweep(config)
    return config


def stored(out: Path, columns="problem, search, params, seed, text, lines, pruned_tokens, flops"):
    with sqlite3.connect(out / "sweep" / "samples.sqlite") as db:
        return db.execute(f"SELECT {columns} FROM search ORDER BY 1, 2").fetchall()


def rows_of(out: Path) -> list[dict]:
    with open(out / "report" / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_search_of_the_grid_is_kept(swept):
    found = stored(swept.out)
    assert len(found) == 5 * len(SEARCHES) * 2
    task, problems = tasks.get("last_digit"), tasks.get("last_digit").problems("test", 5, 0)
    for problem, _, params, seed, text, lines, _, _ in found:
        assert (params, seed) == ("temperature=1.0", 0) and text.startswith("<think>")
        best = json.loads(lines)[0]
        assert best[:2] == [task.answer(text), task.verify(problems[problem], text)]
        assert best[2] == max(value for *_, value in json.loads(lines))


def test_rows_stand_beside_those_of_samples(swept):
    rows = rows_of(swept.out)
    assert {row["strategy"] for row in rows} >= {"self-consistency", "beam", "beam-vote", *SEARCHES}
    for row in rows:
        whole = float(row["sampled_tokens"]) + float(row["forced_tokens"])
        assert 0 <= float(row["pruned_tokens"]) <= whole
        assert float(row["judge_flops_per_problem"]) == 0 < float(row["flops_per_problem"])
        assert (row["setting"] == "") == (row["strategy"].removesuffix("-vote") not in SEARCHES)
    (beam,) = [r for r in rows if r["strategy"] == "beam" and r["samples"] == "4"]
    assert beam["setting"] == "width=2 step=4 judge=confidence" and beam["think_budget"] == "inf"
    kept = [row for row in stored(swept.out) if row[1].startswith("beam lines=4 ")]
    assert float(beam["accuracy"]) == sum(json.loads(r[5])[0][1] for r in kept) / 5
    assert float(beam["pruned_tokens"]) == pytest.approx(sum(r[6] for r in kept) / 5, rel=1e-5)
    assert float(beam["flops_per_problem"]) == pytest.approx(sum(r[7] for r in kept) / 5, rel=1e-5)


def test_slots_and_company_change_no_search(swept, tmp_path):
    """Another number of slots, other searches beside them, another order: the same bits."""
    alone = replace(
        swept,
        out=tmp_path,
        slots=64,
        searches=replace(swept.searches, search=("rebase", "beam"), lines=(4,)),
    )
    sweep(alone)
    mine = stored(tmp_path)
    names = {row[1] for row in mine}
    assert mine == [row for row in stored(swept.out) if row[1] in names] and len(mine) == 10


def test_redraw_knows_the_searches(swept):
    before = rows_of(swept.out)
    redraw(swept.out)
    assert rows_of(swept.out) == before

import csv
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from ponder.inference.comparison import write_comparison
from ponder.inference.evaluation import evaluate
from ponder.inference.figures import draw_models
from ponder.inference.page import visible

from ..models.test_flops import SMALL
from .test_report import HOSTILE, Page
from .test_strategies import make_store

LARGE = replace(SMALL, n_layer=12)


def two_models(tmp_path, names=("small", "large"), shapes=(SMALL, LARGE)):
    """Twelve problems; the small model is right on half of them, the large one on all."""
    half = "ab" * 6
    stores = [
        make_store(tmp_path / "a", ["abab"] * 12, greedy=half),
        make_store(tmp_path / "b", ["aaab"] * 12, greedy="a" * 12),
    ]
    results = [
        evaluate(store, shape=shape, model=name, strategies=["greedy", "self-consistency"])
        for store, shape, name in zip(stores, shapes, names, strict=True)
    ]
    return results, stores


def test_the_frontier_runs_over_all_models(tmp_path):
    results, stores = two_models(tmp_path)
    path = write_comparison(tmp_path / "out", results, stores)
    with open(path.parent / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    best = [(r["model"], r["strategy"], r["accuracy"]) for r in rows if r["pareto"] == "true"]
    assert best == [("small", "greedy", "0.5"), ("large", "greedy", "1")]
    assert len(rows) == sum(map(len, results))
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 2 * 2 + 1  # FLOPs and tokens, each twice, and the policy
    assert "script" not in page.tags and "The compute-optimal policy" in page.text
    assert "greedy, large" in page.text


def test_no_two_lines_look_alike(tmp_path):
    rows = evaluate(make_store(tmp_path / "s", ["abab"] * 12, greedy="ab" * 6), shape=SMALL)
    axes = Figure().add_subplot()
    draw_models(axes, {f"model {i}": rows[:2] for i in range(25)}, rows[:1], "FLOPs")
    looks = [
        (line.get_color(), line.get_marker())
        for line in axes.get_lines()
        if str(line.get_label()).startswith("model")
    ]
    assert len(looks) == len(set(looks)) == 25


def test_models_are_compared_in_one_unit(tmp_path):
    """Tokens, where the FLOPs of one are not known: fewer of them are not dearer for that."""
    results, stores = two_models(tmp_path, shapes=(SMALL, None))
    frugal = [replace(r, accuracy=1.0) for r in results[0]]
    dear = [replace(r, sampled_tokens=1000.0) for r in results[1]]
    path = write_comparison(tmp_path / "out", [frugal, dear], stores)
    with open(path.parent / "results.csv", newline="") as file:
        best = {r["model"] for r in csv.DictReader(file) if r["pareto"] == "true"}
    assert best == {"small"}


def test_hostile_names_and_unknown_flops(tmp_path):
    names = (HOSTILE[0], HOSTILE[6])
    results, stores = two_models(tmp_path, names, (SMALL, None))
    page = Page(write_comparison(tmp_path / "out", results, stores).read_text(encoding="utf-8"))
    assert "script" not in page.tags and page.tags.count("svg") == 3
    assert all(visible(name) in page.text for name in names)


def test_what_cannot_be_compared_is_named(tmp_path):
    results, stores = two_models(tmp_path)
    with pytest.raises(ValueError, match="needs results of two models or more, not of 1"):
        write_comparison(tmp_path / "out", results[:1], stores[:1])
    same = [[replace(r, model="m") for r in rows] for rows in results]
    with pytest.raises(ValueError, match="two of the models are called 'm'"):
        write_comparison(tmp_path / "out", same, stores)
    other = [results[0], [replace(r, task="permute") for r in results[1]]]
    with pytest.raises(ValueError, match="of different tasks, permute and t"):
        write_comparison(tmp_path / "out", other, stores)
    moved = make_store(tmp_path / "c", ["aaab"] * 12, greedy="a" * 12, prompt="another ")
    with pytest.raises(ValueError, match="problem 0 is '0' and 'another 0'.*: sweep both with one"):
        write_comparison(tmp_path / "out", results, [stores[0], moved])
    fewer = make_store(tmp_path / "d", ["aaab"] * 7, greedy="a" * 7)
    with pytest.raises(ValueError, match="a holds 12 problems and .*d 7: sweep both with one num"):
        write_comparison(tmp_path / "out", results, [stores[0], fewer])
    assert not (tmp_path / "out").exists()

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ponder.inference import exchange
from ponder.inference.comparison import write_comparison
from ponder.inference.evaluation import evaluate
from ponder.inference.page import way_text
from ponder.models import hub
from ponder.training import preset
from ponder.training.loop import train

from ..models.test_flops import SMALL
from .test_comparison import two_models
from .test_report import Page
from .test_strategies import make_store


def setting(
    model, accuracy, flops, *, strategy="sampling", budget=None, oracle=False, tokens=1.0, more=""
):
    return SimpleNamespace(
        model=model,
        accuracy=accuracy,
        flops_per_problem=flops,
        tokens_per_problem=tokens,
        strategy=strategy,
        think_budget=budget,
        oracle=oracle,
        setting=more,
        ids=np.arange(4),
        scores=np.array([accuracy] * 4),
    )


def test_lines_of_equal_accuracy_take_the_cheapest_setting_of_each_model():
    small = [setting("s", 0.4, 1e3), setting("s", 0.8, 1e6), setting("s", 0.85, 2e6)]
    large = [setting("l", 0.6, 1e4), setting("l", 0.9, 1e5), setting("l", 1.0, 1, oracle=True)]
    # Dearer to train than the large one and never cheaper to ask: on no line.
    wasteful = [setting("w", 0.9, 1e5), setting("w", 0.5, 2e4)]
    training = {"s": 1e9, "l": 1e11, "w": 1e12}
    lines = exchange.equal_accuracy([large, small, wasteful], training, levels=(0.4, 0.8, 0.9, 1))
    assert [line.accuracy for line in lines] == [0.4, 0.8, 0.9]
    places = [[point[:2] for point in line.points] for line in lines]
    assert places == [[(1e9, 1e3)], [(1e9, 1e6), (1e11, 1e5)], [(1e11, 1e5)]]
    assert lines[1].points[0].setting is small[1]
    # A hundred times the training divides the answer's cost by ten: ten times, by the root of it.
    assert lines[1].rate == pytest.approx(10**0.5)
    assert lines[1].break_even == pytest.approx((1e11 - 1e9) / (1e6 - 1e5))
    assert np.isnan(lines[0].rate) and np.isnan(lines[0].break_even)


def test_a_line_is_no_longer_for_a_saving_that_is_chance():
    small, large = [setting("s", 0.7, 5.05001e6)], [setting("l", 0.7, 5.04896e6)]
    [line] = exchange.equal_accuracy([small, large], {"s": 1e9, "l": 2e9}, levels=(0.7,))
    assert [point.training for point in line.points] == [1e9]


def test_a_duel_is_fought_for_no_more_compute():
    large = [
        setting("l", 0.2, 50, strategy="greedy", budget=0),
        setting("l", 0.5, 60, strategy="greedy", budget=8),
        setting("l", 0.7, 100, strategy="greedy"),
        setting("l", 0.9, 200, strategy="greedy", more="extend=2"),  # no answer of one breath
    ]
    small = [
        setting("s", 0.6, 90, tokens=9),
        setting("s", 0.75, 100, tokens=10),
        setting("s", 0.9, 101, tokens=10),
        setting("s", 1.0, 20, tokens=2, oracle=True),
    ]
    first, last = exchange.duels([small, large])
    assert first == (large[0], None, None)
    assert last[:2] == (large[2], small[1])
    assert last.better.mean == pytest.approx(0.05)


def test_training_flops_are_those_of_the_journal(tmp_path):
    config = preset("tiny", data="task:last_digit", out=tmp_path / "model", steps=2, samples=0)
    folder = train(config)
    last = json.loads((folder / "train" / "metrics.jsonl").read_text().splitlines()[-1])
    shape = hub.load_config(folder)
    # Six a weight and token, the embedding's look-up left out, and attention on top.
    weights = shape.layer_weights + shape.n_embd * shape.vocab_size
    taken = exchange.training_flops(folder)
    assert taken is not None
    assert 1 < taken / (6 * weights * last["tokens"]) < 1.5
    assert exchange.training_flops(tmp_path) is None
    more = train(replace(config, init=str(folder), out=tmp_path / "more", steps=1))
    [whole, alone] = exchange.training_flops(more), (taken / 2)  # half of the steps
    assert whole is not None and taken + 0.5 * alone < whole < taken + 1.5 * alone
    (folder / "run.json").rename(tmp_path / "aside.json")
    assert exchange.training_flops(more) is None  # what it began with took nobody knows how much
    (tmp_path / "aside.json").rename(folder / "run.json")
    journal = folder / "train" / "metrics.jsonl"
    with open(journal, "a") as file:
        file.write('{"step": 3}\n{"step": 4, "tok')  # a killed run's last words
    assert exchange.training_flops(folder) == taken
    for nothing in ("", '{"step": 1}\n', "[1]\n"):
        journal.write_text(nothing)
        assert exchange.training_flops(folder) is None
    (folder / "run.json").write_text("{}")
    assert exchange.training_flops(folder) is None
    journal.unlink()
    assert exchange.training_flops(folder) is None


def test_the_page_draws_the_exchange_rate(tmp_path):
    """The small model needs a vote for what the large one says at once."""
    stores = [
        make_store(tmp_path / "a", ["aaaabc"] * 12, greedy="ab" * 6),
        make_store(tmp_path / "b", ["aaaaaa"] * 12, greedy="a" * 12),
    ]
    shapes = {"small": SMALL, "large": replace(SMALL, n_layer=2 * SMALL.n_layer)}
    results = [
        evaluate(store, shape=shape, model=name, samples=(1, 4))
        for store, (name, shape) in zip(stores, shapes.items(), strict=True)
    ]
    training = {"small": 1e9, "large": 1e12}
    path = write_comparison(tmp_path / "out", results, stores, training=training)
    page = Page(path.read_text(encoding="utf-8"))
    assert "Training against thinking" in page.text and "pays off after" in page.text
    assert "A smaller model that thinks longer" in page.text
    told = json.loads((path.parent / "findings.json").read_text())
    lines = exchange.equal_accuracy(results, training)
    assert told["lines"][0].keys() == {"accuracy", "rate", "break_even", "points"}
    assert [(line["accuracy"], line["rate"]) for line in told["lines"]] == [
        (line.accuracy, None if np.isnan(line.rate) else line.rate) for line in lines
    ]
    assert [p["model"] for p in told["lines"][-1]["points"]] == ["small", "large"]
    for point in (p for line in told["lines"] for p in line["points"]):
        assert point["training_flops"] == training[point["model"]] and point["flops"] > 0
    first = told["duels"][0]
    assert (first["larger"]["model"], first["smaller"]["model"]) == ("large", "small")
    assert first["difference"]["mean"] == pytest.approx(
        first["smaller"]["accuracy"] - first["larger"]["accuracy"]
    )
    assert {way["model"] for p in told["policy"]["overall"] for way in p["choice"]} >= {"large"}
    figure = (path.parent / "exchange.svg").read_text()
    for point in (p for line in lines if len(line.points) > 1 for p in line.points):
        assert point.setting.model in figure and way_text(point.setting) in figure
    for name in ("frontier.png", "exchange.png"):
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
    without = write_comparison(tmp_path / "without", *two_models(tmp_path / "two"))
    assert not (without.parent / "exchange.png").exists()
    assert "Training against thinking" not in without.read_text(encoding="utf-8")

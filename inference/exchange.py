"""What training costs and what thinking costs, traded for each other.

For one accuracy, each model has a cheapest setting that reaches it; over training FLOPs and
inference FLOPs those points make a line of equal accuracy. Source: Jones 2021, "Scaling Scaling
Laws with Board Games", section 5.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..provenance import read_run
from . import stats
from .chat import known_shape
from .evaluation import SLACK, Result, paired_difference
from .page import budget_order, spread

# The accuracies that are tried; those that one model alone reaches make no line.
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def training_flops(folder: str | Path) -> float | None:
    """FLOPs that training the model in a folder took, as its journal has it, with those of what it
    began with (`--init`): a backward pass costs two forward passes. None where `ponder train` did
    not leave all of it; ValueError for a damaged run.json."""
    folder = Path(folder)
    # The demonstration keeps its model beside train/, a training run above it.
    for home in (folder, folder.parent):
        journal = home / "train" / "metrics.jsonl"
        if not (journal.is_file() and (home / "run.json").is_file()):
            continue
        run, shape, tokens = read_run(home).get("train"), known_shape(str(folder)), _tokens(journal)
        if run is None or shape is None or tokens is None:
            return None
        given = run["configuration"].get("init")
        before = training_flops(given) if given else 0.0
        if before is None:  # a model of others, or one that is not there any more
            return None
        return before + 3 * shape.flops_per_token(run["configuration"]["context"]) * tokens
    return None


def _tokens(journal: Path) -> int | None:
    """How many tokens training has seen, by the last line that says so: a killed run may have left
    half a line behind it."""
    for line in reversed(journal.read_text(encoding="utf-8", errors="replace").splitlines()):
        with suppress(ValueError, KeyError, TypeError):
            return json.loads(line)["tokens"]
    return None


class Point(NamedTuple):
    """A model, and its cheapest setting that reaches an accuracy."""

    training: float
    inference: float
    setting: Result


@dataclass(frozen=True)
class Line:
    """A line of equal accuracy: the models that no other beats in both training and inference,
    the cheapest to train first."""

    accuracy: float
    points: list[Point]

    @property
    def rate(self) -> float:
        """How many times the inference FLOPs fall for ten times the training FLOPs: a straight
        line through the logarithms. NaN where one model is best in both."""
        if len(self.points) < 2:
            return math.nan
        training, inference = np.log10([point[:2] for point in self.points]).T
        return float(10 ** -np.polyfit(training, inference, 1)[0])

    @property
    def break_even(self) -> float:
        """After how many problems the last model's training has paid for itself against the first
        model's. NaN where one model is best in both."""
        first, last = self.points[0], self.points[-1]
        saved = first.inference - last.inference
        return (last.training - first.training) / saved if saved > 0 else math.nan


def equal_accuracy(
    results: Sequence[Sequence[Result]],
    training: Mapping[str, float],
    levels: Sequence[float] = LEVELS,
) -> list[Line]:
    """The lines of equal accuracy that two models or more reach.

    results: those of each model, FLOPs known; training: each model's FLOPs, by its name. Settings
    are chosen with hindsight, on the problems that they are scored on.
    """
    lines = []
    for level in levels:
        reached = []
        for of_one in results:
            enough = [r for r in of_one if not r.oracle and r.accuracy >= level]
            if enough:
                best = min(enough, key=lambda r: r.flops_per_problem)
                reached.append(Point(training[best.model], best.flops_per_problem, best))
        if len(reached) < 2:
            continue
        # What saves inference by less than chance does is not worth more training.
        unbeaten = stats.pareto(
            [p.inference for p in reached], [-p.training for p in reached], slack=SLACK
        )
        points = [p for p, best in zip(reached, unbeaten, strict=True) if best]
        lines.append(Line(level, sorted(points, key=lambda p: p.training)))
    return lines


class Duel(NamedTuple):
    """A larger model's greedy answer against a smaller model that may spend as much: its best
    setting, and by how much that is more accurate. None where it has no setting so cheap, or no
    problem is both's."""

    large: Result
    small: Result | None
    better: stats.Interval | None


def duels(results: Sequence[Sequence[Result]]) -> list[Duel]:
    """Every model against every larger one, at the larger one's least and greatest budget."""
    found = []
    for large in results:
        greedy = [r for r in large if r.strategy == "greedy" and not r.setting]
        ends = spread(sorted(greedy, key=lambda r: budget_order(r.think_budget)), 2)
        for small in results:
            if _size(small) > 0.9 * _size(large):  # one shape, but for texts of other lengths
                continue
            for r in ends:
                cheap = [
                    s for s in small if not s.oracle and s.flops_per_problem <= r.flops_per_problem
                ]
                best = max(cheap, key=lambda s: (s.accuracy, -s.flops_per_problem), default=None)
                found.append(Duel(r, best, best and paired_difference(best, r)))
    return found


def _size(results: Sequence[Result]) -> float:
    """FLOPs per token, which only attention's share lets depend on the texts."""
    return min(r.flops_per_problem / r.tokens_per_problem for r in results)

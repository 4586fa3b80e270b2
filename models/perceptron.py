"""The perceptron: one neuron with a step for its activation, and the rule by which it learns."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn


def step(x: Tensor) -> Tensor:
    """The step function: 1 where x ≥ 0, else 0; in x's shape and dtype. Its slope is 0 wherever
    it has one, so that no gradient comes through it."""
    return (x >= 0).to(x.dtype)


def separable(x: Tensor, y: Tensor) -> bool:
    """Whether a hyperplane has all points of label 1 on one side and all of label 0 on the other.

    x (N, F), y (N,) of 0 and 1. Such a plane exists where ±(w·x + b) ≥ 1 has a solution, a linear
    program: exact, up to gaps of some 1e-9 of a feature's range.
    """
    points = x.double().cpu().numpy()
    # Each feature from 0 to 1, which moves no point across a plane: the solver's tolerances are
    # absolute.
    points = points - points.min(0)
    points = np.hstack(
        [points / np.where((reach := points.max(0)) > 0, reach, 1.0), np.ones((len(x), 1))]
    )
    side = 2.0 * y.double().cpu().numpy()[:, None] - 1
    free = (None, None)
    solution = linprog(
        np.zeros(points.shape[1]), A_ub=-side * points, b_ub=-np.ones(len(points)), bounds=free
    )
    return solution.status == 0


@dataclass(frozen=True)
class Learning:
    """How the rule went."""

    updates: tuple[int, ...]
    """corrections of the weights in each pass over the points"""
    converged: bool
    """the last pass corrected nothing: every point is on its side"""
    separable: bool
    """a line (a plane, a hyperplane) parts the two classes"""

    def __str__(self) -> str:
        counts = {"pass": len(self.updates), "correction": sum(self.updates)}
        plural = {"pass": "es", "correction": "s"}
        work = " and ".join(f"{n} {what}{plural[what] * (n != 1)}" for what, n in counts.items())
        if self.converged:
            return f"converged after {work}"
        if self.separable:
            return f"not converged after {work}; the points are separable, so it needs more"
        return f"no line separates these points: stopped after {work}"


class Perceptron(nn.Module):
    """One neuron: step(w·x + b). Rosenblatt 1958.

    Points above the line w·x + b = 0 get a 1, points below it a 0.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, n_features: int):
        super().__init__()
        if n_features < 1:
            raise ValueError(f"n_features is {n_features}; it must be at least 1")
        # Buffers, not parameters: the rule sets them, no gradient does.
        self.register_buffer("weight", torch.zeros(n_features))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., F) → (...) of 0 and 1."""
        return step(x @ self.weight + self.bias)

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor, *, max_passes: int = 1000) -> Learning:
        """The perceptron rule, point by point, until a whole pass has no mistake:

            w ← w + (y − ŷ) x,  b ← b + (y − ŷ)

        x (N, F) in the weights' dtype (fp32), y (N,) of 0 and 1. Separable points need at most
        (R/γ)² corrections, R the longest (x, 1) and γ the margin of the best plane (Novikoff 1962).
        For others the rule never ends; `max_passes` ends it, and the result says which of the two
        it was. ValueError for points or labels that are not as said.
        """
        self._check(x, y, max_passes)
        y = y.to(x.dtype)  # bool has no difference
        updates = []
        while len(updates) < max_passes:
            mistakes = 0
            for point, label in zip(x, y, strict=True):
                error = label - self(point)
                if error != 0:
                    self.weight += error * point
                    self.bias += error
                    mistakes += 1
            updates.append(mistakes)
            if not mistakes:
                return Learning(tuple(updates), converged=True, separable=True)
        return Learning(tuple(updates), converged=False, separable=separable(x, y))

    def _check(self, x: Tensor, y: Tensor, max_passes: int) -> None:
        if x.ndim != 2 or x.shape[1] != len(self.weight) or not len(x):
            raise ValueError(f"x is {tuple(x.shape)}; it must be (N, {len(self.weight)}), N ≥ 1")
        if x.dtype != self.weight.dtype:
            raise ValueError(f"x is {x.dtype}; the weights are {self.weight.dtype}, so it must be")
        if not x.isfinite().all():
            raise ValueError("x holds a number that is not finite")
        if y.shape != x.shape[:1]:
            raise ValueError(f"y is {tuple(y.shape)}; {len(x)} points need ({len(x)},)")
        odd = y[(y != 0) & (y != 1)]
        if len(odd):
            raise ValueError(f"y holds {odd[0].item():g}; labels are 0 and 1")
        if max_passes < 1:
            raise ValueError(f"max_passes is {max_passes}; it must be at least 1")

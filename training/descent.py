"""Walks down a loss surface: where gradient descent, momentum and Adam go, step by step."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Surface = Callable[[Tensor, Tensor], Tensor]

RULES: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
}


def valley_with_dip(x: Tensor, y: Tensor) -> Tensor:
    """A long valley, ten times as steep across as along, with a small dip on the way down.

        f(x, y) = x²/10 + y² − 0.3 exp(−4 ((x + 2)² + y²))

    x and y (...), of one shape, which f has too. The floor is at (0, 0), where f = 0. The dip's is
    at (−1.83, 0), where f = 0.068, behind a ridge of f = 0.127 at (−1.33, 0).
    """
    return x**2 / 10 + y**2 - 0.3 * torch.exp(-4 * ((x + 2) ** 2 + y**2))


def descend(
    surface: Surface, start: Sequence[float], rule: str, *, lr: float, steps: int
) -> Tensor:
    """The path of a rule ("sgd", "momentum", "adam") from `start`: (steps + 1, 2) in fp64.

        sgd       p ← p − η g
        momentum  v ← 0.9 v + g;  p ← p − η v                              (Polyak 1964)
        adam      p ← p − η m̂ / (√v̂ + ε), m and v running means of g and g²  (Kingma, Ba 2015)

    g is the slope at p. ValueError for an unknown rule, a start that is not two finite numbers, and
    where the path leaves all bounds.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    if len(start) != 2 or not all(map(math.isfinite, start)):
        raise ValueError(f"start is {tuple(start)}; it must be two finite numbers, x and y")
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = RULES[rule]([point], lr)
    path = [point.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        surface(point[0], point[1]).backward()
        optimizer.step()
        path.append(point.detach().clone())
        if not path[-1].isfinite().all():
            raise ValueError(
                f"{rule} left all bounds at step {len(path) - 1}; lr is {lr}, try a lower one"
            )
    return torch.stack(path)

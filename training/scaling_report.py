"""What a ladder came to: its runs, their law, and how well it predicts, as files and in words."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..provenance import write_aside
from .report import human
from .scaling import LEVEL, Fit, Interval, Optimum, fit_law, power_of_size
from .scaling_figure import draw

MORE = 1, 10  # times the compute of the dearest run, whose best use is told


@dataclass(frozen=True)
class Rung:
    """One run of the ladder, trained or not; a row of runs.csv."""

    name: str
    n_layer: int
    n_embd: int
    parameters: int
    """in the layers' matrices; embedding and head left out"""
    held_out: bool
    status: str = "waiting"
    """waiting, finished or diverged"""
    tokens: int = 0
    """that it was trained on"""
    flops: float = 0.0
    """of the training, head and attention included"""
    seconds: float = 0.0
    val_loss: float | None = None
    """nats a token"""
    fitted: float | None = None
    """what the law says"""


def fit_rungs(rungs: Sequence[Rung], *, resamples: int, seed: int) -> Fit:
    """The law of the finished runs that are not held out; ValueError where they are too few."""
    used = [r for r in rungs if r.status == "finished" and not r.held_out]
    columns = zip(*[(r.parameters, r.tokens, r.val_loss) for r in used], strict=True)
    n, d, losses = columns if used else ((), (), ())
    try:
        return fit_law(n, d, losses, resamples=resamples, seed=seed)
    except ValueError as error:
        lost = ", ".join(r.name for r in rungs if r.status == "diverged")
        raise ValueError(f"{error}{f'; diverged: {lost}' if lost else ''}") from None


def report(fit: Fit, rungs: Sequence[Rung], folder: Path) -> None:
    """Write runs.csv, fit.json and scaling.png; print the law."""
    fitted = [
        replace(r, fitted=float(fit.law.loss(r.parameters, r.tokens))) if r.tokens else r
        for r in rungs
    ]
    write_aside(folder / "runs.csv", table(fitted))
    write_aside(folder / "fit.json", json.dumps(summary(fit, fitted), indent=1) + "\n")
    draw(fit, fitted, folder / "scaling.png")
    print(describe(fit, fitted))


def table(rungs: Sequence[Rung]) -> str:
    """runs.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Rung)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(r) for r in rungs)
    return text.getvalue()


def summary(fit: Fit, rungs: Sequence[Rung]) -> dict[str, Any]:
    """fit.json: every constant with its interval, and whether the runs identify it."""

    def entry(interval: Interval) -> dict[str, float]:
        return {k: float(f"{v:.8g}") for k, v in interval._asdict().items()}

    constants = {
        name: entry(interval)
        | {"identified": name not in fit.unidentified}
        | ({"why": fit.unidentified[name]} if name in fit.unidentified else {})
        for name, interval in fit.intervals.items()
    }
    held = [r for r in rungs if r.held_out and r.status == "finished"]
    return {
        "law": "L(N, D) = E + A/N^alpha + B/D^beta, nats a token",
        "level": LEVEL,
        "constants": constants,
        "runs": len(fit.residuals),
        "left_out": [r.name for r in rungs if r.status == "diverged"],
        "scatter": float(f"{_rms(fit.residuals):.6g}"),
        "backtest": {"runs": len(fit.misses), "missed by": float(f"{_rms(fit.misses):.6g}")},
        "held_out": [
            {"name": r.name, "predicted": entry(fit.predict(r.parameters, r.tokens))}
            | {"measured": r.val_loss}
            for r in held
        ],
        "optimum": [
            {name: x if name == "flops" else entry(x) for name, x in best._asdict().items()}
            for best in optima(fit, rungs)
        ],
    }


def optima(fit: Fit, rungs: Sequence[Rung]) -> list[Optimum]:
    """What the compute of the dearest run, and ten times it, are best spent on; empty where the
    runs do not tell how losses fall with size and tokens."""
    if not fit.unidentified.keys().isdisjoint(("alpha", "beta")):
        return []
    done = [r for r in rungs if r.status == "finished"]
    n, per_token = np.array([(r.parameters, r.flops / r.tokens) for r in done]).T
    most, sizes = max(r.flops for r in done), (n.min() / 10, 100 * n.max())
    return [fit.optimum(times * most, power_of_size(n, per_token), sizes) for times in MORE]


def _rms(values: Any) -> float:
    return float((values**2).mean() ** 0.5)


def describe(fit: Fit, rungs: Sequence[Rung]) -> str:
    """The law in words for the terminal."""
    lines = ["L(N, D) = E + A/N^alpha + B/D^beta, with 90 % intervals:"]
    for name, (value, low, high) in fit.intervals.items():
        digits = f"  {name:14}{value:10.4g}   {low:.4g} to {high:.4g}"
        if name in fit.unidentified:
            digits = f"  {name:14}{'?':>10}   {low:.4g} to {high:.4g}: {fit.unidentified[name]}"
        lines.append(digits)
    lines.append(
        f"  runs scatter by {_rms(fit.residuals):.1%}; the {len(fit.misses)} largest, predicted "
        f"from the others, missed by {_rms(fit.misses):.1%}"
    )
    for r in rungs:
        if r.status == "diverged":
            lines.append(f"  {r.name} diverged and is left out")
        elif r.held_out and r.val_loss is not None:
            value, low, high = fit.predict(r.parameters, r.tokens)
            inside = "inside" if low <= r.val_loss <= high else "OUTSIDE"
            lines.append(
                f"  {r.name}: predicted {value:.4f} ({low:.4f} to {high:.4f}), "
                f"measured {r.val_loss:.4f}, {inside}"
            )
    for best in optima(fit, rungs):
        n, d, loss = best.parameters, best.tokens, best.loss
        lines.append(
            f"  {best.flops:.2g} FLOPs are best spent on {human(n.value)} parameters "
            f"({human(n.low)} to {human(n.high)}) and {human(d.value)} tokens ({human(d.low)} to "
            f"{human(d.high)}): loss {loss.value:.4f} ({loss.low:.4f} to {loss.high:.4f})"
        )
    return "\n".join(lines)

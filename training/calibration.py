"""Calibration: what a verifier's logits are worth as probabilities, on problems held out.

Arrays: logits (N,) real, labels (N,) 0 or 1.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

BINS = 15


class Platt(NamedTuple):
    """A calibrated probability is σ(scale · logit + shift)."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        return expit(self.scale * logits + self.shift)


def fit_platt(logits: np.ndarray, labels: np.ndarray) -> Platt:
    """The scale and shift of the least cross-entropy; Platt() where only one label is there.

    logits, labels (N,), 1 where the solution is right.

    The targets are Platt's, a little inside 0 and 1, so that separable logits have a fit; the scale
    stays positive: a calibration does not change an order. Source: Platt 1999, "Probabilistic
    Outputs for Support Vector Machines", section 2.2.
    """
    right = float(labels.sum())
    wrong = len(labels) - right
    if not right or not wrong:
        return Platt()
    targets = np.where(labels > 0, (right + 1) / (right + 2), 1 / (wrong + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale = math.exp(parameters[0])
        z = scale * logits + parameters[1]
        slope = (expit(z) - targets) / len(z)
        gradient = np.array([scale * float(slope @ logits), float(slope.sum())])
        return float((np.logaddexp(0, z) - targets * z).mean()), gradient

    bounds = [(-7.0, 7.0), (None, None)]
    found = minimize(loss, np.zeros(2), jac=True, bounds=bounds, method="L-BFGS-B").x
    return Platt(math.exp(found[0]), float(found[1]))


def calibration_error(probability: np.ndarray, labels: np.ndarray) -> float:
    """The mean distance of confidence from accuracy over 15 equal bins, weighted by their size.

    probability, labels (N,).

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3, of the
    probability of "right".
    """
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=probability - labels, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


def auc(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The chance that a right one of two scores higher than a wrong one, ties half; None where
    there are not both. (The Mann-Whitney statistic.) logits, labels (N,)."""
    right = labels > 0
    n, m = int(right.sum()), int((~right).sum())
    if not n or not m:
        return None
    return float((rankdata(logits)[right].sum() - n * (n + 1) / 2) / (n * m))


class Calibration(NamedTuple):
    """How good the logits are, by the names that run.json has: the errors with Platt's scale and
    shift, and as they were; auc knows no calibration."""

    auc: float | None
    calibration_error: float
    uncalibrated_error: float
    scale: float
    shift: float
    held_out_labels: int


def calibrate(logits: np.ndarray, labels: np.ndarray, half: np.ndarray) -> Calibration:
    """A calibration fitted on all the logits, its error measured across halves: that of each is of
    a fit on the other. Where it does not improve the cross-entropy of the halves, there is none.

    half (N,) bool: whose problems are apart from those of the others.
    """
    crossed = np.empty(len(logits))
    for part in (half, ~half):
        crossed[part] = fit_platt(logits[~part], labels[~part])(logits[part])
    plain = expit(logits)
    better = cross_entropy(crossed, labels) < cross_entropy(plain, labels)
    raw_error = calibration_error(plain, labels)
    return Calibration(
        auc(logits, labels),
        calibration_error(crossed, labels) if better else raw_error,
        raw_error,
        *(fit_platt(logits, labels) if better else Platt()),
        len(labels),
    )


def cross_entropy(probability: np.ndarray, labels: np.ndarray) -> float:
    """The mean, in nats; probability, labels (N,)."""
    of_label = np.where(labels > 0, probability, 1 - probability)
    return float(-np.log(np.maximum(of_label, 1e-12)).mean())

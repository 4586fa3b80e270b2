"""Calibration against closed forms, brute force and known truths."""

import numpy as np
import pytest
from scipy.special import expit

from ponder.training.calibration import (
    Platt,
    auc,
    calibrate,
    calibration_error,
    cross_entropy,
    fit_platt,
)


def drawn(count, scale, shift, seed=0):
    """Logits, and labels that are right as often as σ(scale · logit + shift) says."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=count) * 2
    return logits, (rng.random(count) < expit(scale * logits + shift)).astype(int)


def test_a_known_scale_and_shift_are_found_again():
    found = fit_platt(*drawn(40_000, 0.5, -1.0))
    assert found.scale == pytest.approx(0.5, abs=0.03)
    assert found.shift == pytest.approx(-1.0, abs=0.05)


def test_logits_that_separate_have_a_finite_fit_and_one_label_has_none():
    found = fit_platt(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 0, 1, 1]))
    assert np.isfinite(found).all() and found.scale > 0
    # Platt's targets: three right of four labels (2 + 1) / (2 + 2).
    assert found(np.array([-50.0, 50.0])) == pytest.approx([0, 1], abs=1e-3)
    assert fit_platt(np.array([0.3, 2.0]), np.array([1, 1])) == Platt()


def test_a_verifier_that_is_always_wrong_is_not_turned_round():
    logits, labels = drawn(2000, -1.0, 0.0)
    assert fit_platt(logits, labels).scale < 0.01
    assert auc(logits, labels) < 0.3


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    logits, labels = rng.integers(0, 5, 40).astype(float), rng.integers(0, 2, 40)
    right, wrong = logits[labels == 1], logits[labels == 0]
    pairs = [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    assert auc(logits, labels) == pytest.approx(np.mean(pairs))
    assert auc(logits, np.ones(40)) is None


def test_calibration_error_by_hand():
    # Bins of a fifteenth: 0.1 twice, half right; 0.95 twice, all right; 1 is in the last bin.
    probability = np.array([0.1, 0.1, 0.95, 0.95, 1.0])
    labels = np.array([0, 1, 1, 1, 0])
    gap = abs(0.2 - 1) + abs(0.95 + 0.95 + 1.0 - 2)
    assert calibration_error(probability, labels) == pytest.approx(gap / 5)
    logits, labels = drawn(50_000, 1.0, 0.0)
    # A bin's share of right ones is off by about 0.5 / √(50,000 / 15).
    assert calibration_error(expit(logits), labels) < 0.01


def test_a_calibration_is_measured_on_problems_that_it_was_not_fitted_on():
    logits, labels = drawn(4000, 0.3, 1.0)
    half = np.arange(4000) < 2000
    found = calibrate(logits, labels, half)
    assert (found.scale, found.shift) == fit_platt(logits, labels) and found.held_out_labels == 4000
    assert found.calibration_error < 0.05 < found.uncalibrated_error
    crossed = np.concatenate(
        [
            fit_platt(logits[2000:], labels[2000:])(logits[:2000]),
            fit_platt(logits[:2000], labels[:2000])(logits[2000:]),
        ]
    )
    assert found.calibration_error == pytest.approx(calibration_error(crossed, labels))
    assert found.uncalibrated_error == calibration_error(expit(logits), labels)


def test_a_calibration_that_does_not_carry_over_is_not_used():
    logits = np.array([1.0, 2.0, -1.0, -2.0, 1.0, 2.0, -1.0, -2.0]) / 10
    labels = np.array([1, 1, 0, 0, 0, 0, 1, 1])  # the second half says the opposite
    found = calibrate(logits, labels, np.arange(8) < 4)
    assert (found.scale, found.shift) == Platt()
    assert found.calibration_error == found.uncalibrated_error


def test_cross_entropy_is_finite_where_a_probability_is_none():
    found = cross_entropy(np.array([0.0, 0.5]), np.array([1, 0]))
    assert found == pytest.approx((-np.log(1e-12) + np.log(2)) / 2)

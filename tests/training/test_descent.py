import pytest
import torch

from ponder.training.descent import descend, valley_with_dip

START = (-3.5, 1.0)
DIP = (-1.83, 0.0)


def test_the_surface_is_as_described():
    x = torch.linspace(-4, 2, 60001, dtype=torch.float64)
    f = valley_with_dip(x, torch.zeros_like(x))
    low = (f[1:-1] < f[:-2]) & (f[1:-1] < f[2:])
    high = (f[1:-1] > f[:-2]) & (f[1:-1] > f[2:])
    assert x[1:-1][low].tolist() == pytest.approx([-1.83, 0], abs=0.005)
    assert f[1:-1][low].tolist() == pytest.approx([0.068, 0], abs=5e-4)
    assert x[1:-1][high].tolist() == pytest.approx([-1.33], abs=0.005)
    assert f[1:-1][high].tolist() == pytest.approx([0.127], abs=5e-4)


def test_the_dip_holds_gradient_descent_and_not_momentum():
    held = descend(valley_with_dip, START, "sgd", lr=0.1, steps=300)
    through = descend(valley_with_dip, START, "momentum", lr=0.1, steps=300)
    assert held[-1].tolist() == pytest.approx(DIP, abs=0.01)
    assert through[-1].tolist() == pytest.approx((0, 0), abs=0.01)


def test_adams_first_step_is_as_long_as_the_rate_in_each_direction():
    path = descend(valley_with_dip, START, "adam", lr=0.2, steps=1)
    assert (path[1] - path[0]).tolist() == pytest.approx([0.2, -0.2], rel=1e-5)


def test_on_a_parabola_the_steps_are_the_formulas():
    def bowl(x, y):
        return x**2 + y**2

    plain = descend(bowl, (1.0, -2.0), "sgd", lr=0.1, steps=3)
    torch.testing.assert_close(plain[3], torch.tensor([1.0, -2.0]).double() * 0.8**3)
    heavy = descend(bowl, (1.0, 0.0), "momentum", lr=0.1, steps=2)
    # v₁ = 2, p₁ = 0.8; v₂ = 0.9 · 2 + 1.6 = 3.4, p₂ = 0.46
    assert heavy[:, 0].tolist() == pytest.approx([1, 0.8, 0.46])


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="rule is 'newton'; it must be one of sgd, momentum, adam"):
        descend(valley_with_dip, START, "newton", lr=0.1, steps=1)
    with pytest.raises(ValueError, match="sgd left all bounds at step"):
        descend(lambda x, y: x**4, (9.0, 0.0), "sgd", lr=1.0, steps=50)
    for start in ((1.0,), (1.0, 2.0, 3.0), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match="start is .*; it must be two finite numbers"):
            descend(valley_with_dip, start, "sgd", lr=0.1, steps=1)

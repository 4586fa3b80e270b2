import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder.models.perceptron import Perceptron, separable, step

CORNERS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
GATES = {"and": [0, 0, 0, 1], "or": [0, 1, 1, 1], "nand": [1, 1, 1, 0], "first": [0, 0, 1, 1]}


def test_the_step_is_one_from_zero_on():
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-30, -1e-30])
    assert step(x).tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("gate", GATES)
def test_gates_are_learned(gate):
    y = torch.tensor(GATES[gate])
    neuron = Perceptron(2)
    learning = neuron.fit(CORNERS, y)
    assert learning.converged and learning.separable and learning.updates[-1] == 0
    assert neuron(CORNERS).tolist() == y.tolist()
    assert "converged after" in str(learning)


def test_exclusive_or_is_said_to_have_no_line():
    learning = Perceptron(2).fit(CORNERS, torch.tensor([0, 1, 1, 0]), max_passes=50)
    assert not learning.converged and not learning.separable
    assert "no line separates" in str(learning) and len(learning.updates) == 50


def test_too_few_passes_are_not_taken_for_inseparable():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.001]])
    learning = Perceptron(2).fit(x, torch.tensor([0, 1]), max_passes=3)
    assert not learning.converged and learning.separable
    assert "needs more" in str(learning)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.1, 0.3]))
def test_corrections_stay_below_novikoffs_bound(seed, width, margin):
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(width + 1, generator=draw, dtype=torch.float64)
    normal /= normal.norm()
    x = torch.randn(60, width, generator=draw, dtype=torch.float64)
    distance = x @ normal[:-1] + normal[-1]
    kept = distance.abs() >= margin
    x, y = x[kept], (distance[kept] > 0).long()
    if not len(x):
        return
    neuron = Perceptron(width).double()
    learning = neuron.fit(x, y, max_passes=5000)
    assert learning.converged and torch.equal(neuron(x).long(), y)
    longest = (x.square().sum(1) + 1).max()
    # A first weight of 0 has every point on its positive side, hence one correction of grace.
    assert sum(learning.updates) <= longest / margin**2 + 1


def test_separability_is_exact():
    x = torch.tensor([[0.0], [1.0], [2.0]])
    assert separable(x, torch.tensor([0, 1, 1])) and separable(x, torch.tensor([1, 1, 1]))
    assert not separable(x, torch.tensor([0, 1, 0]))
    assert not separable(torch.tensor([[1.0], [1.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_separability_does_not_depend_on_units(scale, shift):
    x = (CORNERS.double() + shift) * scale
    assert separable(x, torch.tensor([0, 0, 0, 1])) and separable(x, torch.tensor([0, 0, 1, 1]))
    assert not separable(x, torch.tensor([0, 1, 1, 0]))
    x[:, 0] = scale  # a feature that tells nothing
    assert separable(x, torch.tensor([0, 1, 0, 1])) and not separable(x, torch.tensor([0, 0, 1, 1]))


def test_points_too_small_for_the_rule_are_not_called_inseparable():
    learning = Perceptron(2).fit(1e-20 * CORNERS, torch.tensor([0, 0, 0, 1]), max_passes=5)
    assert not learning.converged and learning.separable


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_labels_may_be_of_any_dtype(dtype):
    neuron = Perceptron(2)
    assert neuron.fit(CORNERS, torch.tensor(GATES["or"]).to(dtype)).converged
    assert neuron(CORNERS).tolist() == GATES["or"]


@pytest.mark.parametrize(("count", "label"), [(1, 0), (1, 1), (4, 0), (4, 1)])
def test_one_point_and_one_class_are_learned(count, label):
    neuron = Perceptron(2)
    learning = neuron.fit(CORNERS[:count], torch.full((count,), label))
    assert learning.converged and neuron(CORNERS[:count]).tolist() == [label] * count
    assert "1 passes" not in str(learning) and "1 corrections" not in str(learning)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (CORNERS, torch.tensor([0, 1, 2, 0]), "y holds 2; labels are 0 and 1"),
        (CORNERS, torch.tensor([0, 1]), "4 points need"),
        (CORNERS[:, :1], torch.tensor([0, 1, 1, 0]), r"x is \(4, 1\)"),
        (CORNERS[:0], torch.tensor([]), "N ≥ 1"),
        (CORNERS * float("nan"), torch.tensor([0, 1, 1, 0]), "x holds a number that is not finite"),
        (CORNERS.double(), torch.tensor([0, 1, 1, 0]), "x is torch.float64; the weights are"),
        (CORNERS.long(), torch.tensor([0, 1, 1, 0]), "x is torch.int64"),
        (CORNERS, torch.tensor([0, 1, 1, float("nan")]), "y holds nan; labels are 0 and 1"),
    ],
)
def test_bad_points_are_named(x, y, message):
    with pytest.raises(ValueError, match=message):
        Perceptron(2).fit(x, y)

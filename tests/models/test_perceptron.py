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


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (CORNERS, torch.tensor([0, 1, 2, 0]), "y holds 2; labels are 0 and 1"),
        (CORNERS, torch.tensor([0, 1]), "4 points need"),
        (CORNERS[:, :1], torch.tensor([0, 1, 1, 0]), r"x is \(4, 1\)"),
        (CORNERS * float("nan"), torch.tensor([0, 1, 1, 0]), "no finite"),
    ],
)
def test_bad_points_are_named(x, y, message):
    with pytest.raises(ValueError, match=message):
        Perceptron(2).fit(x, y)

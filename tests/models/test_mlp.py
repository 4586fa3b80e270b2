import pytest
import torch
from torch.nn import functional as F

from ponder.kernels._activations import ACTIVATIONS
from ponder.models.mlp import MLP

XOR = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
ODD = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(3, 2), (3, 5, 2), (3, 5, 4, 6, 2)], ids=len)
def test_forward_and_loss_are_the_written_out_ones(widths, activation):
    torch.manual_seed(0)
    model = MLP(widths, activation=activation).double()
    x, y = torch.randn(4, 7, 3, dtype=torch.float64), torch.randint(2, (4, 7))
    h = x
    for i, layer in enumerate(model.layers):
        layer.bias.data.normal_()
        h = h @ layer.weight.T + layer.bias
        if i + 2 < len(widths):
            h = ACTIVATIONS[activation](h)
    torch.testing.assert_close(model(x), h)
    torch.testing.assert_close(model.loss(x, y), F.cross_entropy(h.flatten(0, 1), y.flatten()))
    torch.testing.assert_close(model.predict(x), h.softmax(-1).detach())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_hidden_layer_learns_exclusive_or(optimizer):
    torch.manual_seed(1)
    model = MLP((2, 16, 2), activation="tanh")
    lr = {"sgd": 0.5, "momentum": 0.1, "adam": 0.05}[optimizer]
    losses = model.fit(XOR, ODD, steps=400, lr=lr, optimizer=optimizer)
    assert losses[-1] < 0.05 < losses[0]
    assert model(XOR).argmax(-1).tolist() == ODD.tolist()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_without_a_non_linearity_no_depth_learns_it(depth):
    torch.manual_seed(0)
    model = MLP((2, *[16] * depth, 2), activation="identity")
    losses = model.fit(XOR, ODD, steps=300, lr=0.02)
    # The best linear map gives both classes the same probability: ln 2.
    assert losses[-1] == pytest.approx(0.6931, abs=2e-3)


def test_values_are_fitted_by_mean_squared_error():
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 128)[:, None]
    model = MLP((1, 32, 32, 1), activation="silu", head="values")
    losses = model.fit(x, torch.sin(2 * x), steps=400, lr=0.01, batch_size=64)
    assert losses[-1] < 0.01 < losses[0]
    torch.testing.assert_close(model.loss(x, x), F.mse_loss(model(x), x))
    torch.testing.assert_close(model.predict(x), model(x).detach())


def test_signals_keep_their_size_through_depth():
    torch.manual_seed(0)
    x = torch.randn(512, 256)
    for activation in ("relu", "identity"):
        model = MLP([256] * 9, activation=activation, head="values")
        assert 0.4 < model(x).std().item() < 2.5, activation


def test_training_repeats():
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(MLP((2, 4, 2)).fit(XOR, ODD, steps=20, batch_size=2, seed=5))
    assert runs[0] == runs[1]


def test_a_loss_that_explodes_is_named():
    torch.manual_seed(0)
    model = MLP((2, 8, 1), head="values")
    with pytest.raises(ValueError, match="is not finite; lr is 1e\\+20"):
        model.fit(XOR, ODD[:, None].float(), steps=50, lr=1e20, optimizer="sgd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(widths=(3,)), "at least two"),
        (dict(widths=(3, 0, 1)), "each at least 1"),
        (dict(widths=(3, 1), activation="swish9"), "known are relu"),
        (dict(widths=(3, 1), head="rank"), "head is 'rank'"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        MLP(options.pop("widths"), **options)


@pytest.mark.parametrize("options", [dict(batch_size=5), dict(optimizer="newton")])
def test_training_options_that_cannot_be_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MLP((2, 2)).fit(XOR, ODD, **options)


VALUES = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("head", "x", "y", "options", "message"),
    [
        ("classes", XOR[:, :1], ODD, {}, r"x is \(4, 1\); it must be \(N, 2\)"),
        ("classes", XOR[:0], ODD[:0], {}, "N ≥ 1"),
        ("classes", XOR.double(), ODD, {}, "x is torch.float64; the weights are torch.float32"),
        ("classes", XOR * float("nan"), ODD, {}, "x holds a number that is not finite"),
        # Drawn rows would have hidden that there are more labels than points, or fewer.
        ("classes", XOR, ODD[:3], dict(batch_size=2), r"y is \(3,\); for 4 points it must be \(4,"),
        ("classes", XOR[:3], ODD, dict(batch_size=2), r"y is \(4,\); for 3 points it must be \(3,"),
        ("classes", XOR, ODD.float(), {}, "they must be integers"),
        ("classes", XOR, ODD + 1, {}, "a target is 2"),
        ("values", XOR, VALUES[:, 0], {}, r"for 4 points it must be \(4, 2\)"),
        ("values", XOR, VALUES / 0, {}, "y holds a number that is not finite"),
    ],
)
def test_points_that_do_not_fit_are_named(head, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        MLP((2, 4, 2), head=head).fit(x, y, **options)

"""Optimizers hold every parameter once and are what their names say; averages of weights."""

import pytest
import torch

from ponder.models import GPT
from ponder.training import preset
from ponder.training.loop import model_config
from ponder.training.optimizer import Average, Muon, build_optimizer

NAMES = ["muon", "adamw", "adam", "momentum", "sgd"]


def model_and_optimizer(name, **changes):
    config = preset("tiny", optimizer=name, **changes)
    torch.manual_seed(0)
    model = GPT(model_config(config, 16))
    return model, build_optimizer(model, config)


def backward(model):
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(1))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_hold_and_move_every_parameter(name):
    model, optimizer = model_and_optimizer(name, weight_decay=0.1)
    for _ in range(2):  # output projections start at zero: the first step reaches only them
        backward(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not still


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_on_matrices_alone(name):
    model, optimizer = model_and_optimizer(name, weight_decay=0.1)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decays) == len(list(model.parameters()))
    for p in model.parameters():
        assert decays[id(p)] == (0.1 if p.ndim == 2 else 0.0)


def by_hand(name, p, grads, lr):
    """The update rules as their papers write them, in fp64."""
    p, m, v = p.double(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        g = g.double()
        if name in ("sgd", "momentum"):
            m = g if name == "sgd" else 0.9 * m + g
            p = p - lr * m
        else:
            if name == "adam":
                g = g + 0.1 * p
            else:
                p = p - lr * 0.1 * p
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            p = p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-8)
    return p


@pytest.mark.parametrize("name", ["adamw", "adam", "momentum", "sgd"])
def test_updates_are_the_textbook_s(name):
    decay = 0.1 if name.startswith("adam") else 0.0
    model, optimizer = model_and_optimizer(name, weight_decay=decay, lr=0.01)
    weight = model.embed_tokens.weight
    start, grads = weight.detach().clone(), []
    for _ in range(3):
        backward(model)
        grads.append(weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    expected = by_hand(name, start, grads, 0.01)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stacked", [1 << 24, 3000])
def test_muon_in_batches_is_pytorch_s(monkeypatch, stacked):
    # Square, wide and tall ones, with and without a batch that is not whole.
    monkeypatch.setattr("ponder.training.optimizer.MUON_STACK", stacked)
    shapes = [(32, 32)] * 5 + [(16, 48), (48, 16), (16, 48), (1, 7)]
    found = []
    for kind in (torch.optim.Muon, Muon):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = kind(weights, lr=0.02, weight_decay=0.1)
        for _ in range(3):
            for w in weights:
                w.grad = torch.randn_like(w)
            optimizer.step()
        found.append((weights, optimizer.state_dict()["state"]))
    for (i, theirs), ours in zip(enumerate(found[0][0]), found[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # 3 updates, rounded to bf16
        momenta = [state[i]["momentum_buffer"] for _, state in found]
        torch.testing.assert_close(*momenta, rtol=0, atol=0)


def test_two_optimizers_under_one_scaler_unscale_once():
    # A gradient scaler that stepped Muon and AdamW one by one would unscale the second twice.
    def step(scale):
        model, optimizer = model_and_optimizer("muon")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(1))
        scaler.scale(model(tokens[:, :-1], tokens[:, 1:])).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return model

    for (name, a), b in zip(step(1.0).named_parameters(), step(1024.0).parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_an_average_is_the_formula_s_and_leaves_the_weights_as_they_were():
    model, optimizer = model_and_optimizer("sgd", lr=0.5)
    average = Average(model, 0.9)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    for step in range(30):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for n, p in model.named_parameters():
            expected[n] = decay * expected[n] + (1 - decay) * p.detach().double()
    now = {n: p.detach().clone() for n, p in model.named_parameters()}
    with average.shown():
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.double(), expected[n], rtol=1e-5, atol=1e-7, msg=n)
            assert not torch.equal(p, now[n])
    assert all(torch.equal(p, now[n]) for n, p in model.named_parameters())

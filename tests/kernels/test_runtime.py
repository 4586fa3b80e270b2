"""How a launcher is called: directly in eager PyTorch, as an op where something traces the call."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ponder.kernels import norm, rms_norm


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_tracer_sees_the_op_and_eager_calls_do_without(device, monkeypatch):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    with Seen() as seen:
        traced = torch.autograd.grad(rms_norm(x, weight).sum(), (x, weight))
    assert "ponder.norm.default" in seen.names
    assert "ponder.norm_backward.default" in seen.names

    def refused(*_):
        raise AssertionError("the op was called")

    monkeypatch.setattr(norm._norm, "op", refused)
    monkeypatch.setattr(norm._norm_backward, "op", refused)
    eager = torch.autograd.grad(rms_norm(x, weight).sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_a_second_derivative_is_refused(device):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device)
    (first,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiate twice"):
        first.sum().backward()


def test_nor_where_the_calls_are_traced(device):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device)
    with Seen() as seen:
        (first,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
        assert "ponder.norm_backward.default" in seen.names
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            first.sum().backward()

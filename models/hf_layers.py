"""The forwards that `patch` puts into norms and MLPs of Transformers' models.

Each class goes in front of a module's own in a new subclass, so that super() is the module's own
forward: it computes what a kernel would compute differently.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..kernels import gated_mlp, layer_norm, mlp, rms_norm
from .layers import hooked, readable


def epsilon(norm: nn.Module) -> Any:
    """The epsilon of an RMSNorm, by either of its names in Transformers."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def identity(function: Any) -> Any:
    """What tells an activation from others: where it is a module (each MLP has one), its class and
    nn.GELU's setting."""
    if isinstance(function, nn.Module):
        return type(function), getattr(function, "approximate", None)
    return function


class RMSNorm(nn.Module):
    """Weights times the normalized input, as in Llama."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Any:
        if x.dtype != self.weight.dtype:  # which dtype comes out then differs between models
            return super().forward(x)
        return rms_norm(x, self.weight, eps=epsilon(self))


class OffsetRMSNorm(nn.Module):
    """One plus the weights, as in Gemma."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Any:
        return rms_norm(x, 1.0 + self.weight.float(), eps=epsilon(self))


class LayerNorm(nn.Module):
    """PyTorch's own."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    eps: float

    def forward(self, x: Tensor) -> Any:
        if x.dtype != self.weight.dtype:
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class Parts(NamedTuple):
    """What an MLP is made of, by the names in the module, and its activation as it was proven."""

    projections: tuple[str, ...]
    function: str
    dropout: str | None  # of what comes out
    activation: str  # our name of the function
    proven: Any  # what `identity` gave for it

    @classmethod
    def of(cls, module: nn.Module) -> "Parts | None":
        """Those of a module with two or three matrices, one other function, and at most one
        dropout, in the order of their registration; its activation is not looked into yet."""
        children = dict(module.named_children())
        weights = {name: getattr(m, "weight", None) for name, m in children.items()}
        matrices = [n for n, w in weights.items() if isinstance(w, Tensor) and w.ndim == 2]
        dropouts = [name for name, m in children.items() if isinstance(m, nn.Dropout)]
        own = [n for n, x in vars(module).items() if callable(x) and n[0] != "_" and n != "forward"]
        functions = [*(children.keys() - matrices - set(dropouts)), *own]
        grows = isinstance(module, nn.Sequential)  # what is appended would not be called
        if grows or len(matrices) not in (2, 3) or len(functions) != 1 or len(dropouts) > 1:
            return None
        return cls(tuple(matrices), functions[0], dropouts[0] if dropouts else None, "", None)


class FusedMLP(nn.Module):
    """What the MLPs share: the kernel, where their weights may be read and the activation is still
    the one that was proven."""

    ponder_parts: Parts

    def forward(self, *inputs: Any, **options: Any) -> Any:
        parts = self.ponder_parts
        function = getattr(self, parts.function)
        projections = [getattr(self, name) for name in parts.projections]
        other = identity(function) != parts.proven
        other = other or (isinstance(function, nn.Module) and hooked(function))
        if other or options or len(inputs) != 1 or not readable(*projections):
            return super().forward(*inputs, **options)
        weights = [p.weight if isinstance(p, nn.Linear) else p.weight.t() for p in projections]
        y = self.compute(inputs[0], weights, [p.bias for p in projections])
        return y if parts.dropout is None else getattr(self, parts.dropout)(y)

    def compute(self, x: Tensor, weights: Any, biases: Any) -> Tensor:
        """What the kernel gives for x (..., C) and the projections' weights, as Linear's lie."""
        raise NotImplementedError


class PlainMLP(FusedMLP):
    """Up and down: GPT-2's (whose matrices lie the other way round), Phi's, GPT-NeoX's."""

    def compute(self, x: Tensor, weights: Any, biases: Any) -> Tensor:
        named = dict(zip(("b_up", "b_down"), biases, strict=True))
        return mlp(x, *weights, activation=self.ponder_parts.activation, **named)


class JoinedMLP(FusedMLP):
    """Gate and up in one matrix, and down: Phi-3's."""

    def compute(self, x: Tensor, weights: Any, biases: Any) -> Tensor:
        (both, down), (b_both, b_down) = weights, biases
        gate, up = both.chunk(2)
        b_gate, b_up = (None, None) if b_both is None else b_both.chunk(2)
        named: dict[str, Any] = dict(b_gate=b_gate, b_up=b_up, b_down=b_down)
        return gated_mlp(x, gate, up, down, activation=self.ponder_parts.activation, **named)


class GatedMLP(FusedMLP):
    """Gate, up and down: Llama's."""

    def compute(self, x: Tensor, weights: Any, biases: Any) -> Tensor:
        named = dict(zip(("b_gate", "b_up", "b_down"), biases, strict=True))
        return gated_mlp(x, *weights, activation=self.ponder_parts.activation, **named)

"""The forwards that `patch` puts into norms and MLPs of Transformers' models.

Each class goes in front of a module's own in a new subclass, so that super() is the module's own
forward: it computes what a kernel would compute differently. The MLPs name their projections and
their activation's function; `ponder_activation` is our name of that function, and `ponder_function`
what `identity` gave for it when it was proven.
"""

from typing import Any

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


class FusedMLP(nn.Module):
    """What the MLPs share: the kernel, where their weights may be read and the activation is still
    the one that was proven."""

    PROJECTIONS: tuple[str, ...]
    FUNCTION: str
    ponder_activation: str
    ponder_function: Any

    def forward(self, x: Tensor) -> Any:
        function = getattr(self, self.FUNCTION)
        proven = identity(function) == type(self).ponder_function  # by self it would be a method
        projections = (getattr(self, name) for name in self.PROJECTIONS)
        whole = not (isinstance(function, nn.Module) and hooked(function))
        if not (proven and whole and readable(*projections)):
            return super().forward(x)
        return self.ponder_forward(x)

    def ponder_forward(self, x: Tensor) -> Tensor:
        """What the kernel gives for x (..., C)."""
        raise NotImplementedError


class GatedMLP(FusedMLP):
    """Llama's: gate_proj, up_proj and down_proj."""

    PROJECTIONS = "gate_proj", "up_proj", "down_proj"
    FUNCTION = "act_fn"
    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def ponder_forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        biases = dict(b_gate=gate.bias, b_up=up.bias, b_down=down.bias)
        weights = gate.weight, up.weight, down.weight
        return gated_mlp(x, *weights, activation=self.ponder_activation, **biases)


class JoinedMLP(FusedMLP):
    """Phi-3's: gate and up in one matrix."""

    PROJECTIONS = "gate_up_proj", "down_proj"
    FUNCTION = "activation_fn"
    gate_up_proj: Any
    down_proj: Any

    def ponder_forward(self, x: Tensor) -> Tensor:
        both, down = self.gate_up_proj, self.down_proj
        gate, up = both.weight.chunk(2)
        b_gate, b_up = (None, None) if both.bias is None else both.bias.chunk(2)
        biases: dict[str, Any] = dict(b_gate=b_gate, b_up=b_up, b_down=down.bias)
        return gated_mlp(x, gate, up, down.weight, activation=self.ponder_activation, **biases)


class Conv1DMLP(FusedMLP):
    """GPT-2's, whose matrices lie the other way round."""

    PROJECTIONS = "c_fc", "c_proj"
    FUNCTION = "act"
    c_fc: Any
    c_proj: Any
    dropout: Any

    def ponder_forward(self, x: Tensor) -> Tensor:
        up, down = self.c_fc, self.c_proj
        weights, biases = (up.weight.t(), down.weight.t()), dict(b_up=up.bias, b_down=down.bias)
        return self.dropout(mlp(x, *weights, activation=self.ponder_activation, **biases))

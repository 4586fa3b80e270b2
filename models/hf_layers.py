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


def _as_proven(mlp: Any) -> bool:
    """Whether the weights may be read, and the activation is still the one that was proven."""
    function = getattr(mlp, mlp.FUNCTION)
    if identity(function) != type(mlp).ponder_function:
        return False
    projections = (getattr(mlp, name) for name in mlp.PROJECTIONS)
    return readable(*projections) and not (isinstance(function, nn.Module) and hooked(function))


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


class GatedMLP(nn.Module):
    """Llama's: gate_proj, up_proj and down_proj."""

    PROJECTIONS = "gate_proj", "up_proj", "down_proj"
    FUNCTION = "act_fn"
    ponder_activation: str
    ponder_function: Any
    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: Tensor) -> Any:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not _as_proven(self):
            return super().forward(x)
        return gated_mlp(
            x,
            gate.weight,
            up.weight,
            down.weight,
            activation=self.ponder_activation,
            b_gate=gate.bias,
            b_up=up.bias,
            b_down=down.bias,
        )


class JoinedMLP(nn.Module):
    """Phi-3's: gate and up in one matrix."""

    PROJECTIONS = "gate_up_proj", "down_proj"
    FUNCTION = "activation_fn"
    ponder_activation: str
    ponder_function: Any
    gate_up_proj: Any
    down_proj: Any

    def forward(self, x: Tensor) -> Any:
        both, down = self.gate_up_proj, self.down_proj
        if not _as_proven(self):
            return super().forward(x)
        gate, up = both.weight.chunk(2)
        b_gate, b_up = (None, None) if both.bias is None else both.bias.chunk(2)
        return gated_mlp(
            x,
            gate,
            up,
            down.weight,
            activation=self.ponder_activation,
            b_gate=b_gate,
            b_up=b_up,
            b_down=down.bias,
        )


class Conv1DMLP(nn.Module):
    """GPT-2's, whose matrices lie the other way round."""

    PROJECTIONS = "c_fc", "c_proj"
    FUNCTION = "act"
    ponder_activation: str
    ponder_function: Any
    c_fc: Any
    c_proj: Any
    dropout: Any

    def forward(self, x: Tensor) -> Any:
        up, down = self.c_fc, self.c_proj
        if not _as_proven(self):
            return super().forward(x)
        y = mlp(
            x,
            up.weight.t(),
            down.weight.t(),
            activation=self.ponder_activation,
            b_up=up.bias,
            b_down=down.bias,
        )
        return self.dropout(y)

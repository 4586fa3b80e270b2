"""The modules that GPT is built of, each a thin `nn.Module` over one function of `kernels/`.

They stand in for PyTorch's, Liger's and Transformers' modules of the same name: the same order of
arguments, as far as they go, and the same parameters in a state dict.

Shapes: B sequences, T tokens, C model width, H query heads, G key-value heads, D head width.
Parameter names are Transformers' own for Llama and Qwen3, so checkpoints need no renaming.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import (
    attention,
    gated_mlp,
    layer_norm,
    linear_cross_entropy,
    mlp,
    rms_norm,
    rotary,
)
from ..kernels._activations import activated
from .cache import LayerCache


def hooked(module: nn.Module) -> bool:
    """Whether something looks on when the module is called, or stands in for its forward."""
    m = module
    hooks = m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks
    return any(hooks) or "forward" in vars(m)


def readable(*modules: nn.Module) -> bool:
    """Whether a kernel may read the weights of these modules instead of calling them.

    True of a plain Linear (or Transformers' Conv1D) or RMSNorm, False where something else computes
    its output: an adapter (LoRA), quantized or distributed weights, a hook that fetches them or
    looks on.
    """
    for m in modules:
        plain = type(m) in (nn.Linear, RMSNorm) or type(m).__name__ == "Conv1D"
        if not plain or hooked(m):
            return False
        # torchao's weights, and DTensor's, are subclasses of Tensor in a Linear like any other.
        if type(m.weight) not in (nn.Parameter, Tensor):
            return False
    return True


class RMSNorm(nn.Module):
    """Root mean square normalization over the last dimension, with an optional residual add.

    In the place of torch.nn.RMSNorm(width, eps) and LigerRMSNorm(width, eps).
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """x (..., C) → y (..., C), or (y, x + residual) where a residual (..., C) is given."""
        return rms_norm(x, self.weight, eps=self.eps, residual=residual)


class LayerNorm(nn.Module):
    """Layer normalization over the last dimension, with an optional residual add.

    In the place of torch.nn.LayerNorm(width, eps) and LigerLayerNorm(width, eps).
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """x (..., C) → y (..., C), or (y, x + residual) where a residual (..., C) is given."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary positions over a longer context (Grattafiori et al. 2024).

    Frequencies that turn more than `high` times over the original context stay, those that turn
    less than `low` times are divided by `factor`, and between the two it is a blend.
    """

    factor: float
    original_context: int
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self):
        if not (1 <= self.factor < math.inf and 0 < self.low < self.high < math.inf):
            raise ValueError(
                f"rotary scaling has factor {self.factor}, low {self.low} and high {self.high}; "
                "it must have a factor of at least 1 and 0 < low < high"
            )
        if self.original_context < 1:
            raise ValueError(f"original_context is {self.original_context}; it must be at least 1")

    def __call__(self, frequency: Tensor) -> Tensor:
        """The frequencies, in radians a position, after the stretching."""
        turns = self.original_context * frequency / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


class Rotary(nn.Module):
    """The cosines and sines of rotary positions 0 … context − 1, fp32, (context, D/2) each.

    Su et al. 2021, "RoFormer", with Llama's pairing of dimension i with i + D/2.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        context: int,
        theta: float = 10000.0,
        scaling: RopeScaling | None = None,
    ):
        super().__init__()
        self.head_dim, self.context, self.theta, self.scaling = head_dim, context, theta, scaling
        for name in ("cos", "sin"):
            table = torch.empty(context, head_dim // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        if not self.cos.is_meta:
            self.reset()

    def reset(self, device: torch.device | str | None = None) -> None:
        """Compute the tables (on `device`; default where they are)."""
        device = self.cos.device if device is None else device
        step = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu")
        position = torch.arange(self.context, dtype=torch.float64, device="cpu")
        frequency = self.theta ** -(step / self.head_dim)
        if self.scaling is not None:
            frequency = self.scaling(frequency)
        angle = torch.outer(position, frequency)
        self.cos, self.sin = angle.cos().float().to(device), angle.sin().float().to(device)

    def _apply(self, fn, recurse=True):
        """As nn.Module's, but `model.to(torch.bfloat16)` leaves the tables fp32, and `to_empty`,
        which a model of the meta device is given memory by, computes them: no checkpoint does."""
        tables = self.cos, self.sin
        super()._apply(fn, recurse)
        if tables[0].is_meta and not self.cos.is_meta:
            self.reset()
        elif self.cos.dtype != torch.float32:
            self.cos, self.sin = (table.to(self.cos.device) for table in tables)
        return self

    def forward(self, positions: Tensor | int) -> tuple[Tensor, Tensor]:
        """The rows of `positions` (B, T), or of the first so many positions."""
        index = positions if isinstance(positions, Tensor) else slice(positions)
        return self.cos[index], self.sin[index]


class Attention(nn.Module):
    """Causal self-attention with grouped heads, optional QK-norm, and rotary positions or none.

    bias: of all four projections; qkv_bias: of all but the last, as in Qwen2.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        *,
        qk_norm: bool = False,
        bias: bool = False,
        qkv_bias: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim
        qkv_bias = bias or qkv_bias
        self.q_proj = nn.Linear(width, n_head * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(width, n_kv_head * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(width, n_kv_head * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(n_head * head_dim, width, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) → (B, T, C); with a cache, the T tokens follow what it holds.

        rope: what `Rotary` gives for the tokens' positions; None: queries and keys are not turned.
        segment_ids (B, T), without a cache: a token attends to its own segment alone.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        norms: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            a, b = self.q_norm, self.k_norm
            if rope is not None and a.eps == b.eps and readable(a, b):
                norms = dict(q_norm=a.weight, k_norm=b.weight, eps=a.eps)
            else:
                q, k = a(q), b(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if rope is not None:
            q, k = rotary(q, k, *rope, **norms)
        if cache is None:
            y = attention(q, k, v, causal=True, segment_ids=segment_ids)
        else:
            y = cache.attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), the activation fused into the products. Shazeer 2020."""

    def __init__(self, width: int, inner: int, activation: str = "silu", *, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) → (..., C)."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not readable(gate, up, down):
            return down(activated(self.activation, gate(x), up(x)))
        return gated_mlp(
            x,
            gate.weight,
            up.weight,
            down.weight,
            activation=self.activation,
            b_gate=gate.bias,
            b_up=up.bias,
            b_down=down.bias,
        )


class MLP(nn.Module):
    """down(act(up(x))), the activation fused into the product."""

    def __init__(self, width: int, inner: int, activation: str = "relu2", *, bias: bool = False):
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) → (..., C)."""
        up, down = self.up_proj, self.down_proj
        if not readable(up, down):
            return down(activated(self.activation, up(x)))
        return mlp(
            x, up.weight, down.weight, activation=self.activation, b_up=up.bias, b_down=down.bias
        )


class LinearCrossEntropyLoss(nn.Module):
    """Cross-entropy of a head's logits, never all held at once: see `linear_cross_entropy`.

    It takes the head's weight with each call, as LigerFusedLinearCrossEntropyLoss does, so that
    the head may be tied to the embedding.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        z_loss: float = 0.0,
    ):
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.softcap, self.z_loss = label_smoothing, softcap, z_loss

    def forward(
        self,
        weight: Tensor,
        x: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        reduction: str | None = None,
    ) -> Tensor:
        """weight (V, C), x (..., C), targets (...) → the loss in nats, reduced as the module says,
        or as `reduction` does."""
        return linear_cross_entropy(
            x,
            weight,
            targets,
            bias=bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction if reduction is None else reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )

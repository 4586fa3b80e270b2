"""The modules that GPT is built of, each a thin `nn.Module` over one function of `kernels/`.

Shapes: B sequences, T tokens, C model width, H query heads, G key-value heads, D head width.
Parameter names are Transformers' own for Llama and Qwen3, so checkpoints need no renaming.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import attention, decode_attention, gated_mlp, mlp, rms_norm, rotary


class RMSNorm(nn.Module):
    """Root mean square normalization over the last dimension, with an optional residual add."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """y, or (y, x + residual) where a residual is given."""
        return rms_norm(x, self.weight, eps=self.eps, residual=residual)


class Rotary(nn.Module):
    """The cosines and sines of rotary positions 0 … context − 1, fp32, (context, D/2) each.

    Su et al. 2021, "RoFormer", with Llama's pairing of dimension i with i + D/2.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context: int, theta: float = 10000.0):
        super().__init__()
        self.head_dim, self.context, self.theta = head_dim, context, theta
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
        angle = torch.outer(position, self.theta ** -(step / self.head_dim))
        self.cos, self.sin = angle.cos().float().to(device), angle.sin().float().to(device)

    def _apply(self, fn, recurse=True):
        """As nn.Module's, but `model.to(torch.bfloat16)` leaves the tables fp32."""
        tables = self.cos, self.sin
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = (table.to(self.cos.device) for table in tables)
        return self

    def forward(self, positions: Tensor | int) -> tuple[Tensor, Tensor]:
        """The rows of `positions` (B, T), or of the first so many positions."""
        index = slice(positions) if isinstance(positions, int) else positions
        return self.cos[index], self.sin[index]


class Attention(nn.Module):
    """Causal self-attention with grouped heads, rotary positions and optional QK-norm."""

    def __init__(
        self,
        width: int,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        *,
        qk_norm: bool = False,
        bias: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim
        self.q_proj = nn.Linear(width, n_head * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, n_kv_head * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, n_kv_head * head_dim, bias=bias)
        self.o_proj = nn.Linear(n_head * head_dim, width, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: "LayerCache | None" = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) → (B, T, C); with a cache, the T tokens follow what it holds.

        segment_ids (B, T), without a cache: a token attends to its own segment alone.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary(q.transpose(1, 2), k.transpose(1, 2), *rope)
        if cache is None:
            y = attention(q, k, v, causal=True, segment_ids=segment_ids)
        else:
            y = cache.attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class LayerPrefix(NamedTuple):
    """One layer's view of a `Prefix`: N groups of rows, each of equally many places."""

    keys: Tensor  # (N, G, P, D)
    values: Tensor
    lengths: Tensor  # (N,)
    order: Tensor  # the row at each place
    place: Tensor  # (B,), the place of each row
    place_lengths: Tensor  # the row's own length at each place, the new tokens included

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (B, H, T, D) against each row's prefix and its own keys and values (B, G, S, D): in
        the order of the places, where the own ones are pages of a row each."""
        y = decode_attention(
            q[self.order],
            keys,
            values,
            self.place_lengths,
            prefix=(self.keys, self.values),
            prefix_lengths=self.lengths,
            block_table=self.order[:, None].int(),
        )
        return y[self.place]


class LayerCache:
    """One layer's view of a KVCache during one forward pass."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        index: Tensor | None,
        prefix: LayerPrefix | None = None,
    ):
        self.keys, self.values = keys, values  # (B, G, S, D), contiguous
        self.lengths = lengths  # (B,), the new tokens included
        self.index = index  # where they go, among the B·G·S positions; None: in front
        self.prefix = prefix

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the T new keys and values at each row's own position, then attend."""
        self.write(k, v)
        if self.index is None:
            return attention(q, k, v, causal=True)
        if self.prefix is not None:
            return self.prefix.attend(q, self.keys, self.values)
        return decode_attention(q, self.keys, self.values, self.lengths)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put the new keys and values (B, G, T, D) where they belong."""
        T, D = k.shape[2:]
        for cache, new in ((self.keys, k), (self.values, v)):
            if self.index is None:
                cache[:, :, :T] = new
            else:
                cache.view(-1, D).index_copy_(0, self.index, new.reshape(-1, D).to(cache.dtype))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), the activation fused into the products. Shazeer 2020."""

    def __init__(self, width: int, inner: int, activation: str = "silu"):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) → (..., C)."""
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return gated_mlp(x, *weights, activation=self.activation)


class MLP(nn.Module):
    """down(act(up(x))), the activation fused into the product."""

    def __init__(self, width: int, inner: int, activation: str = "relu2"):
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) → (..., C)."""
        return mlp(x, self.up_proj.weight, self.down_proj.weight, activation=self.activation)

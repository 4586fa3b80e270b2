"""Decoder: a GPT's weights laid out for sampling on a CPU, and its forward pass over them.

The same function as `GPT.hidden` and `GPT.logits`, in half as many operations: norm weights are
folded into the matrices behind them, q, k and v are one product, matrices are packed once, and all
of it is written as one function. What that brings is in benchmarks/NOTES.md, "Sampling".

A row's numbers do not depend on where it stands in the batch, bit for bit, whatever the number of
threads, as long as the number of rows is a multiple of `ROWS` and the model's widths are of 4; what
that takes is said where it is done.
Shapes: B rows, T tokens, M = B · T, C width, H query heads, G key-value heads, D head width.
"""

import time
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels._activations import ACTIVATIONS
from ..kernels.decode_attention import CPU_ROWS, CPU_SPLIT
from ..models import GPT, KVCache
from ..models.cache import LayerCache

# MKL takes other paths, with other roundings, for the last rows of a product (seen: of 2, 5, 7 and
# 31 rows), and on some numbers of threads for every fourth row where the columns are not a multiple
# of 4 (seen: 37, 54).
ROWS, COLUMNS = 8, 16
CPU_BLOCK = 64  # rows of an engine's blocks on a CPU, which threads take side by side
# PyTorch hands a thread at least so many numbers of an elementwise operation, and treats what
# remains of its share behind multiples of two vectors one by one, with another exponential.
GRAIN, VECTORS = 32768, 64


@torch.inference_mode()
def bf16_pays(model: GPT, rows: int) -> bool:
    """Whether this CPU decodes so many rows in bf16 in less than 0.8 of fp32's time; False for a
    model that no Decoder can be made of."""
    if not model.config.llama_like:
        return False
    length = min(64, model.config.context)
    rows = min(rows, 1024)  # more are as fast, each
    tokens = torch.zeros(-(-rows // ROWS) * ROWS, 1, dtype=torch.int64)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(model, dtype)
        cache = KVCache(model.config, len(tokens), length, dtype=dtype)
        cache.empty = False
        times = []
        for _ in range(6):
            start = time.perf_counter()
            decoder.hidden(tokens, cache)
            times.append(time.perf_counter() - start)
        seconds[dtype] = sorted(times[1:])[2]
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


class Decoder:
    """`hidden(tokens, cache)` and `logits(hidden)` of a GPT on CPU, without gradients.

    dtype, fp32 or bf16, is that of the matrices, of their inputs and of the cache; the residual
    stream, norms, rotary angles and softmax are fp32. The weights are copied: a Decoder shows the
    model as it was.
    """

    def __init__(self, model: GPT, dtype: torch.dtype = torch.float32):
        self.config, self.dtype = model.config, dtype
        self.rotary = model.rotary
        self.activation = ACTIVATIONS[model.config.activation]
        self.embedding = model.embed_tokens.weight.detach().to(torch.float32, copy=True)
        # A norm divides by the root of the sum, not of the mean, so √C goes into the weights.
        root, head_root = model.config.n_embd**0.5, model.config.head_dim**0.5

        def matrix(*weights: Tensor, norm: Tensor | None = None) -> Tensor:
            joined = torch.cat(weights).detach().float()
            if norm is not None:
                joined = joined * (norm.detach().float() * root)
            return _packed(joined.to(dtype))

        self.layers = []
        for block in cast(Iterable[Any], model.layers):
            attend, mlp = block.self_attn, block.mlp
            projections = attend.q_proj, attend.k_proj, attend.v_proj
            norm, mlp_norm = block.input_layernorm.weight, block.post_attention_layernorm.weight
            qkv = matrix(*(p.weight for p in projections), norm=norm)
            bias = out_bias = head_norm = None
            if attend.q_proj.bias is not None:
                bias = torch.cat([p.bias for p in projections]).detach().float()
                out_bias = attend.o_proj.bias.detach().float().clone()
            if attend.q_norm is not None:
                norms = [attend.q_norm.weight] * attend.n_head
                norms += [attend.k_norm.weight] * attend.n_kv_head
                head_norm = torch.stack(norms).detach().float() * head_root
            gate = matrix(mlp.gate_proj.weight, norm=mlp_norm) if model.config.gated else None
            up, down = matrix(mlp.up_proj.weight, norm=mlp_norm), matrix(mlp.down_proj.weight)
            out = matrix(attend.o_proj.weight)
            self.layers.append((qkv, bias, head_norm, out, out_bias, gate, up, down))
        head = torch.nn.functional.pad(
            model.lm_head.weight.detach(), (0, 0, 0, -model.config.vocab_size % COLUMNS)
        )
        self.head = matrix(head, norm=model.norm.weight)

    def hidden(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """tokens (B, T) → (B, T, C), as `GPT.hidden`, before the final norm."""
        c, (B, T) = self.config, tokens.shape
        n_head, n_kv_head, head_dim = c.n_head, c.n_kv_head, c.head_dim
        n_qk = n_head + n_kv_head
        positions = None if cache.empty else cache.positions(T)
        cos, sin = self.rotary(T if positions is None else positions)
        cos, sin = torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)
        h = self.embedding[tokens.flatten()]
        views = cache.views(positions, T)
        unseen = None if positions is None else self._unseen(cache, T)
        for (qkv, bias, head_norm, out, out_bias, gate, up, down), view in zip(
            self.layers, views, strict=True
        ):
            y = _product(self._normed(h), qkv).float()
            if bias is not None:
                y += bias
            y = y.view(B, T, -1, head_dim)
            qk, v = y[:, :, :n_qk], y[:, :, n_qk:]
            if head_norm is not None:
                qk = self._unit(qk).mul_(head_norm)
            # Products and sums apart: a fused one may be rounded otherwise in a vector's remainder.
            turned = torch.cat((qk[..., head_dim // 2 :], qk[..., : head_dim // 2]), -1).mul_(sin)
            q, k = turned.add_(qk * cos).transpose(1, 2).split((n_head, n_kv_head), 1)
            v = v.transpose(1, 2)
            if unseen is None:
                y = view.attend(q, k, v)
            else:
                view.write(k, v)
                y = self._attend(q, view, unseen)
            h += _product(y.transpose(1, 2).reshape(B * T, -1).to(self.dtype), out)
            if out_bias is not None:
                h += out_bias
            y = self._normed(h)
            z = self._activated(_product(y, up if gate is None else gate))
            h += _product(z if gate is None else z.mul_(_product(y, up)), down)
        cache.empty = False
        return h.view(B, T, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) → (..., V) in fp32, as `GPT.logits`, the final norm included."""
        logits = _product(self._normed(hidden), self.head)
        return logits[..., : self.config.vocab_size].float()

    def _unseen(self, cache: KVCache, T: int) -> Tensor:
        """(B, 1, T, S + P): −inf where a token must not look, of its row's own positions and of its
        prefix's; else 0."""
        own = cache.lengths[:, None] + torch.arange(T)
        hidden = torch.arange(cache.capacity) > own[..., None]
        if cache.prefix is not None:
            beyond = torch.arange(cache.prefix.capacity) >= cast(Tensor, cache.offsets())[:, None]
            hidden = torch.cat((hidden, beyond[:, None].expand(-1, T, -1)), -1)
        zeros = torch.zeros(hidden.shape, dtype=self.dtype)
        return zeros.masked_fill_(hidden, -torch.inf)[:, None]

    def _attend(self, q: Tensor, view: LayerCache, unseen: Tensor) -> Tensor:
        """decode_attention in products of the cache's dtype, which that has only on a GPU: in bf16
        half as long (256 products of 2 × 32 × 96: 0.3 ms against 0.7); and with products of a
        prefix whose shape is the same however many rows share it."""
        B, H, T, D = q.shape
        keys, values = view.keys.flatten(0, 1), view.values.flatten(0, 1)
        S = keys.shape[1]
        queries = (q * D**-0.5).to(self.dtype).reshape(len(keys), -1, D)
        scores = torch.bmm(queries, keys.mT).view(B, H, T, S)
        if view.prefix is None:
            weights = scores.add_(unseen).softmax(-1)
            return _weighted(weights.view(len(keys), -1, S), values).view(q.shape)
        p = view.prefix
        N, G, P = p.keys.shape[:3]

        def to_places(x: Tensor) -> Tensor:
            """(B, H, T, n) → (N · G, width · H/G · T, n)"""
            x = x[p.order].view(N, -1, G, H // G * T, x.shape[-1])
            return x.transpose(1, 2).reshape(N * G, -1, x.shape[-1])

        def to_rows(x: Tensor) -> Tensor:
            """Back again."""
            x = x.view(N, G, -1, H // G * T, x.shape[-1]).transpose(1, 2)
            return x.reshape(-1, H, T, x.shape[-1])[p.place]

        prefix_scores = torch.bmm(to_places(queries.view(B, H, T, D)), p.keys.flatten(0, 1).mT)
        scores = torch.cat((scores, to_rows(prefix_scores)), -1).add_(unseen)
        own, shared = scores.softmax(-1).split((S, P), -1)
        out = _weighted(own.reshape(len(keys), -1, S), values).view(q.shape)
        return out + to_rows(_weighted(to_places(shared), p.values.flatten(0, 1)))

    def _unit(self, x: Tensor) -> Tensor:
        """x / sqrt(sum(x²) + n eps), n the last dimension: its RMS norm over √n."""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return x * squares.add_(x.shape[-1] * self.config.norm_eps).rsqrt_()

    def _normed(self, x: Tensor) -> Tensor:
        return self._unit(x).to(self.dtype)

    def _activated(self, x: Tensor) -> Tensor:
        """activation(x), of which each thread gets whole vectors."""
        share = VECTORS * min(torch.get_num_threads(), -(-x.numel() // GRAIN))
        if not x.numel() % share:
            return self.activation(x)
        padded = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % share))
        return self.activation(padded)[: x.numel()].view(x.shape)


def _packed(matrix: Tensor) -> Tensor:
    """A matrix (out, in) as `_product` reads it fastest: with oneDNN in blocks, which spares a copy
    in each product (32 rows of 256 × 768: bf16 116 µs against 154, fp32 164 against 204)."""
    if not torch.backends.mkldnn.is_available():
        return matrix.clone()
    return torch.ops.mkldnn._reorder_linear_weight(matrix, CPU_BLOCK)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x (..., in) → (..., out)"""
    if matrix.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    return torch.nn.functional.linear(x, matrix)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """weights (n, i, S) values (n, S, D), summed in an order that S does not change."""
    rows, S = weights.shape[1:]
    if rows < CPU_ROWS or S <= CPU_SPLIT:
        return torch.bmm(weights, values)
    out = torch.bmm(weights[..., :CPU_SPLIT], values[:, :CPU_SPLIT])
    for split in range(CPU_SPLIT, S, CPU_SPLIT):
        part = slice(split, split + CPU_SPLIT)
        out.baddbmm_(weights[..., part], values[:, part])
    return out

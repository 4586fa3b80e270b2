"""Decoder: a GPT's forward pass for sampling on a CPU, in C (`decoder.c`), over packed weights.

The same function as `GPT.hidden` and `GPT.logits`. A decode step is hundreds of short operations,
of which PyTorch's own cost as much as the arithmetic; in C a thread takes its rows through all
layers. A row's numbers do not depend, bit for bit, on what else is computed, on the number of rows,
of threads, or of positions that there is room for. What it brings is in benchmarks/NOTES.md.
"""

import ctypes
import time
from collections.abc import Iterable
from ctypes import c_float, c_int64, c_void_p
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import ACTIVATIONS
from ..kernels._native import library
from .cache import KVCache
from .gpt import GPT, Block
from .layers import MLP, Attention, GatedMLP, LayerNorm, RMSNorm, Rotary, hooked, readable

DTYPES = torch.float32, torch.bfloat16
# What a GPT is made of, besides Linear.
OWN = Block, Attention, GatedMLP, MLP, RMSNorm, LayerNorm, Rotary, nn.Embedding, nn.ModuleList
SOURCE = Path(__file__).with_name("decoder.c")
TELLING = 128 * 2**20  # bytes of fp32 weights: more than a CPU's caches hold


def fits(model: Any, dtype: torch.dtype) -> bool:
    """Whether a Decoder can be made of the model: a GPT itself, no class of one's own, with nothing
    put into it (adapters, hooks), in fp32 or bf16, on a machine with a C compiler."""
    if type(model) is not GPT or dtype not in DTYPES:
        return False
    parts = [m for part in model.children() if part is not model.loss for m in part.modules()]
    plain = all(type(m) in OWN and not hooked(m) or readable(m) for m in parts)
    return plain and library(SOURCE) is not None


@torch.inference_mode()
def bf16_pays(model: GPT, rows: int) -> bool:
    """Whether this CPU decodes so many rows in bf16 in less than 0.8 of fp32's time; False for a
    model that no Decoder can be made of."""
    if not fits(model, torch.bfloat16):
        return False
    c = model.config
    length = min(64, c.context)
    # Layers of the same shape, as many as show what their weights' way from memory costs.
    layers = min(c.n_layer, max(1, TELLING * c.n_layer // (4 * c.layer_weights)))
    shape = replace(c, n_layer=layers, vocab_size=1, context=length, nope_layers=())
    part = GPT(shape)
    tokens = torch.zeros(min(rows, 1024), 1, dtype=torch.int64)  # more are as fast, each
    seconds = {}
    for dtype in DTYPES:
        decoder = Decoder(part, dtype)
        cache = KVCache(shape, len(tokens), length, dtype=dtype)
        cache.empty = False
        times = []
        for _ in range(6):
            start = time.perf_counter()
            decoder.hidden(tokens, cache)
            times.append(time.perf_counter() - start)
        seconds[dtype] = sorted(times[1:])[2]
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


class Matrix(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("in", c_int64), ("out", c_int64)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("norm", "norm_bias", "mlp_norm", "mlp_norm_bias")),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        *((name, Matrix) for name in ("qkv", "o", "gate", "up", "down")),
        ("turned", c_int64),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("n_layer", "n_head", "n_kv_head", "head_dim")),
        *((name, c_int64) for name in ("width", "inner", "vocabulary", "context", "outputs")),
        *((name, c_int64) for name in ("activation", "gated", "layer_norm", "half")),
        *((name, c_void_p) for name in ("embedding", "positions", "cos", "sin")),
        *((name, c_void_p) for name in ("norm", "norm_bias")),
        ("eps", c_float),
        ("layers", ctypes.POINTER(Layer)),
        ("head", Matrix),
    ]


class Pass(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("sequences", "tokens")),
        *((name, c_void_p) for name in ("token", "row", "length", "keys", "values")),
        *((name, c_int64) for name in ("rows", "capacity")),
        *((name, c_void_p) for name in ("prefix_keys", "prefix_values")),
        *((name, c_int64) for name in ("groups", "prefix_capacity", "prefix_width")),
        *((name, c_void_p) for name in ("place", "prefix_length", "hidden")),
        ("threads", c_int64),
    ]


class Draws(ctypes.Structure):
    _fields_ = [
        ("logits", c_void_p),
        *((name, c_int64) for name in ("rows", "n")),
        *((name, c_void_p) for name in ("temperature", "top_p", "min_p")),
        *((name, c_void_p) for name in ("top_k", "seed", "position", "token", "logprob")),
        ("threads", c_int64),
    ]


class Decoder:
    """`hidden(tokens, cache)` and `logits(hidden)` of a GPT on CPU, without gradients.

    dtype, fp32 or bf16, is that of the matrices, of their inputs and of the cache; all else is
    fp32. head: what is in the place of the model's own. The weights are copied: a Decoder shows the
    model as it was.
    """

    def __init__(
        self, model: GPT, dtype: torch.dtype = torch.float32, head: nn.Linear | None = None
    ):
        head = model.lm_head if head is None else head
        c, self.dtype, self.outputs = model.config, dtype, head.out_features
        self.config = c
        found = library(SOURCE)
        assert found is not None
        self.library = found
        self.kept: list[Any] = []  # what C has pointers into
        layers = (Layer * c.n_layer)()
        for layer, block in zip(layers, cast(Iterable[Any], model.layers), strict=True):
            attend, mlp = block.self_attn, block.mlp
            projections = attend.q_proj, attend.k_proj, attend.v_proj
            layer.norm, layer.norm_bias = self._norm(block.input_layernorm)
            layer.mlp_norm, layer.mlp_norm_bias = self._norm(block.post_attention_layernorm)
            if attend.q_norm is not None:
                layer.q_norm = self._floats(attend.q_norm.weight)
                layer.k_norm = self._floats(attend.k_norm.weight)
            layer.qkv = self._matrix(*projections)
            layer.o = self._matrix(attend.o_proj)
            if c.gated:
                layer.gate = self._matrix(mlp.gate_proj)
            layer.up, layer.down = self._matrix(mlp.up_proj), self._matrix(mlp.down_proj)
            layer.turned = block.turned
        self.model = Model(
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_kv_head=c.n_kv_head,
            head_dim=c.head_dim,
            width=c.n_embd,
            inner=c.n_inner,
            vocabulary=c.vocab_size,
            context=c.context,
            outputs=self.outputs,
            activation=list(ACTIVATIONS).index(c.activation),
            gated=c.gated,
            layer_norm=c.norm == "layer",
            half=dtype == torch.bfloat16,
            embedding=self._floats(model.embed_tokens.weight),
            cos=self._floats(model.rotary.cos),
            sin=self._floats(model.rotary.sin),
            eps=c.norm_eps,
            layers=layers,
            head=self._matrix(head),
        )
        self.model.norm, self.model.norm_bias = self._norm(model.norm)
        if c.positions == "learned":
            self.model.positions = self._floats(model.embed_positions.weight)

    def hidden(self, tokens: Tensor, cache: KVCache, rows: Tensor | None = None) -> Tensor:
        """tokens (B, T) → (B, T, C), as `GPT.hidden`, before the final norm. rows (B,), int64:
        which of the cache's they are; None: all."""
        hidden = cache.keys.new_empty(*tokens.shape, self.config.n_embd, dtype=torch.float32)
        self._pass(tokens, cache, rows, hidden)
        return hidden

    def prefill(self, tokens: Tensor, cache: KVCache) -> None:
        """The keys and values of tokens (B, T) alone: less work than `hidden`."""
        self._pass(tokens, cache, None, None)

    def _pass(
        self, tokens: Tensor, cache: KVCache, rows: Tensor | None, hidden: Tensor | None
    ) -> None:
        B, T = tokens.shape
        if cache.keys.dtype != self.dtype or rows is None and len(cache.lengths) != B:
            raise ValueError(
                f"the cache holds {len(cache.lengths)} rows of {cache.keys.dtype}; "
                f"this pass is of {B} in {self.dtype}"
            )
        tokens = tokens.long().contiguous()
        rows = torch.arange(B, device=tokens.device) if rows is None else rows
        length = torch.zeros_like(cache.lengths) if cache.empty else cache.lengths.contiguous()
        work = Pass(
            sequences=B,
            tokens=T,
            token=tokens.data_ptr(),
            row=rows.data_ptr(),
            length=length.data_ptr(),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            rows=len(length),
            capacity=cache.capacity,
            hidden=None if hidden is None else hidden.data_ptr(),
            threads=torch.get_num_threads(),
        )
        prefix = None if cache.empty else cache.prefix
        if prefix is not None:
            work.prefix_keys, work.prefix_values = prefix.keys.data_ptr(), prefix.values.data_ptr()
            work.groups, work.prefix_capacity = prefix.groups, prefix.capacity
            work.prefix_width = prefix.width
            work.place, work.prefix_length = prefix.place.data_ptr(), prefix.lengths.data_ptr()
        self._checked(self.library.hidden(ctypes.byref(self.model), ctypes.byref(work)))
        cache.empty = False

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) → what the head gives, (..., V) in fp32, the final norm included."""
        hidden = hidden.contiguous()
        rows = hidden.numel() // self.config.n_embd
        logits = hidden.new_empty(*hidden.shape[:-1], self.outputs)
        self._checked(
            self.library.logits(
                ctypes.byref(self.model),
                c_void_p(hidden.data_ptr()),
                c_int64(rows),
                c_void_p(logits.data_ptr()),
                c_int64(torch.get_num_threads()),
            )
        )
        return logits

    def sample_tokens(
        self,
        logits: Tensor,
        *,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`kernels.sample_tokens` of logits (B, V) and parameters (B,), which are not looked at."""
        rows, n = logits.shape
        tokens, logprobs = seeds.new_empty(rows), logits.new_empty(rows)
        held = dict(logits=logits, temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
        held |= dict(seed=seeds, position=positions, token=tokens, logprob=logprobs)
        held = {name: x.contiguous() for name, x in held.items()}
        pointers = {name: x.data_ptr() for name, x in held.items()}
        draws = Draws(rows=rows, n=n, threads=torch.get_num_threads(), **pointers)
        self._checked(self.library.draw(ctypes.byref(draws)))
        return tokens, logprobs

    def _checked(self, failed: int) -> None:
        if failed == 1:
            raise torch.OutOfMemoryError("no memory for the activations of a decode step")
        if failed:
            what = "a row is longer than the cache or the context", "a token is not the model's"
            raise ValueError(what[failed - 2])

    def _floats(self, x: Tensor) -> int:
        kept = x.detach().to(torch.float32, copy=True).contiguous()
        self.kept.append(kept)
        return kept.data_ptr()

    def _norm(self, norm: Any) -> tuple[int, int | None]:
        bias = getattr(norm, "bias", None)
        return self._floats(norm.weight), None if bias is None else self._floats(bias)

    def _matrix(self, *linears: nn.Linear) -> Matrix:
        """Their weights one above the other, packed as `decoder.c` reads them."""
        weights = [linear.weight.detach().to(self.dtype) for linear in linears]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        rows, columns = weight.shape
        panel, step = self.library.panel(), self.library.step(self.dtype == torch.bfloat16)
        if columns % step or rows % panel:
            weight = nn.functional.pad(weight, (0, -columns % step, 0, -rows % panel))
        words = weight.contiguous().view(torch.int32)  # a number, or two in bf16
        packed = words.view(-1, panel, words.shape[1]).transpose(1, 2)
        packed = packed.clone(memory_format=torch.contiguous_format)
        self.kept.append(packed)
        bias = None
        if any(linear.bias is not None for linear in linears):
            given = [
                linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
                for linear in linears
            ]
            bias = self._floats(nn.functional.pad(torch.cat(given).float(), (0, -rows % panel)))
        matrix = Matrix(weight=packed.data_ptr(), bias=bias, out=rows)
        setattr(matrix, "in", weight.shape[1])
        return matrix

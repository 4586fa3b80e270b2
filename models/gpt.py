"""GPT: one configurable decoder on the fused kernels.

Pre-norm blocks of attention and MLP around a residual stream:

    h = embed(tokens)
    h = h + attention(norm(h));  h = h + mlp(norm(h))        for each layer
    logits = head(norm(h))

With QK-norm and a gated MLP it is Qwen3 (Qwen team 2025); without QK-norm, Llama (Touvron et al.
2023), with biases Qwen2, with some layers' positions left out SmolLM3; with LayerNorm, learned
positions, a plain MLP and biases everywhere, GPT-2 (Radford et al. 2019).

Shapes: B sequences, T tokens, C = n_embd, V = vocab_size.
"""

from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels import ACTIVATIONS, cross_entropy
from .cache import KVCache, LayerCache
from .layers import (
    MLP,
    Attention,
    GatedMLP,
    LayerNorm,
    LinearCrossEntropyLoss,
    RMSNorm,
    RopeScaling,
    Rotary,
    readable,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Defaults make a model of about 0.8M parameters."""

    vocab_size: int
    context: int = 256  # the longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4  # fewer than n_head: grouped-query attention
    head_dim: int = 32
    n_embd: int = 128
    n_inner: int = 384  # width of the MLP
    gated: bool = True
    activation: str = "silu"
    qk_norm: bool = True
    attention_bias: bool = False
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    norm: str = "rms"  # or "layer": LayerNorm
    positions: str = "rotary"  # or "learned": a table added to the embedding
    qkv_bias: bool = False  # biases of the queries, keys and values alone (attention_bias: of all)
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    nope_layers: tuple[int, ...] = ()  # layers whose attention knows no positions

    def __post_init__(self):
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in (
                *("vocab_size", "context", "n_layer", "n_head", "n_kv_head"),
                *("head_dim", "n_embd", "n_inner"),
            )
            if getattr(self, name) < 1
        ]
        if self.n_kv_head >= 1 and self.n_head % self.n_kv_head:
            problems.append(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2 or not 16 <= self.head_dim <= 256:
            problems.append(f"head_dim is {self.head_dim}; it must be even, 16 to 256")
        if self.activation not in ACTIVATIONS:
            problems.append(
                f"activation is {self.activation!r}; known are {', '.join(ACTIVATIONS)}"
            )
        for name, known in (("norm", ("rms", "layer")), ("positions", ("rotary", "learned"))):
            if getattr(self, name) not in known:
                problems.append(f"{name} is {getattr(self, name)!r}; known are {', '.join(known)}")
        if self.attention_bias and self.qkv_bias:
            problems.append(
                "attention_bias and qkv_bias are both true; the first implies the other"
            )
        if self.positions == "learned" and (self.rope_scaling or self.nope_layers):
            problems.append(
                "rope_scaling and nope_layers are of rotary positions, not learned ones"
            )
        for layer in self.nope_layers:
            if not 0 <= layer < self.n_layer:
                problems.append(
                    f"nope_layers has {layer}; there are layers 0 to {self.n_layer - 1}"
                )
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                problems.append(f"{name} is {getattr(self, name)}; it must be above 0")
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "GPTConfig":
        """The configuration whose `dataclasses.asdict` this was, also by way of JSON."""
        scaling: Any = fields.get("rope_scaling")
        known: dict[str, Any] = fields | {
            "rope_scaling": scaling and RopeScaling(**scaling),
            "nope_layers": tuple(fields.get("nope_layers", ())),
        }
        return cls(**known)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The shapes of a layer's matrices: q, k, v, o, then the MLP's."""
        C, F = self.n_embd, self.n_inner
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        return [(q, C), (kv, C), (kv, C), (C, q), *[(F, C)] * (1 + self.gated), (C, F)]

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of all layers, embedding and head left out."""
        return self.n_layer * sum(a * b for a, b in self.matrices)

    def flops_per_token(self, length: int) -> float:
        """FLOPs of a forward pass over `length` tokens, divided by them; causal, masked half free.

        Two a weight, and 4 · n_head · head_dim a layer for each position that a token attends to.
        """
        attended = (length + 1) / 2
        attention = 4 * self.n_layer * self.n_head * self.head_dim * attended
        return 2 * (self.layer_weights + self.n_embd * self.vocab_size) + attention


class Block(nn.Module):
    """One layer: attention, then the MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig, index: int = 0):
        super().__init__()
        c, norm = config, LayerNorm if config.norm == "layer" else RMSNorm
        self.turned = c.positions == "rotary" and index not in c.nope_layers
        self.input_layernorm = norm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(
            c.n_embd,
            c.n_head,
            c.n_kv_head,
            c.head_dim,
            qk_norm=c.qk_norm,
            bias=c.attention_bias,
            qkv_bias=c.qkv_bias,
            eps=c.norm_eps,
        )
        self.post_attention_layernorm = norm(c.n_embd, c.norm_eps)
        kind = GatedMLP if c.gated else MLP
        self.mlp = kind(c.n_embd, c.n_inner, c.activation, bias=c.mlp_bias)

    def forward(
        self,
        x: Tensor,
        h: Tensor | None,
        rope: tuple[Tensor, Tensor],
        cache: LayerCache | None = None,
        segment_ids: Tensor | None = None,
    ):
        """x (B, T, C), what the last block added, and the residual stream h (B, T, C) before it →
        the same pair."""
        y, h = (self.input_layernorm(x), x) if h is None else self.input_layernorm(x, h)
        y = self.self_attn(y, rope if self.turned else None, cache, segment_ids)
        y, h = self.post_attention_layernorm(y, h)
        return self.mlp(y), h


def _places(
    T: int, segment_ids: Tensor | None, device: torch.device, positions: Tensor | None
) -> Tensor:
    """Where tokens stand: at `positions`, or at 0 … T − 1, which each segment counts anew."""
    if positions is not None:
        return positions
    places = torch.arange(T, device=device)
    if segment_ids is None:
        return places
    first = segment_ids != segment_ids.roll(1, 1)
    first[:, 0] = True
    return places - torch.where(first, places, 0).cummax(1).values


class GPT(nn.Module):
    """A decoder-only transformer. `model(tokens)` gives logits, `model(tokens, targets)` a loss."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.context, config.n_embd)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        norm = LayerNorm if config.norm == "layer" else RMSNorm
        self.norm = norm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.loss = LinearCrossEntropyLoss()
        self.rotary = Rotary(
            config.head_dim, config.context, config.rope_theta, config.rope_scaling
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform of variance 1/fan-in for matrices; zero for what writes to the stream."""
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                p.zero_()
            elif name.endswith(("embed_tokens.weight", "embed_positions.weight")):
                # Tied: behind the final norm a token's own logit starts at C · std. Of widths 64
                # and 128, after 150 steps, 2/C and 3/C were best; 1/√C 0.05 to 0.1 nats worse.
                p.normal_(std=2 / self.config.n_embd if self.config.tie_embeddings else 1.0)
            elif name == "lm_head.weight":
                p.zero_()
            elif p.ndim == 2:
                bound = (3 / p.shape[1]) ** 0.5
                p.uniform_(-bound, bound)

    @property
    def parameter_count(self) -> int:
        """Parameters, the tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def grow_vocabulary(self, size: int) -> "GPT":
        """This model, in place, with room for `size` tokens; ValueError where it has more.

        In the embedding, and in a head of its own, what is new is the mean of what is there, so
        that the model still says what it said. Source: Hewitt 2021, "Initializing new word
        embeddings for pretrained language models".
        """
        more = size - self.config.vocab_size
        if more < 0:
            raise ValueError(f"size is {size}; the model has {self.config.vocab_size} tokens")
        embedding, head = self.embed_tokens, self.lm_head
        for layer in (embedding,) if self.config.tie_embeddings else (embedding, head):
            old = layer.weight
            new = torch.cat([old, old.mean(0, keepdim=True).expand(more, -1)])
            layer.weight = nn.Parameter(new, old.requires_grad)
        if self.config.tie_embeddings:
            head.weight = embedding.weight
        embedding.num_embeddings = head.out_features = size
        self.config = replace(self.config, vocab_size=size)
        return self

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) → (B, T, C), what the head reads.

        segment_ids (B, T), int32 or int64: a token attends to those of its own segment alone (a
        document of several packed in a row). With a cache, row b's tokens take the positions from
        `cache.lengths[b]` on; its capacity must hold them, and the caller then adds to `lengths`.
        ValueError where T is more than the context, or where a cache is given with segments, or
        where gradients are wanted, which what it holds has none of.
        """
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids are given with a cache, whose rows are of one segment")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("a cache holds no gradients: give it under torch.no_grad()")
        T = tokens.shape[1]
        positions = None
        if cache is None or cache.empty:
            if T > self.config.context:
                raise ValueError(
                    f"{T} tokens are more than the model's context of {self.config.context}"
                )
            rope = self.rotary(T)
        else:
            positions = cache.positions(T)
            rope = self.rotary(positions)
        views = [None] * len(self.layers) if cache is None else cache.views(positions, T)
        x, h = self.embed_tokens(tokens), None
        if self.config.positions == "learned":
            x = x + self.embed_positions(_places(T, segment_ids, tokens.device, positions))
        for block, view in zip(self.layers, views, strict=True):
            x, h = block(x, h, rope, view, segment_ids)
        if cache is not None:
            cache.empty = False
        return self.norm(x, h)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) → (..., V) in fp32."""
        return self.lm_head(hidden).float()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits (B, T, V) in fp32; with targets (B, T), −100 where none, the loss in nats.

        segment_ids as in `hidden`. `reduction` is mean, sum or none, over the targets that there
        are.
        """
        hidden = self.hidden(tokens, segment_ids=segment_ids)
        if targets is None:
            return self.logits(hidden)
        if not readable(self.lm_head):
            return cross_entropy(self.logits(hidden), targets, reduction=reduction)
        return self.loss(self.lm_head.weight, hidden, targets, reduction=reduction)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "GPT":
        """The model in a Hugging Face folder or of a hub id: see `hub.load`."""
        from . import hub

        return hub.load(path, dtype=dtype, device=device)

    def save_pretrained(
        self,
        path: str | PathLike[str],
        *,
        tokenizer: "Tokenizer | None" = None,
        eos: str = "<eos>",
    ) -> str:
        """Write a Hugging Face folder, and say what opens it: see `hub.save`."""
        from . import hub

        return hub.save(self, path, tokenizer=tokenizer, eos=eos)

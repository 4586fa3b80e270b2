"""What a sample costs in floating-point operations, counted from the model's shape.

A multiply and an add are two operations. Counted are the matrix products: those of the weights,
2 per weight and token, and attention's QKᵀ and PV, together 4 · n_head · head_dim per token,
layer and position that the token sees (itself included). Causal attention counts what the mask
lets through, not the full square that a naive kernel (and torch's FlopCounterMode) would count.
Norms, rotary, softmax, activations and the embedding look-up are below one per cent and left out.

A prompt is counted once for all samples that share it, and the head only where a next token is
needed: once for the prompt, then once per token.

Token counts are ints or integer arrays; sums over positions are exact.
"""

from typing import Any, TypeAlias

from .gpt import GPTConfig

Count: TypeAlias = Any  # an int or an integer array


def prefill_flops(config: GPTConfig, prompt_tokens: Count) -> Count:
    """Operations to read a prompt and give the distribution of its first next token."""
    return _positions(config, 0, prompt_tokens) + _head(config)


def decode_flops(config: GPTConfig, start: Count, tokens: Count) -> Count:
    """Operations to feed `tokens` tokens one by one to a cache that holds `start`, each giving the
    distribution of the next."""
    return _positions(config, start, tokens) + tokens * _head(config)


def sample_flops(config: GPTConfig, prompt_tokens: Count, new_tokens: Count) -> Count:
    """Operations of one sample of `new_tokens` tokens (sampled and forced) after its prefill: all
    but the last are fed back."""
    fed = new_tokens - 1
    return decode_flops(config, prompt_tokens, fed * (fed > 0))


def verifier_flops(config: GPTConfig, tokens: Count) -> Count:
    """Operations of a verifier that reads `tokens` tokens, a problem and a completion, at once: its
    layers, and one number a token. It reads the problem again with every completion."""
    return _positions(config, 0, tokens) + 2 * config.n_embd * tokens


def _positions(config: GPTConfig, start: Count, tokens: Count) -> Count:
    """All layers for tokens at positions start, start + 1, …; the one at p sees p + 1 of them."""
    seen = tokens * start + tokens * (tokens + 1) // 2
    per_seen = 4 * config.n_layer * config.n_head * config.head_dim
    return 2 * config.layer_weights * tokens + per_seen * seen


def _head(config: GPTConfig) -> int:
    return 2 * config.n_embd * config.vocab_size

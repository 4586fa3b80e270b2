from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ponder.models import GPTConfig
from ponder.models.flops import decode_flops, prefill_flops, sample_flops, verifier_flops

SMALL = GPTConfig(
    vocab_size=33, n_layer=3, n_head=4, n_kv_head=2, head_dim=16, n_embd=48, n_inner=80
)
SHAPES = [
    SMALL,
    replace(SMALL, n_kv_head=4, gated=False),
    replace(SMALL, n_layer=1, n_kv_head=1, head_dim=32),
]


class Reference:
    """A transformer in plain torch: only its matrix products, which are all that is counted."""

    def __init__(self, shape):
        s = self.shape = shape
        q, kv = s.n_head * s.head_dim, s.n_kv_head * s.head_dim
        sizes = [(q, s.n_embd), (kv, s.n_embd), (kv, s.n_embd), (s.n_embd, q)]
        sizes += [(s.n_inner, s.n_embd)] * (2 if s.gated else 1) + [(s.n_embd, s.n_inner)]
        self.layers = [[torch.randn(size) * 0.1 for size in sizes] for _ in range(s.n_layer)]
        self.head = torch.randn(s.vocab_size, s.n_embd)
        self.cache = [(torch.zeros(s.n_kv_head, 0, s.head_dim),) * 2 for _ in self.layers]

    def heads(self, x):
        return x.view(len(x), -1, self.shape.head_dim).transpose(0, 1)

    def feed(self, x):
        """x (T, C) behind the cache; the logits of its last position."""
        group = self.shape.n_head // self.shape.n_kv_head
        for i, (w_q, w_k, w_v, w_o, w_up, *rest) in enumerate(self.layers):
            k, v = self.cache[i]
            k = torch.cat([k, self.heads(x @ w_k.T)], dim=1)
            v = torch.cat([v, self.heads(x @ w_v.T)], dim=1)
            self.cache[i] = k, v
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            mask = torch.ones(len(x), k.shape[1]).tril(k.shape[1] - len(x)) == 0
            scores = (self.heads(x @ w_q.T) @ k.mT).masked_fill(mask, -torch.inf)
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
            x = x + mixed @ w_o.T
            inner = x @ w_up.T
            if self.shape.gated:
                inner = inner * (x @ rest[0].T)
            x = x + inner @ rest[-1].T
        return x[-1:] @ self.head.T


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def masked_away(shape, tokens):
    """What the counter counts of causal attention above the diagonal."""
    square = tokens * tokens - tokens * (tokens + 1) // 2
    return 4 * shape.n_layer * shape.n_head * shape.head_dim * square


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt, new", [(1, 1), (7, 5), (33, 2)])
def test_counts_equal_the_flop_counter(shape, prompt, new):
    model = Reference(shape)
    whole = counted(lambda: model.feed(torch.randn(prompt, shape.n_embd)))
    assert prefill_flops(shape, prompt) == whole - masked_away(shape, prompt)

    def decode():
        for _ in range(new):
            model.feed(torch.randn(1, shape.n_embd))

    assert decode_flops(shape, prompt, new) == counted(decode)


def test_counts_agree_with_the_model():
    from ponder.models import GPT, GPTConfig, KVCache

    config = GPTConfig(vocab_size=31, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=96)
    model = GPT(config).eval()
    prompt, new = 40, 6
    cache = KVCache(config, 1, prompt)

    def feed(tokens, capacity):
        cache.resize(capacity)  # a pass reads all of it
        hidden = model.hidden(torch.zeros((1, tokens), dtype=torch.int64), cache)
        cache.lengths += tokens
        model.logits(hidden[:, -1])

    # The counter sees the products of attention only where they are not fused.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        prefill = counted(lambda: feed(prompt, prompt))
        decode = counted(lambda: [feed(1, prompt + i + 1) for i in range(new)])
    prefill -= masked_away(config, prompt)
    assert prefill_flops(config, prompt) == pytest.approx(prefill, rel=0.01)
    assert decode_flops(config, prompt, new) == pytest.approx(decode, rel=0.01)


def test_weights_of_a_known_model():
    """GPT-2 small: 84.9M weights in its blocks, of which 84.93M are in matrices."""
    gpt2 = GPTConfig(50257, 1024, 12, 12, 12, 64, 768, 3072, gated=False)
    assert gpt2.layer_weights == 84_934_656


def test_a_sample_feeds_all_its_tokens_but_the_last():
    shape = SMALL
    assert sample_flops(shape, 10, 1) == sample_flops(shape, 10, 0) == 0
    assert sample_flops(shape, 10, 4) == decode_flops(shape, 10, 3)
    one_by_one = sum(decode_flops(shape, 10 + i, 1) for i in range(3))
    assert decode_flops(shape, 10, 3) == one_by_one
    # Prefill and decode count the same layers; only the head differs.
    head = 2 * shape.n_embd * shape.vocab_size
    assert prefill_flops(shape, 9) - head == decode_flops(shape, 0, 9) - 9 * head


def test_a_verifier_has_a_number_for_every_token_in_the_place_of_the_head():
    shape = SMALL
    head = 2 * shape.n_embd * shape.vocab_size
    assert verifier_flops(shape, 9) == prefill_flops(shape, 9) - head + 9 * 2 * shape.n_embd


def test_arrays_count_as_numbers_do():
    shape = SMALL
    prompts, new = np.array([3, 50]), np.array([[1, 4], [9, 0]])
    table = sample_flops(shape, prompts[:, None], new)
    expected = [
        [sample_flops(shape, int(p), int(n)) for n in row]
        for p, row in zip(prompts, new, strict=True)
    ]
    assert table.tolist() == expected
    assert prefill_flops(shape, prompts).tolist() == [prefill_flops(shape, int(p)) for p in prompts]

"""A small GPT whose random weights all show in what it computes."""

import torch

from ponder.models import GPT, GPTConfig


def gpt(device="cpu", **changes) -> GPT:
    """It writes to its residual stream, and its <eos> comes now and then."""
    torch.manual_seed(0)
    shape = dict(vocab_size=21, context=128, n_layer=2, n_head=4, n_kv_head=2, head_dim=16)
    model = GPT(GPTConfig(**(shape | dict(n_embd=48, n_inner=80) | changes)))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        else:
            p.data.uniform_(0.5, 2)
    return model.to(device).eval()

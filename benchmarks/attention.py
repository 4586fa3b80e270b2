"""attention against every fused attention that can be had: SDPA's, FlexAttention, FlashAttention.

D 64 and 128, causal and full, 1k to 16k tokens, 32k tokens in all; then a sliding window and packed
documents, where the peers are those that can skip what is masked. On a CPU, shorter, SDPA alone.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ponder import kernels
from ponder.benchmarks.comparison import Case, Inputs, Setting, compiled, peer
from ponder.benchmarks.measure import DEVICE
from ponder.kernels._attention_tiles import choose
from ponder.kernels._runtime import capability


def _first_head(inputs: Inputs) -> Inputs:
    return [x[:1, :1] for x in inputs]


def _sdpa(backend: SDPBackend, causal: bool) -> Callable[..., Tensor]:
    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def _fused(causal: bool, length: int) -> dict[str, Callable[..., Tensor]]:
    """Every fused attention that this machine may have."""
    flash = {"sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION, causal)}
    if DEVICE == "cpu":
        return flash
    visible = (lambda b, h, i, j: i >= j) if causal else None
    return {
        **flash,
        "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, causal),
        **_flash(causal),
        "flex_attention": _flex(visible, length),
    }


def _flash(causal: bool, window: int | None = None) -> dict[str, Callable[..., Tensor]]:
    """FlashAttention 2, 3 and 4, where they are installed; they take (B, T, H, D)."""
    found = {}
    for name, module in (
        ("flash-attn 2", "flash_attn"),
        ("flash-attn 3", "flash_attn_interface"),
        ("flash-attn 4", "flash_attn.cute"),
    ):
        function = peer(module, "flash_attn_func")
        if function is None:
            continue
        options = {} if window is None else {"window_size": (window - 1, 0)}

        def call(q, k, v, function=function, options=options):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = function(q, k, v, causal=causal, **options)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        found[name] = call
    return found


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)


def _flex(visible: Callable | None, length: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = None
    if visible is not None:
        mask = create_block_mask(visible, None, None, length, length, device=DEVICE)
    return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=mask)


def cases(setting: Setting) -> Iterator[Case]:
    total, width, lengths = setting.of(
        (256, 256, (128,)),
        (2048, 512, (256, 1024, 2048)),
        (32768, 2048, (1024, 2048, 4096, 8192, 16384)),
    )
    for dim in setting.of((64, 128), (32, 64, 128), (64, 128)):
        heads = width // dim
        for causal in (True, False):
            for length in lengths:
                batch = total // length
                shape = batch, heads, length, dim
                ours = {"ponder": lambda q, k, v, c=causal: kernels.attention(q, k, v, causal=c)}
                if choose("backward", dim, "bf16", capability(torch.device(DEVICE)), ()):
                    ours["ponder, one pass"] = lambda q, k, v, c=causal: kernels.attention(
                        q, k, v, causal=c, deterministic=False
                    )
                yield Case(
                    "attention",
                    f"B{batch} H{heads} T{length} D{dim} {'causal' if causal else 'full'}",
                    {**ours, **({} if setting.smoke else _fused(causal, length))},
                    [setting.tensor(*shape) for _ in range(3)],
                    lambda q, k, v, c=causal: F.scaled_dot_product_attention(q, k, v, is_causal=c),
                    flops=4 * batch * heads * length * length * dim * (0.5 if causal else 1.0),
                    backward=2.5,
                    part=_first_head,
                )
    yield from _masked(setting)


def _masked(setting: Setting) -> Iterator[Case]:
    heads, length, window = setting.of((2, 128, 32), (8, 1024, 128), (16, 16384, 1024))
    dim, skipping = 64, DEVICE == "cuda" and not setting.smoke  # peers that skip what is masked
    inputs = [setting.tensor(2, heads, length, dim) for _ in range(3)]

    def reference(mask: Tensor) -> Callable[..., Tensor]:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    i = torch.arange(length, device=DEVICE)[:, None]
    j = i.T

    def in_window(b, h, i, j):
        return (i >= j) & (i - j < window)

    peers = {"sdpa with a mask": reference((i >= j) & (i - j < window))}
    if skipping:
        peers = _flash(True, window) | {"flex_attention": _flex(in_window, length)}
    yield Case(
        "attention",
        f"B2 H{heads} T{length} D{dim} causal, window {window}",
        {"ponder": lambda q, k, v: kernels.attention(q, k, v, window=window), **peers},
        inputs,
        reference((i >= j) & (i - j < window)),
        flops=4 * 2 * heads * dim * (length * window - window * (window - 1) / 2),
        backward=2.5,
        part=_first_head,
    )
    document = length // 8
    rows = torch.arange(length, device=DEVICE) // document
    segment_ids = rows.expand(2, -1).contiguous()

    def in_document(b, h, i, j):
        return (i >= j) & (rows[i] == rows[j])

    def ours(q, k, v):
        return kernels.attention(q, k, v, segment_ids=segment_ids[: len(q)])

    peers = {"sdpa with a mask": reference((i >= j) & (rows[:, None] == rows))}
    if skipping:
        peers = {"flex_attention": _flex(in_document, length)}
    yield Case(
        "attention",
        f"B2 H{heads} T{length} D{dim} causal, documents of {document}",
        {"ponder": ours, **peers},
        inputs,
        reference((i >= j) & (rows[:, None] == rows)),
        flops=4 * 2 * heads * length * document * dim * 0.5,
        backward=2.5,
        part=_first_head,
    )

"""Our attention under the name "ponder" in Transformers' registry of attention functions.

`register()` makes `attn_implementation="ponder"` known. Transformers asks `mask` once for each kind
of layer and hands what it gives to `attend` in each layer. A mask is, in T + S numbers instead of
T × S: None, the tokens see all keys up to their own; or the keys' segment ids (B, 1, 1, S) in
int32, of which a negative one, ~id, is a padded key that no token sees; or for one query, in int64,
0 for a key that it sees and −1 for another. (They have four dimensions because `generate` makes
some masks ahead, and models take one of two for padding.) Windows come from the layer, but for that
of one query. A mask that is not made so comes as Transformers makes it, (B, 1, T, S), and such a
call takes Transformers' own function, which is said once.

Shapes: B sequences, T queries, S keys.
"""

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import attention, decode_attention, use_triton

NAME = "ponder"
MAX_HEAD_DIM = 256
# Models that get a whole mask: PhiMoE's windows stand in it alone, and in no layer_types, so do
# Moshi's where a cache has one; Doge adds to it.
WHOLE = "phimoe", "moshi", "doge"
# Transformers' masks by their functions' names: "and_mask" is causality with a window, with chunks,
# with packed sequences ("or_mask" lets some tokens see ahead).
CAUSAL = "causal_mask_function", "and_mask"
_said: set[str] = set()


def register() -> None:
    """Make `attn_implementation="ponder"` known to Transformers; more than once is fine."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def say_once(text: str) -> None:
    """Warn, the first time; under torch.compile, while it traces."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=3)


# What torch.compiler.assume_constant_result does, which imports the compiler.
say_once._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def mask(**asked: Any) -> Tensor | None:
    """What `attend` is to be given for the mask that Transformers asks for.

    Transformers says by a function whether query i sees key j. That it says so by causality, a
    window and segments of adjacent tokens is seen on the 2 S pairs of neighbours: no token sees its
    successor, and where one does not see its predecessor a segment begins. Functions that users
    add to a model's own come with use_vmap, and are not looked into.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    n_queries, n_keys = asked["q_length"], asked["kv_length"]
    q_offset, kv_offset = asked.get("q_offset", 0), asked.get("kv_offset", 0)
    n_row, device = asked["batch_size"], asked.get("device", "cpu")
    sees, padding = asked["mask_function"], asked.get("attention_mask")
    as_theirs: dict[str, Any] = asked | dict(
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )
    # A cache of a fixed size has keys behind the last query; there the position is a tensor.
    aligned = isinstance(q_offset, int) and q_offset + n_queries == kv_offset + n_keys
    # A model that insists on a mask of its own does more with it than attend. Transformers itself
    # insists where a row is packed, and for a cache of a fixed size.
    insists = asked.get("allow_is_causal_skip") is False and aligned
    if (
        getattr(asked.get("config"), "model_type", "") in WHOLE
        or (insists and (n_queries == 1 or sees is causal_mask_function))
        or asked.get("use_vmap")
        or not isinstance(kv_offset, int)
        or not (aligned or n_queries == 1)
    ):
        return sdpa_mask(**as_theirs)

    # A compiled model's numbers are not known while its mask is made: there the ids are always
    # given, and a function is causal by its name.
    compiling = torch.compiler.is_compiling()
    row, head = torch.arange(n_row, device=device)[:, None], torch.zeros((), device=device).int()
    keys = torch.arange(n_keys, device=device)[None] + kv_offset
    present = None
    if padding is not None:
        short = max(0, kv_offset + n_keys - padding.shape[1])
        present = F.pad(padding.to(torch.bool), (0, short))[:, kv_offset : kv_offset + n_keys]
    if n_queries == 1:  # every key is looked at, so any function will do
        seen = sees(row, head, torch.zeros_like(keys) + q_offset, keys).expand(n_row, n_keys)
        seen = seen if present is None else seen & present
        if aligned and not compiling and seen.all():
            return None
        return (seen.long() - 1)[:, None, None]
    if compiling:
        if "allow_is_bidirectional_skip" in asked or sees.__name__ not in CAUSAL:
            return sdpa_mask(**as_theirs)
        if present is None and sees is causal_mask_function:
            return None
    else:
        successors = keys[:, n_keys - n_queries + 1 :]
        if sees(row, head, successors - 1, successors).any():
            return sdpa_mask(**as_theirs)
    begins = ~sees(row, head, keys[:, 1:], keys[:, :-1])
    ids = F.pad(begins.int().cumsum(1, dtype=torch.int32), (1, 0)).expand(n_row, n_keys)
    if insists and not compiling and not ids.any():  # not for a packed row's sake
        return sdpa_mask(**as_theirs)
    ids = ids if present is None else torch.where(present, ids, ~ids)
    return ids.contiguous()[:, None, None] if compiling or ids.any() else None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as Transformers calls it: query (B, Hq, T, D), key and value (B, Hkv, S, D), and a
    mask from `mask`, give (B, T, Hq, D) and None, for the weights, which our kernel never holds.

    Where there is no mask, cu_seq_lens_q says where the sequences of one packed row begin.
    """
    chosen = any(rest.get(name) is not None for name in ("indices", "block_indices"))
    if chosen or getattr(module, "compressor", None) is not None:
        raise ValueError(
            f"{type(module).__name__} chooses its keys by itself, which attn_implementation "
            f'"{NAME}" does not compute; "eager" does'
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is None and causal:
        sliding_window = _untold_window(module)
    n_row, n_queries, n_keys = query.shape[0], query.shape[2], key.shape[2]
    options: dict[str, Any] = dict(window=sliding_window, softcap=softcap, sinks=s_aux)
    ids = None
    ours = attention_mask is not None and attention_mask.dtype in (torch.int32, torch.int64)
    if attention_mask is not None and (
        attention_mask.ndim != 4 or (ours and attention_mask.shape[1:3] != (1, 1))
    ):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} of {attention_mask.dtype} in the "
            "layer; it must be None, (B, 1, T, S) of bool or a float dtype, or what ponder's mask "
            "function gives"
        )
    if ours and attention_mask is not None:
        ids = attention_mask[:, 0, 0]
        if ids.dtype == torch.int64:  # which tell the window too
            options["window"] = None
    if attention_mask is not None:
        cu_seq_lens_q = None
    elif cu_seq_lens_q is not None and (n_row != 1 or n_queries != n_keys):
        raise ValueError(
            f"cu_seq_lens_q is given with {n_row} rows of {n_queries} tokens after "
            f"{n_keys - n_queries} others; it is for one row, without a cache"
        )
    foreign = attention_mask is not None and ids is None
    why = _unsupported(module, query, value, foreign, dropout, scaling, rest)
    if why is not None:
        if cu_seq_lens_q is not None:
            places = torch.arange(n_keys, device=query.device, dtype=cu_seq_lens_q.dtype)
            ids = torch.bucketize(places, cu_seq_lens_q[1:], out_int32=True, right=True)[None]
        say_once(f"{why}: Transformers computes such attention, not ponder")
        dense = attention_mask if ids is None else _dense(ids, n_queries)
        window = options["window"]
        if ids is not None or (attention_mask is None and (causal or window is not None)):
            dense = _within(dense, n_queries, n_keys, window, causal, query.device)
        return _theirs(
            module, query, key, value, dense, dropout, scaling, causal, softcap, s_aux, rest
        )
    options["scale"] = scaling
    if ids is not None:
        options["segment_ids"] = (_queries(ids, n_queries), ids)
    elif cu_seq_lens_q is not None:
        options["cu_seqlens"] = cu_seq_lens_q
    elif _decodes(query, key, value) and causal:
        lengths = torch.full((n_row,), n_keys, device=query.device)
        return decode_attention(query, key, value, lengths, **options).transpose(1, 2), None
    y = attention(query, key, value, causal=causal, **options)
    return y.transpose(1, 2).contiguous(), None  # as Transformers' own: AFMoE takes a view of it


def _decodes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether it is one token that the decode kernel takes: without gradients, and with keys and
    values alike, which DeepSeek-V3's are not."""
    alike = query.shape[2] == 1 and key.shape == value.shape
    return alike and use_triton(query) and not torch.is_grad_enabled()


def _untold_window(module: nn.Module) -> int | None:
    """The window of a layer whose model leaves it to the mask alone, as Qwen2-MoE's does."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None) or ()
    here = isinstance(index, int) and list(kinds[index : index + 1]) == ["sliding_attention"]
    return getattr(config, "sliding_window", None) if here else None


def _unsupported(
    module: nn.Module,
    query: Tensor,
    value: Tensor,
    foreign: bool,
    dropout: float,
    scaling: float | None,
    rest: dict[str, Any],
) -> str | None:
    """Why the call is not one that our kernel computes, if it is not."""
    name = type(module).__name__
    if foreign:
        return f"{name} has a mask that is not causal with segments of adjacent tokens"
    if dropout:
        return f"{name} has dropout {dropout} of the attention's weights"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"{name} has heads of {query.shape[-1]} dimensions, more than {MAX_HEAD_DIM}"
    if _scales_by_layer(module, scaling):
        return f"{name} scales its scores by its layer"
    if rest.get("output_attentions"):
        return f"{name} is to give its attention's weights"
    for option in ("position_bias", "cache"):
        if rest.get(option) is not None:
            return f"{name} has {option}"
    return None


def _scales_by_layer(module: nn.Module, scaling: float | None) -> bool:
    """Whether it is GPT-2's attention that has not put its layer's number into `scaling`."""
    return scaling is None and getattr(module, "scale_attn_by_inverse_layer_idx", False)


def _queries(ids: Tensor, n_queries: int) -> Tensor:
    """The segment ids of the queries, which stand beside the last keys, padded or not; one that
    the mask was made for may stand elsewhere."""
    if ids.dtype == torch.int64:
        return torch.zeros_like(ids[:, :1])
    own = ids[:, -n_queries:]
    return torch.where(own < 0, ~own, own)


def _dense(ids: Tensor, n_queries: int) -> Tensor:
    return (_queries(ids, n_queries)[:, :, None] == ids[:, None])[:, None]


def _within(
    dense: Tensor | None,
    n_queries: int,
    n_keys: int,
    window: int | None,
    causal: bool,
    device: torch.device,
) -> Tensor:
    """(B or 1, 1, T, S): `dense`, causality and the window together."""
    i = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    j = torch.arange(n_keys, device=device)
    seen = j <= i if causal else torch.ones_like(j <= i)
    if window is not None:
        seen = seen & ((i - j).abs() < window)
    return seen[None, None] if dense is None else seen & dense


def _theirs(module, query, key, value, dense, dropout, scaling, causal, softcap, sinks, rest):
    """What Transformers computes: by SDPA, or where that lacks an option by the model's own."""
    weights = rest.get("output_attentions")
    if not weights and softcap is None and sinks is None and not _scales_by_layer(module, scaling):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = dict(dropout=dropout, scaling=scaling, is_causal=causal) | rest
        return sdpa_attention_forward(module, query, key, value, dense, **options)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if dense is not None and dense.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        dense = torch.zeros_like(dense, dtype=query.dtype).masked_fill(~dense, lowest)
    options = {"softcap": softcap, "s_aux": sinks} | rest
    options = {name: x for name, x in options.items() if x is not None}
    return eager(module, query, key, value, dense, scaling=scaling, dropout=dropout, **options)

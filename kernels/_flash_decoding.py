"""The Triton kernels of decode_attention: each split of a cache by itself, then all of a query's.

Shapes and conventions are those of decode_attention; log-sum-exps are to base 2, of scores times
log2(e).
"""

from ._activations import activate
from ._runtime import jit, tl


@jit(do_not_specialize=["group", "n_new", "n_split", "samples", "window", "page_size", "n_blocks"])
def flash_decoding_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    length_ptr,
    prefix_length_ptr,
    sink_ptr,
    block_table_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    stride_q_row,
    stride_q_head,
    stride_q_token,
    stride_k_row,
    stride_k_head,
    stride_k_token,
    stride_v_row,
    stride_v_head,
    stride_v_token,
    n_kv_head,
    group,
    n_new,
    capacity,
    head_dim,
    n_split,
    samples,
    window,
    page_size,
    n_blocks,
    scale_log2,
    softcap_log2,
    SPLIT: tl.constexpr,
    PREFIX: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """PREFIX: a row of the cache is a group's, and a tile's rows are of all the group's samples.
    PAGED: strides of rows are those of pages. SOFTCAP: scale_log2 is scale / softcap."""
    i_row = (tl.program_id(0) // n_kv_head).to(tl.int64)
    i_kv_head = (tl.program_id(0) % n_kv_head).to(tl.int64)
    i_split = tl.program_id(1)
    if PREFIX:
        length = tl.load(prefix_length_ptr + i_row).to(tl.int32)
        visible = tl.minimum(tl.maximum(length, 0), capacity)
    else:
        length = tl.load(length_ptr + i_row).to(tl.int32)
        visible = tl.minimum(tl.maximum(length, 1), capacity)
    first = i_split * SPLIT
    if first >= visible:
        return
    # Query head within the group, token; in front of both the sample of a prefix.
    o_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_token = o_m % n_new
    m_d = o_d < head_dim
    if PREFIX:
        m_m = o_m < samples * group * n_new
        o_row = i_row * samples + o_m // (group * n_new)
        o_head = i_kv_head * group + o_m // n_new % group
        if WINDOW:  # rows that are none hold no split back
            lengths = tl.load(length_ptr + o_row, mask=m_m, other=1 << 30).to(tl.int32)
            last = visible + tl.maximum(lengths - n_new + o_token, 0)
    else:
        m_m = o_m < group * n_new
        o_row = i_row
        o_head = i_kv_head * group + o_m // n_new
        last = tl.maximum(length - n_new + o_token, 0)
    begin = first
    if WINDOW:
        lowest = tl.min(last, 0) - window + 1
        if lowest >= first + SPLIT:
            return
        begin = tl.maximum(first, lowest // BLOCK_N * BLOCK_N)
    q_offset = o_row * stride_q_row + o_head * stride_q_head + o_token.to(tl.int64) * stride_q_token
    b_q = tl.load(q_ptr + q_offset[:, None] + o_d, mask=m_m[:, None] & m_d, other=0.0)
    k_ptr += i_kv_head * stride_k_head
    v_ptr += i_kv_head * stride_v_head
    if not PAGED:
        k_ptr += i_row * stride_k_row
        v_ptr += i_row * stride_v_row

    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, tl.minimum(first + SPLIT, visible), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_load = (o_n < visible)[:, None] & m_d
        if PAGED:
            page = tl.load(
                block_table_ptr + i_row * n_blocks + o_n // page_size, mask=o_n < visible, other=0
            ).to(tl.int64)[:, None]
            o_in_page = (o_n % page_size).to(tl.int64)[:, None]
            k_offset = page * stride_k_row + o_in_page * stride_k_token
            v_offset = page * stride_v_row + o_in_page * stride_v_token
        else:
            o_n_wide = o_n.to(tl.int64)[:, None]
            k_offset = o_n_wide * stride_k_token
            v_offset = o_n_wide * stride_v_token
        b_k = tl.load(k_ptr + k_offset + o_d, mask=m_load, other=0.0)
        b_v = tl.load(v_ptr + v_offset + o_d, mask=m_load, other=0.0)
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        if SOFTCAP:
            b_score = activate(b_score, "tanh") * softcap_log2
        if PREFIX:
            b_score = tl.where((o_n < visible)[None, :], b_score, float("-inf"))
        else:
            b_score = tl.where(o_n[None, :] <= last[:, None], b_score, float("-inf"))
        if WINDOW:
            b_score = tl.where(o_n[None, :] > last[:, None] - window, b_score, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: no inf − inf
        b_weight = tl.exp2(b_score - b_finite[:, None])
        b_decay = tl.exp2(b_max - b_finite)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_out *= b_decay[:, None]
        b_out += tl.dot(b_weight.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # a query that sees nothing of this split
    b_out /= b_sum[:, None]
    o_out = (o_row * n_kv_head * group + o_head) * n_new + o_token
    m_out = m_m[:, None] & m_d
    if n_split == 1:
        if SINKS:
            sink = tl.load(sink_ptr + o_head, mask=m_m, other=0.0).to(tl.float32)
            lse = b_max + tl.log2(b_sum)
            b_out /= 1.0 + tl.exp2(sink * 1.4426950408889634 - lse)[:, None]
        out = b_out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + o_out[:, None] * head_dim + o_d, out, mask=m_out)
    else:
        o_partial = o_out * n_split + i_split
        tl.store(partial_ptr + o_partial[:, None] * head_dim + o_d, b_out, mask=m_out)
        tl.store(lse_ptr + o_partial, b_max + tl.log2(b_sum), mask=m_m)


@jit
def _add_splits(
    b_out,
    total,
    best,
    partial_ptr,
    lse_ptr,
    o_first,
    begin,
    end,
    head_dim,
    o_d,
    BLOCK: tl.constexpr,
):
    """Add the splits from begin up to end, those of o_first on, so many at once as BLOCK: they are
    read side by side, and always cut at its multiples."""
    for i_block in range(begin // BLOCK, tl.cdiv(end, BLOCK)):
        o_split = i_block * BLOCK + tl.arange(0, BLOCK)
        m_split = (o_split >= begin) & (o_split < end)
        o_partial = o_first + o_split
        lse = tl.load(lse_ptr + o_partial, mask=m_split, other=float("-inf"))
        b_partial = tl.load(
            partial_ptr + o_partial[:, None] * head_dim + o_d,
            mask=m_split[:, None] & (o_d < head_dim),
            other=0.0,
        )
        new = tl.maximum(best, tl.max(lse, 0))
        decay, weight = tl.exp2(best - new), tl.exp2(lse - new)
        b_out = b_out * decay + tl.sum(b_partial * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        best = new
    return b_out, total, best


@jit(do_not_specialize=["rows_per_length", "n_new", "n_split", "n_own_split", "samples", "window"])
def combine_kernel(
    partial_ptr,
    lse_ptr,
    length_ptr,
    prefix_length_ptr,
    sink_ptr,
    out_ptr,
    rows_per_length,
    n_new,
    capacity,
    prefix_capacity,
    head_dim,
    n_split,
    n_own_split,
    samples,
    window,
    SPLIT: tl.constexpr,
    PREFIX_SPLIT: tl.constexpr,
    PREFIX: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query's splits: of the row's own cache, then of its prefix. None wholly before a window:
    those hold nothing."""
    i_out = tl.program_id(0).to(tl.int64)
    i_row = i_out // rows_per_length
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < head_dim
    length = tl.load(length_ptr + i_row).to(tl.int32)
    visible = tl.minimum(tl.maximum(length, 1), capacity)
    first = 0
    if WINDOW:
        last = tl.maximum(length - n_new + (i_out % n_new).to(tl.int32), 0)
        first = tl.maximum(last - window + 1, 0) // SPLIT
    o_first = i_out * n_split
    best = tl.load(lse_ptr + o_first + first)  # holds a position that is seen: finite
    total = best * 0.0
    b_out = tl.zeros((BLOCK_D,), tl.float32)
    b_out, total, best = _add_splits(
        b_out,
        total,
        best,
        partial_ptr,
        lse_ptr,
        o_first,
        first,
        tl.cdiv(visible, SPLIT),
        head_dim,
        o_d,
        BLOCK,
    )
    if PREFIX:
        prefix = tl.load(prefix_length_ptr + i_row // samples).to(tl.int32)
        prefix = tl.minimum(tl.maximum(prefix, 0), prefix_capacity)
        first = 0
        if WINDOW:
            first = tl.maximum(prefix + last - window + 1, 0) // PREFIX_SPLIT
        b_out, total, best = _add_splits(
            b_out,
            total,
            best,
            partial_ptr,
            lse_ptr,
            o_first + n_own_split,
            first,
            tl.cdiv(prefix, PREFIX_SPLIT),
            head_dim,
            o_d,
            BLOCK,
        )
    if SINKS:
        sink = tl.load(sink_ptr + i_out % rows_per_length // n_new).to(tl.float32)
        total += tl.exp2(sink * 1.4426950408889634 - best)
    b_out /= total
    tl.store(out_ptr + i_out * head_dim + o_d, b_out.to(out_ptr.dtype.element_ty), mask=m_d)

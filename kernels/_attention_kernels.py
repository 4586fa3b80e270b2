"""The Triton kernels of attention: forward, and backward in two passes, to queries and to keys.

In the kernels a query block and a key block meet in a tile (BLOCK_T, BLOCK_S); which tiles meet,
and which of them are seen whole, says _attention_masks. Log-sum-exps are to base 2, of scores times
log2(e). An argument that is None belongs to a feature that is not used, and leaves no code.

With q · k as it comes, a score to base 2 is score_scale · (x - slope · distance), where x is q · k,
or tanh(cap_scale · q · k) under a softcap.
Shapes: B batch, Hq query heads, Hkv key/value heads, T queries, S keys, D head dimension.
"""

from ._activations import activate, activate_with_slope
from ._attention_masks import (
    distance,
    key_bounds,
    near,
    not_all_near,
    query_bounds,
    row_length,
    sees,
)
from ._runtime import jit, tl


@jit
def _load_rows(
    ptr,
    o_row,
    stride,
    n_rows,
    head_dim,
    MASK_ROWS: tl.constexpr,
    MASK_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_d = tl.arange(0, BLOCK_D)
    pointers = ptr + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    if MASK_ROWS and MASK_D:
        mask = (o_row < n_rows)[:, None] & (o_d < head_dim)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=(o_row < n_rows)[:, None], other=0.0)
    elif MASK_D:
        return tl.load(pointers, mask=(o_d < head_dim)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@jit
def _load_some(ptr, o_row, stride, n_rows, head_dim, MASK_D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of which those past the last are the last one again: their weights are 0. A mask would
    take an instruction or two more for each row."""
    o_row = tl.minimum(o_row, n_rows - 1)
    return _load_rows(ptr, o_row, stride, n_rows, head_dim, False, MASK_D, BLOCK_D)


@jit
def _store_rows(ptr, block, o_row, stride, n_rows, head_dim, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    pointers = ptr + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    mask = (o_row < n_rows)[:, None] & (o_d < head_dim)[None, :]
    tl.store(pointers, block.to(ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset", "width"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    slopes_ptr,
    q_spans_ptr,
    kv_spans_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    stride_k_b,
    stride_k_h,
    stride_k_s,
    stride_v_b,
    stride_v_h,
    stride_v_s,
    stride_out_b,
    stride_out_h,
    stride_out_t,
    n_heads,
    group,
    n_queries,
    n_keys,
    offset,
    head_dim,
    head_dim_v,
    score_scale,
    cap_scale,
    width,
    MASK_D: tl.constexpr,
    MASK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LATE: tl.constexpr,
):
    n_blocks = tl.cdiv(n_queries, BLOCK_T)
    i_head = tl.program_id(0) // n_blocks
    # The last queries see the most keys: they start first, so that no long one ends alone.
    start_t = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_T
    i_b = (i_head // n_heads).to(tl.int64)
    i_h = (i_head % n_heads).to(tl.int64)
    q_ptr += i_b * stride_q_b + i_h * stride_q_h
    k_ptr += i_b * stride_k_b + i_h // group * stride_k_h
    v_ptr += i_b * stride_v_b + i_h // group * stride_v_h
    out_ptr += i_b * stride_out_b + i_h * stride_out_h
    lse_ptr += i_head.to(tl.int64) * row_length(n_queries)
    if head_dim_v is None:
        head_dim_v = head_dim
    if slopes_ptr is not None:
        slopes_ptr += i_h
    if q_spans_ptr is not None:
        q_spans_ptr += i_b * 3 * row_length(n_queries)
        kv_spans_ptr += i_b * 3 * row_length(n_keys)

    o_t = start_t + tl.arange(0, BLOCK_T)
    b_q = _load_rows(q_ptr, o_t, stride_q_t, n_queries, head_dim, True, MASK_D, BLOCK_D)
    b_out = tl.zeros((BLOCK_T, BLOCK_DV), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    # Finite, so that a row that sees no key has exp2(-inf - b_max) = 0 and never inf - inf.
    b_max = tl.zeros((BLOCK_T,), dtype=tl.float32) - 1e30
    if sinks_ptr is not None:  # the first "key": its weight is 1 so far and its value 0
        sink = tl.load(sinks_ptr + i_h)
        b_sum += tl.where(sink == float("-inf"), 0.0, 1.0)
        b_max = tl.maximum(b_max, sink)
    first, whole_first, whole_end, end = key_bounds(
        q_spans_ptr, o_t, start_t, n_queries, n_keys, offset, width, BLOCK_T, BLOCK_S
    )
    if q_spans_ptr is not None:
        b_segment_t = tl.load(q_spans_ptr + o_t)
    dtype = v_ptr.dtype.element_ty
    if LATE:
        # A block's weights meet its values one step late, so that Hopper multiplies them while it
        # computes the next softmax. They are carried as bits: of numbers that a loop carries Triton
        # would put the product's operand in shared memory.
        b_bits = tl.zeros((BLOCK_T, BLOCK_S), dtype=tl.int16)
        shrink = tl.zeros((BLOCK_T,), dtype=tl.float32)
        late_end = first + BLOCK_S
        # The last block's values come now, to be there at the end; none of what nobody sees.
        o_last = (end - 1) // BLOCK_S * BLOCK_S + tl.arange(0, BLOCK_S)
        seen_end = tl.where(first < end, end, 0)
        b_last = _load_rows(
            v_ptr, o_last, stride_v_s, seen_end, head_dim_v, True, MASK_DV, BLOCK_DV
        )
    for start_s in range(first, end, BLOCK_S):
        o_s = start_s + tl.arange(0, BLOCK_S)
        b_k = _load_some(k_ptr, o_s, stride_k_s, n_keys, head_dim, MASK_D, BLOCK_D)
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if LATE:
            o_late = late_end - BLOCK_S + tl.arange(0, BLOCK_S)
            b_v = _load_some(v_ptr, o_late, stride_v_s, n_keys, head_dim_v, MASK_DV, BLOCK_DV)
            b_out = tl.dot(b_bits.to(dtype, bitcast=True), b_v, b_out * shrink[:, None])
            late_end = start_s + BLOCK_S  # (a loop that hands on its own index is not pipelined)
        if cap_scale is not None:
            b_score = activate(b_score * cap_scale, "tanh")
        if slopes_ptr is not None:
            b_distance = distance(o_t[:, None], o_s[None, :], n_queries, n_keys)
            b_score -= tl.load(slopes_ptr) * b_distance
        if (start_s < whole_first) | (start_s >= whole_end):
            seen = sees(o_t[:, None], o_s[None, :], n_keys, offset, width)
            if q_spans_ptr is not None:
                b_segment_s = tl.load(kv_spans_ptr + o_s)
                seen = seen & (b_segment_t[:, None] == b_segment_s[None, :])
            b_score = tl.where(seen, b_score, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_score, 1) * score_scale)
        b_p = tl.exp2(b_score * score_scale - new_max[:, None])
        shrink = tl.exp2(b_max - new_max)
        b_sum = b_sum * shrink + tl.sum(b_p, 1)
        if LATE:
            b_bits = b_p.to(dtype).to(tl.int16, bitcast=True)
        else:
            b_v = _load_some(v_ptr, o_s, stride_v_s, n_keys, head_dim_v, MASK_DV, BLOCK_DV)
            b_out = b_out * shrink[:, None]
            b_out = tl.dot(b_p.to(dtype), b_v, b_out, input_precision="ieee")
        b_max = new_max
    if LATE:
        b_out = tl.dot(b_bits.to(dtype, bitcast=True), b_last, b_out * shrink[:, None])
    divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / divisor[:, None]
    _store_rows(out_ptr, b_out, o_t, stride_out_t, n_queries, head_dim_v, BLOCK_DV)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(divisor))
    tl.store(lse_ptr + o_t, b_lse, mask=o_t < n_queries)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset", "width"])
def attention_backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    dlse_ptr,
    slopes_ptr,
    q_spans_ptr,
    kv_spans_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    stride_k_b,
    stride_k_h,
    stride_k_s,
    stride_v_b,
    stride_v_h,
    stride_v_s,
    stride_out_b,
    stride_out_h,
    stride_out_t,
    stride_dout_b,
    stride_dout_h,
    stride_dout_t,
    stride_dq_b,
    stride_dq_h,
    stride_dq_t,
    n_heads,
    group,
    n_queries,
    n_keys,
    offset,
    head_dim,
    head_dim_v,
    scale,
    score_scale,
    cap_scale,
    width,
    MASK_D: tl.constexpr,
    MASK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    n_blocks = tl.cdiv(n_queries, BLOCK_T)
    i_head = tl.program_id(0) // n_blocks
    start_t = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_T
    i_b = (i_head // n_heads).to(tl.int64)
    i_h = (i_head % n_heads).to(tl.int64)
    q_ptr += i_b * stride_q_b + i_h * stride_q_h
    k_ptr += i_b * stride_k_b + i_h // group * stride_k_h
    v_ptr += i_b * stride_v_b + i_h // group * stride_v_h
    out_ptr += i_b * stride_out_b + i_h * stride_out_h
    dout_ptr += i_b * stride_dout_b + i_h * stride_dout_h
    dq_ptr += i_b * stride_dq_b + i_h * stride_dq_h
    lse_ptr += i_head.to(tl.int64) * row_length(n_queries)
    delta_ptr += i_head.to(tl.int64) * row_length(n_queries)
    if head_dim_v is None:
        head_dim_v = head_dim
    if slopes_ptr is not None:
        slopes_ptr += i_h
    if q_spans_ptr is not None:
        q_spans_ptr += i_b * 3 * row_length(n_queries)
        kv_spans_ptr += i_b * 3 * row_length(n_keys)

    o_t = start_t + tl.arange(0, BLOCK_T)
    b_q = _load_rows(q_ptr, o_t, stride_q_t, n_queries, head_dim, True, MASK_D, BLOCK_D)
    b_dout = _load_rows(
        dout_ptr, o_t, stride_dout_t, n_queries, head_dim_v, True, MASK_DV, BLOCK_DV
    )
    b_out = _load_rows(out_ptr, o_t, stride_out_t, n_queries, head_dim_v, True, MASK_DV, BLOCK_DV)
    # The softmax's inner product sum_j p_ij dp_ij, which equals dout_i · out_i.
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    if dlse_ptr is not None:  # the log-sum-exp's derivative by a score is p_ij too
        dlse_ptr += i_head.to(tl.int64) * row_length(n_queries)
        b_delta -= tl.load(dlse_ptr + o_t, mask=o_t < n_queries, other=0.0)
    tl.store(delta_ptr + o_t, b_delta, mask=o_t < n_queries)
    b_lse = tl.load(lse_ptr + o_t, mask=o_t < n_queries, other=0.0)
    b_dq = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    first, whole_first, whole_end, end = key_bounds(
        q_spans_ptr, o_t, start_t, n_queries, n_keys, offset, width, BLOCK_T, BLOCK_S
    )
    if q_spans_ptr is not None:
        b_segment_t = tl.load(q_spans_ptr + o_t)
    for start_s in range(first, end, BLOCK_S):
        o_s = start_s + tl.arange(0, BLOCK_S)
        b_k = _load_some(k_ptr, o_s, stride_k_s, n_keys, head_dim, MASK_D, BLOCK_D)
        b_v = _load_some(v_ptr, o_s, stride_v_s, n_keys, head_dim_v, MASK_DV, BLOCK_DV)
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
        if cap_scale is not None:
            b_score, b_slope = activate_with_slope(b_score * cap_scale, "tanh")
        if slopes_ptr is not None:
            b_distance = distance(o_t[:, None], o_s[None, :], n_queries, n_keys)
            b_score -= tl.load(slopes_ptr) * b_distance
        b_p = tl.exp2(b_score * score_scale - b_lse[:, None])
        if (start_s < whole_first) | (start_s >= whole_end):
            seen = sees(o_t[:, None], o_s[None, :], n_keys, offset, width)
            if q_spans_ptr is not None:
                b_segment_s = tl.load(kv_spans_ptr + o_s)
                seen = seen & (b_segment_t[:, None] == b_segment_s[None, :])
            b_p = tl.where(seen, b_p, 0.0)
        if cap_scale is not None:
            b_p *= b_slope
        b_dscore = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_dscore.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    _store_rows(dq_ptr, b_dq * scale, o_t, stride_dq_t, n_queries, head_dim, BLOCK_D)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset", "width"])
def attention_backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    slopes_ptr,
    q_spans_ptr,
    kv_spans_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_t,
    stride_k_b,
    stride_k_h,
    stride_k_s,
    stride_v_b,
    stride_v_h,
    stride_v_s,
    stride_dout_b,
    stride_dout_h,
    stride_dout_t,
    stride_dk_b,
    stride_dk_h,
    stride_dk_s,
    stride_dv_b,
    stride_dv_h,
    stride_dv_s,
    n_heads,
    group,
    n_queries,
    n_keys,
    offset,
    head_dim,
    head_dim_v,
    scale,
    score_scale,
    cap_scale,
    width,
    MASK_D: tl.constexpr,
    MASK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LATE: tl.constexpr,
):
    n_blocks = tl.cdiv(n_keys, BLOCK_S)
    n_kv_heads = n_heads // group
    i_head = tl.program_id(0) // n_blocks
    start_s = tl.program_id(0) % n_blocks * BLOCK_S  # the first keys are seen most: longest first
    i_b = (i_head // n_kv_heads).to(tl.int64)
    i_h = (i_head % n_kv_heads).to(tl.int64)
    k_ptr += i_b * stride_k_b + i_h * stride_k_h
    v_ptr += i_b * stride_v_b + i_h * stride_v_h
    dk_ptr += i_b * stride_dk_b + i_h * stride_dk_h
    dv_ptr += i_b * stride_dv_b + i_h * stride_dv_h
    q_ptr += i_b * stride_q_b + i_h * group * stride_q_h
    dout_ptr += i_b * stride_dout_b + i_h * group * stride_dout_h
    row = row_length(n_queries)
    lse_ptr += (i_b * n_heads + i_h * group) * row
    delta_ptr += (i_b * n_heads + i_h * group) * row
    if head_dim_v is None:
        head_dim_v = head_dim
    if slopes_ptr is not None:
        slopes_ptr += i_h * group
    if q_spans_ptr is not None:
        q_spans_ptr += i_b * 3 * row_length(n_queries)
        kv_spans_ptr += i_b * 3 * row_length(n_keys)

    o_s = start_s + tl.arange(0, BLOCK_S)
    b_k = _load_rows(k_ptr, o_s, stride_k_s, n_keys, head_dim, True, MASK_D, BLOCK_D)
    b_v = _load_rows(v_ptr, o_s, stride_v_s, n_keys, head_dim_v, True, MASK_DV, BLOCK_DV)
    b_dk = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_S, BLOCK_DV), dtype=tl.float32)
    # One loop over the group's heads and their queries: a loop in a loop holds more live registers
    # than there are (D = 128: 296 bytes of stack).
    first, end = query_bounds(
        kv_spans_ptr, o_s, start_s, n_queries, n_keys, offset, width, BLOCK_T, BLOCK_S
    )
    n_steps = tl.cdiv(tl.maximum(end - first, 0), BLOCK_T)
    if kv_spans_ptr is not None:
        b_segment_s = tl.load(kv_spans_ptr + o_s)
    for step in range(0, group * n_steps):
        member = (step // n_steps).to(tl.int64)
        start_t = first + step % n_steps * BLOCK_T
        o_t = start_t + tl.arange(0, BLOCK_T)
        of_head = q_ptr + member * stride_q_h
        b_q = _load_some(of_head, o_t, stride_q_t, n_queries, head_dim, MASK_D, BLOCK_D)
        b_lse = tl.load(lse_ptr + member * row + o_t)  # inf past the last, for weights of 0
        of_head = dout_ptr + member * stride_dout_h
        b_dout = _load_some(of_head, o_t, stride_dout_t, n_queries, head_dim_v, MASK_DV, BLOCK_DV)
        b_score = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        # On Hopper dp is made under the exponentials, or of wide heads dv under dscore.
        if LATE and BLOCK_D < 128:
            b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        if cap_scale is not None:
            b_score, b_slope = activate_with_slope(b_score * cap_scale, "tanh")
        if slopes_ptr is not None:
            b_distance = distance(o_t[None, :], o_s[:, None], n_queries, n_keys)
            b_score -= tl.load(slopes_ptr + member) * b_distance
        b_p = tl.exp2(b_score * score_scale - b_lse[None, :])
        if not LATE:  # (on sm_80 a branch spills)
            b_p = tl.where(near(o_t[None, :], o_s[:, None], offset, width), b_p, 0.0)
        elif not_all_near(start_t, start_s, offset, width, BLOCK_T, BLOCK_S):
            b_p = tl.where(near(o_t[None, :], o_s[:, None], offset, width), b_p, 0.0)
        if q_spans_ptr is not None:
            b_segment_t = tl.load(q_spans_ptr + o_t)
            b_p = tl.where(b_segment_s[:, None] == b_segment_t[None, :], b_p, 0.0)
        if LATE and BLOCK_D >= 128:
            b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        if cap_scale is not None:
            b_p *= b_slope
        if not LATE:
            b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        b_delta = tl.load(delta_ptr + member * row + o_t)
        b_dscore = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_dscore.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    _store_rows(dk_ptr, b_dk * scale, o_s, stride_dk_s, n_keys, head_dim, BLOCK_D)
    _store_rows(dv_ptr, b_dv, o_s, stride_dv_s, n_keys, head_dim_v, BLOCK_DV)

"""Attention's backward in one pass for Hopper, for gradients that need not repeat bit for bit.

A program keeps a block of keys and walks over the queries that see it. Beside dk and dv, which stay
in its registers, it makes each query block's share of dq, and the copy engine adds that to an fp32
sum in memory (TMA reduction): five products a tile instead of the two passes' seven, but shares are
added in the order in which they come. Of the options only causal is known here, as in
_attention_hopper; names, shapes and conventions: _attention_kernels.
"""

from ._attention_hopper import _heads, _rows
from ._attention_kernels import _load_rows, _store_rows
from ._attention_masks import query_bounds, row_length, sees
from ._runtime import jit, tl


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset", "width"])
def attention_delta_kernel(
    out_ptr,
    dout_ptr,
    delta_ptr,
    dlse_ptr,
    slopes_ptr,
    q_spans_ptr,
    kv_spans_ptr,
    stride_out_b,
    stride_out_h,
    stride_out_t,
    stride_dout_b,
    stride_dout_h,
    stride_dout_t,
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
    """dout · out - dlse of each row, which attention_backward_q_kernel finds for itself."""
    n_blocks = tl.cdiv(n_queries, BLOCK_T)
    i_head = (tl.program_id(0) // n_blocks).to(tl.int64)
    i_b, i_h = i_head // n_heads, i_head % n_heads
    out_ptr += i_b * stride_out_b + i_h * stride_out_h
    dout_ptr += i_b * stride_dout_b + i_h * stride_dout_h
    if head_dim_v is None:
        head_dim_v = head_dim
    o_t = tl.program_id(0) % n_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < n_queries
    b_out = _load_rows(out_ptr, o_t, stride_out_t, n_queries, head_dim_v, True, MASK_DV, BLOCK_DV)
    b_dout = _load_rows(
        dout_ptr, o_t, stride_dout_t, n_queries, head_dim_v, True, MASK_DV, BLOCK_DV
    )
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        b_delta -= tl.load(dlse_ptr + i_head * row_length(n_queries) + o_t, mask=m_t, other=0.0)
    tl.store(delta_ptr + i_head * row_length(n_queries) + o_t, b_delta, mask=m_t)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset", "width"])
def attention_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_sum_ptr,
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
    stride_dq_b,
    stride_dq_h,
    stride_dq_t,
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
    TMA: tl.constexpr,
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
    dq_sum_ptr += i_b * stride_dq_b + i_h * group * stride_dq_h
    row = row_length(n_queries)
    lse_ptr += (i_b * n_heads + i_h * group) * row
    delta_ptr += (i_b * n_heads + i_h * group) * row
    if head_dim_v is None:
        head_dim_v = head_dim
    queries = _heads(q_ptr, stride_q_h, stride_q_t, group, n_queries, head_dim, BLOCK_T, BLOCK_D)
    douts = _heads(
        dout_ptr, stride_dout_h, stride_dout_t, group, n_queries, head_dim_v, BLOCK_T, BLOCK_DV
    )
    if TMA:
        sums = _heads(
            dq_sum_ptr, stride_dq_h, stride_dq_t, group, n_queries, head_dim, BLOCK_T, BLOCK_D
        )
    # By TMA too: pointers would hold 64-bit registers that the products need.
    lses = tl.make_tensor_descriptor(lse_ptr, [group, n_queries], [row, 1], [1, BLOCK_T])
    deltas = tl.make_tensor_descriptor(delta_ptr, [group, n_queries], [row, 1], [1, BLOCK_T])
    o_s = start_s + tl.arange(0, BLOCK_S)
    b_k = _rows(k_ptr, stride_k_s, n_keys, head_dim, BLOCK_S, BLOCK_D).load([start_s, 0])
    b_v = _rows(v_ptr, stride_v_s, n_keys, head_dim_v, BLOCK_S, BLOCK_DV).load([start_s, 0])
    b_dk = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_S, BLOCK_DV), dtype=tl.float32)
    first, end = query_bounds(
        kv_spans_ptr, o_s, start_s, n_queries, n_keys, offset, width, BLOCK_T, BLOCK_S
    )
    n_steps = tl.cdiv(tl.maximum(end - first, 0), BLOCK_T)
    for step in range(0, group * n_steps):
        member = step // n_steps
        start_t = first + step % n_steps * BLOCK_T
        o_t = start_t + tl.arange(0, BLOCK_T)
        b_q = queries.load([member, start_t, 0]).reshape(BLOCK_T, BLOCK_D)
        b_lse = lses.load([member, start_t]).reshape(BLOCK_T)
        b_score = tl.dot(b_k, b_q.T)
        b_p = tl.exp2(b_score * score_scale - b_lse[None, :])
        # Keys and queries past the last are zeros. But such a key's weight may be inf, and inf · 0
        # is no number: in dq it would meet the others.
        seen = sees(o_t[None, :], o_s[:, None], n_keys, offset, width)
        b_p = tl.where(seen, b_p, 0.0)
        b_dout = douts.load([member, start_t, 0]).reshape(BLOCK_T, BLOCK_DV)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv)
        b_dp = tl.dot(b_v, b_dout.T)
        b_delta = deltas.load([member, start_t]).reshape(BLOCK_T)
        b_dscore = b_p * (b_dp - b_delta[None, :])
        b_dscore = b_dscore.to(b_q.dtype)
        b_dk = tl.dot(b_dscore, b_q, b_dk)
        b_dq = tl.dot(b_dscore.T, b_k)
        if TMA:
            sums.atomic_add([member, start_t, 0], b_dq.reshape(1, BLOCK_T, BLOCK_D))
        else:
            o_d = tl.arange(0, BLOCK_D)
            o_sum = member.to(tl.int64) * stride_dq_h + o_t.to(tl.int64)[:, None] * stride_dq_t
            mask = (o_t < n_queries)[:, None] & (o_d < head_dim)[None, :]
            tl.atomic_add(dq_sum_ptr + o_sum + o_d[None, :], b_dq, mask=mask, sem="relaxed")
    _store_rows(dk_ptr, b_dk * scale, o_s, stride_dk_s, n_keys, head_dim, BLOCK_D)
    _store_rows(dv_ptr, b_dv, o_s, stride_dv_s, n_keys, head_dim_v, BLOCK_DV)

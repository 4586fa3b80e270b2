"""Attention for Hopper with specialized warps: one group fetches blocks by TMA, two compute.

Triton specializes a loop that is single and whose steps are alike, and nothing that it reads from
before may have come through a pointer. So every tile is masked, and of the options only causal is
known here; and the pass to the queries takes lse and delta by TMA, delta from a kernel of its own.
A descriptor takes no stride of 0: the launcher copies what is expanded. Names, shapes and
conventions: _attention_kernels.
"""

from ._attention_kernels import _store_rows
from ._attention_masks import near, query_bounds, row_length, sees
from ._runtime import jit, tl


@jit
def _rows(ptr, stride, n_rows, head_dim, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A descriptor of (n_rows, head_dim), read in blocks of ROWS, zero beyond its shape."""
    return tl.make_tensor_descriptor(
        ptr,
        [n_rows, head_dim],
        # The launcher calls a single row's stride 0, which a descriptor does not take.
        [tl.maximum(stride, 16), 1],  # pyright: ignore  (it must stay the constant 1)
        [ROWS, BLOCK_D],
    )


@jit
def _heads(
    ptr,
    stride_head,
    stride_row,
    n_heads,
    n_rows,
    head_dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A descriptor of (n_heads, n_rows, head_dim), read in blocks of (1, ROWS, BLOCK_D)."""
    return tl.make_tensor_descriptor(
        ptr,
        [n_heads, n_rows, head_dim],
        [tl.maximum(stride_head, 16), tl.maximum(stride_row, 16), 1],  # pyright: ignore
        [1, ROWS, BLOCK_D],  # pyright: ignore
    )


@jit
def _apart(start, size):
    """`start`, as a number of its own, for loads alone.

    Triton (3.6 to 3.9) shares a tile's rows among the computing groups, and the second group's load
    begins half a tile further down; but then so does all else that the same number is used in.
    """
    return start + tl.minimum(size, 0)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset", "width"])
def attention_forward_specialized_kernel(
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
):
    n_blocks = tl.cdiv(n_queries, BLOCK_T)
    i_head = tl.program_id(0) // n_blocks
    start_t = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_T  # longest first
    i_b = (i_head // n_heads).to(tl.int64)
    i_h = (i_head % n_heads).to(tl.int64)
    q_ptr += i_b * stride_q_b + i_h * stride_q_h
    k_ptr += i_b * stride_k_b + i_h // group * stride_k_h
    v_ptr += i_b * stride_v_b + i_h // group * stride_v_h
    out_ptr += i_b * stride_out_b + i_h * stride_out_h
    lse_ptr += i_head.to(tl.int64) * row_length(n_queries)
    if head_dim_v is None:
        head_dim_v = head_dim
    keys = _rows(k_ptr, stride_k_s, n_keys, head_dim, BLOCK_S, BLOCK_D)
    values = _rows(v_ptr, stride_v_s, n_keys, head_dim_v, BLOCK_S, BLOCK_DV)
    o_t = start_t + tl.arange(0, BLOCK_T)
    first = _apart(start_t, n_queries)
    b_q = _rows(q_ptr, stride_q_t, n_queries, head_dim, BLOCK_T, BLOCK_D).load([first, 0])
    b_out = tl.zeros((BLOCK_T, BLOCK_DV), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
    b_max = tl.zeros((BLOCK_T,), dtype=tl.float32) - 1e30
    end = tl.maximum(tl.minimum(start_t + BLOCK_T + offset, n_keys), 0)
    for start_s in tl.range(0, end, BLOCK_S, warp_specialize=True):
        b_k = keys.load([start_s, 0])
        b_score = tl.dot(b_q, b_k.T)
        o_s = start_s + tl.arange(0, BLOCK_S)
        seen = sees(o_t[:, None], o_s[None, :], n_keys, offset, width)
        b_score = tl.where(seen, b_score, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_score, 1) * score_scale)
        b_p = tl.exp2(b_score * score_scale - new_max[:, None])
        shrink = tl.exp2(b_max - new_max)
        b_sum = b_sum * shrink + tl.sum(b_p, 1)
        b_out = b_out * shrink[:, None]
        b_v = values.load([start_s, 0])
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out)
        b_max = new_max
    divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / divisor[:, None]
    _store_rows(out_ptr, b_out, o_t, stride_out_t, n_queries, head_dim_v, BLOCK_DV)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max + tl.log2(divisor))
    tl.store(lse_ptr + o_t, b_lse, mask=o_t < n_queries)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset", "width"])
def attention_backward_q_specialized_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
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
    start_t = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_T  # longest first
    i_b = (i_head // n_heads).to(tl.int64)
    i_h = (i_head % n_heads).to(tl.int64)
    q_ptr += i_b * stride_q_b + i_h * stride_q_h
    k_ptr += i_b * stride_k_b + i_h // group * stride_k_h
    v_ptr += i_b * stride_v_b + i_h // group * stride_v_h
    dout_ptr += i_b * stride_dout_b + i_h * stride_dout_h
    dq_ptr += i_b * stride_dq_b + i_h * stride_dq_h
    lse_ptr += i_head.to(tl.int64) * row_length(n_queries)
    delta_ptr += i_head.to(tl.int64) * row_length(n_queries)
    if head_dim_v is None:
        head_dim_v = head_dim
    keys = _rows(k_ptr, stride_k_s, n_keys, head_dim, BLOCK_S, BLOCK_D)
    values = _rows(v_ptr, stride_v_s, n_keys, head_dim_v, BLOCK_S, BLOCK_DV)
    o_t = start_t + tl.arange(0, BLOCK_T)
    first = _apart(start_t, n_queries)
    b_q = _rows(q_ptr, stride_q_t, n_queries, head_dim, BLOCK_T, BLOCK_D).load([first, 0])
    b_dout = _rows(dout_ptr, stride_dout_t, n_queries, head_dim_v, BLOCK_T, BLOCK_DV).load(
        [first, 0]
    )
    b_lse = tl.make_tensor_descriptor(lse_ptr, [n_queries], [1], [BLOCK_T]).load([first])
    b_delta = tl.make_tensor_descriptor(delta_ptr, [n_queries], [1], [BLOCK_T]).load([first])
    b_dq = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    end = tl.maximum(tl.minimum(start_t + BLOCK_T + offset, n_keys), 0)
    for start_s in tl.range(0, end, BLOCK_S, warp_specialize=True):
        b_k = keys.load([start_s, 0])
        b_score = tl.dot(b_q, b_k.T)
        o_s = start_s + tl.arange(0, BLOCK_S)
        seen = sees(o_t[:, None], o_s[None, :], n_keys, offset, width)
        b_p = tl.exp2(b_score * score_scale - b_lse[:, None])
        b_p = tl.where(seen, b_p, 0.0)
        b_v = values.load([start_s, 0])
        b_dp = tl.dot(b_dout, b_v.T)
        b_dscore = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_dscore.to(b_k.dtype), b_k, b_dq)
    _store_rows(dq_ptr, b_dq * scale, o_t, stride_dq_t, n_queries, head_dim, BLOCK_D)


@jit(do_not_specialize=["n_heads", "group", "n_queries", "n_keys", "offset", "width"])
def attention_backward_kv_specialized_kernel(
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
    queries = _heads(q_ptr, stride_q_h, stride_q_t, group, n_queries, head_dim, BLOCK_T, BLOCK_D)
    douts = _heads(
        dout_ptr, stride_dout_h, stride_dout_t, group, n_queries, head_dim_v, BLOCK_T, BLOCK_DV
    )
    lses = tl.make_tensor_descriptor(lse_ptr, [group, n_queries], [row, 1], [1, BLOCK_T])
    deltas = tl.make_tensor_descriptor(delta_ptr, [group, n_queries], [row, 1], [1, BLOCK_T])
    o_s = start_s + tl.arange(0, BLOCK_S)
    first_s = _apart(start_s, n_keys)
    b_k = _rows(k_ptr, stride_k_s, n_keys, head_dim, BLOCK_S, BLOCK_D).load([first_s, 0])
    b_v = _rows(v_ptr, stride_v_s, n_keys, head_dim_v, BLOCK_S, BLOCK_DV).load([first_s, 0])
    b_dk = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_S, BLOCK_DV), dtype=tl.float32)
    first, end = query_bounds(
        kv_spans_ptr, o_s, start_s, n_queries, n_keys, offset, width, BLOCK_T, BLOCK_S
    )
    n_steps = tl.cdiv(tl.maximum(end - first, 0), BLOCK_T)
    for step in tl.range(0, group * n_steps, warp_specialize=True):
        member = step // n_steps
        start_t = first + step % n_steps * BLOCK_T
        o_t = start_t + tl.arange(0, BLOCK_T)
        b_q = queries.load([member, start_t, 0]).reshape(BLOCK_T, BLOCK_D)
        b_lse = lses.load([member, start_t]).reshape(BLOCK_T)
        b_score = tl.dot(b_k, b_q.T)
        # Past the last query all that is read is 0: a weight of 1 on a gradient of 0.
        b_p = tl.exp2(b_score * score_scale - b_lse[None, :])
        b_p = tl.where(near(o_t[None, :], o_s[:, None], offset, width), b_p, 0.0)
        b_dout = douts.load([member, start_t, 0]).reshape(BLOCK_T, BLOCK_DV)
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv)
        b_dp = tl.dot(b_v, b_dout.T)
        b_delta = deltas.load([member, start_t]).reshape(BLOCK_T)
        b_dscore = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_dscore.to(b_q.dtype), b_q, b_dk)
    _store_rows(dk_ptr, b_dk * scale, o_s, stride_dk_s, n_keys, head_dim, BLOCK_D)
    _store_rows(dv_ptr, b_dv, o_s, stride_dv_s, n_keys, head_dim_v, BLOCK_DV)

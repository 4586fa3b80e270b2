"""Multi-layer perceptrons whose activation is computed inside the matrix product.

    plain:  h = act(x w_upᵀ + b_up)                                   y = h w_downᵀ + b_down
    gated:  h = act(x w_gateᵀ + b_gate) * (x w_upᵀ + b_up)            y = h w_downᵀ + b_down

Gated units: Shazeer 2020, "GLU Variants Improve Transformer", equation 6; relu2: So et al. 2021,
"Primer", section 4.2. Shapes: M rows (all dimensions of x but the last, flattened), C columns of x
and y, F hidden units. x, y (M, C); w_gate, w_up (F, C); w_down (C, F): torch.nn.Linear's shapes.

Strides tell how a weight lies in memory: as Linear's, contiguous, or as GPT-2's Conv1D keeps it,
which is contiguous the other way round and is passed as `weight.t()`. The kernels read both; the
gradient of a weight lies as the weight does, so that none is ever copied into the other layout.

The forward kernel's epilogue turns the accumulators of x w_upᵀ (and x w_gateᵀ, on the same tile of
x) into h. The backward kernel computes dh = dy w_down, and its epilogue multiplies by the
activation's derivative and recomputes h, which dw_down needs. The other products are PyTorch's.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ._activations import (
    ACTIVATIONS,
    FROM_OUTPUT,
    activate,
    activate_with_slope,
    activated,
    slope_from_output,
)
from ._gemm import (
    Tile,
    Tiles,
    columns,
    factor,
    launch_product,
    load,
    load_factor,
    matrix,
    store,
    tile_index,
)
from ._runtime import (
    Specialization,
    autocast,
    autocast_dtype,
    capability,
    check_dtype,
    jit,
    operation,
    tiles_file,
    tl,
    use_triton,
)


def mlp_reference(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str = "gelu",
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """The definition of `mlp`, and its path on CPU tensors."""
    return F.linear(activated(activation, F.linear(x, w_up, b_up)), w_down, b_down)


def gated_mlp_reference(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """The definition of `gated_mlp`, and its path on CPU tensors."""
    h = activated(activation, F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up))
    return F.linear(h, w_down, b_down)


@jit
def _bias(ptr, o_col, n_cols, WIDTH: tl.constexpr):
    cols = o_col + tl.arange(0, WIDTH)
    return tl.load(ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]


@jit(do_not_specialize=["n_rows"])
def _mlp_forward_kernel(
    x_ptr,
    w_gate_ptr,
    w_up_ptr,
    b_gate_ptr,
    b_up_ptr,
    hidden_ptr,
    gate_ptr,
    up_ptr,
    n_rows,
    n_in,
    n_hidden,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    x = matrix(x_ptr, n_rows, n_in, BLOCK_M, BLOCK_K, TMA)
    w_up = factor(w_up_ptr, n_in, n_hidden, BLOCK_K, BLOCK_N, TRANSPOSED, TMA)
    hidden = matrix(hidden_ptr, n_rows, n_hidden, BLOCK_M, WIDTH, TMA)
    if GATED:
        w_gate = factor(w_gate_ptr, n_in, n_hidden, BLOCK_K, BLOCK_N, TRANSPOSED, TMA)
    if KEEP:
        up = matrix(up_ptr, n_rows, n_hidden, BLOCK_M, WIDTH, TMA)
        if GATED:
            gate = matrix(gate_ptr, n_rows, n_hidden, BLOCK_M, WIDTH, TMA)
    n_tiles = tl.cdiv(n_rows, BLOCK_M) * tl.cdiv(n_hidden, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLAT):
        i_m, i_n = tile_index(i_tile, n_rows, n_hidden, BLOCK_M, BLOCK_N)
        o_m = i_m * BLOCK_M
        o_n = i_n * BLOCK_N
        b_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if GATED:
            b_gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for o_k in range(0, n_in, BLOCK_K):
            b_x = load(x, o_m, o_k, n_rows, n_in, BLOCK_M, BLOCK_K, TMA)
            b_w = load_factor(w_up, o_k, o_n, n_in, n_hidden, BLOCK_K, BLOCK_N, TRANSPOSED, TMA)
            b_up = tl.dot(b_x, b_w, b_up, input_precision="ieee")
            if GATED:
                b_w = load_factor(
                    w_gate, o_k, o_n, n_in, n_hidden, BLOCK_K, BLOCK_N, TRANSPOSED, TMA
                )
                b_gate = tl.dot(b_x, b_w, b_gate, input_precision="ieee")
        for i in tl.static_range(BLOCK_N // WIDTH):
            o_col = o_n + i * WIDTH
            c_up = columns(b_up, i, WIDTH)
            if UP_BIAS:
                c_up += _bias(b_up_ptr, o_col, n_hidden, WIDTH)
            if KEEP:  # leaves while the activation is computed
                store(up, c_up, o_m, o_col, n_rows, n_hidden, TMA)
            if GATED:
                c_gate = columns(b_gate, i, WIDTH)
                if GATE_BIAS:
                    c_gate += _bias(b_gate_ptr, o_col, n_hidden, WIDTH)
                c_hidden = activate(c_gate, ACTIVATION) * c_up
            else:
                c_hidden = activate(c_up, ACTIVATION)
            store(hidden, c_hidden, o_m, o_col, n_rows, n_hidden, TMA)
            if KEEP and GATED:
                store(gate, c_gate, o_m, o_col, n_rows, n_hidden, TMA)


@jit(do_not_specialize=["n_rows"])
def _mlp_backward_kernel(
    dy_ptr,
    w_down_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    hidden_ptr,
    n_rows,
    n_in,
    n_hidden,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    UP_IS_HIDDEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    dy = matrix(dy_ptr, n_rows, n_in, BLOCK_M, BLOCK_K, TMA)
    w_down = factor(w_down_ptr, n_in, n_hidden, BLOCK_K, BLOCK_N, TRANSPOSED, TMA)
    dup = matrix(dup_ptr, n_rows, n_hidden, BLOCK_M, WIDTH, TMA)
    if not UP_IS_HIDDEN:
        hidden = matrix(hidden_ptr, n_rows, n_hidden, BLOCK_M, WIDTH, TMA)
    if GATED:
        dgate = matrix(dgate_ptr, n_rows, n_hidden, BLOCK_M, WIDTH, TMA)
    # What the forward kept comes by pointers: outside a pipelined loop each load by TMA would be
    # waited for in turn. Where there is TMA rows are of whole 16 bytes, which Triton is told.
    n_kept = n_hidden
    if TMA:
        ELEMENTS: tl.constexpr = 128 // up_ptr.dtype.element_ty.primitive_bitwidth
        n_kept = n_hidden // ELEMENTS * ELEMENTS
    n_tiles = tl.cdiv(n_rows, BLOCK_M) * tl.cdiv(n_hidden, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLAT):
        i_m, i_n = tile_index(i_tile, n_rows, n_hidden, BLOCK_M, BLOCK_N)
        o_m = i_m * BLOCK_M
        o_n = i_n * BLOCK_N
        b_dhidden = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for o_k in range(0, n_in, BLOCK_K):
            b_dy = load(dy, o_m, o_k, n_rows, n_in, BLOCK_M, BLOCK_K, TMA)
            b_w = load_factor(w_down, o_k, o_n, n_in, n_hidden, BLOCK_K, BLOCK_N, TRANSPOSED, TMA)
            b_dhidden = tl.dot(b_dy, b_w, b_dhidden, input_precision="ieee")
        for i in tl.static_range(BLOCK_N // WIDTH):
            o_col = o_n + i * WIDTH
            c_dhidden = columns(b_dhidden, i, WIDTH)
            c_up = load(up_ptr, o_m, o_col, n_rows, n_kept, BLOCK_M, WIDTH, False).to(tl.float32)
            if UP_IS_HIDDEN:
                c_dup = c_dhidden * slope_from_output(c_up, ACTIVATION)
            elif GATED:
                c_gate = load(gate_ptr, o_m, o_col, n_rows, n_kept, BLOCK_M, WIDTH, False)
                c_act, c_slope = activate_with_slope(c_gate.to(tl.float32), ACTIVATION)
                c_dgate = c_dhidden * c_up * c_slope
                store(dgate, c_dgate, o_m, o_col, n_rows, n_hidden, TMA)
                store(hidden, c_act * c_up, o_m, o_col, n_rows, n_hidden, TMA)
                c_dup = c_dhidden * c_act
            else:
                c_act, c_slope = activate_with_slope(c_up, ACTIVATION)
                store(hidden, c_act, o_m, o_col, n_rows, n_hidden, TMA)
                c_dup = c_dhidden * c_slope
            store(dup, c_dup, o_m, o_col, n_rows, n_hidden, TMA)


# Compiled, not yet timed: registers, spills and shared memory decided.
_SMALL = Tile(64, 32, 128, num_warps=4, num_stages=3)
_UNALIGNED = Tile(64, 64, 32, num_warps=4, num_stages=2, width=16)
_HOPPER_FORWARD = Tiles(
    (
        # The epilogue's blocks leave through one buffer, one after the other: so they are wide.
        # (In the backward 128 columns at once spill 104 bytes.)
        Tile(128, 256, 64, num_warps=8, num_stages=4, tma=True, width=128),
        Tile(128, 128, 64, num_warps=8, num_stages=3),
        _SMALL,
    ),
    _UNALIGNED,
)
_HOPPER_BACKWARD = Tiles(
    (Tile(128, 256, 64, num_warps=8, num_stages=3, tma=True), *_HOPPER_FORWARD.by_size[1:]),
    _UNALIGNED,
)
_PORTABLE = {
    2: Tiles((Tile(128, 128, 32, num_warps=8, num_stages=4), _SMALL), _UNALIGNED),
    4: Tiles(
        (Tile(64, 64, 16, num_warps=4, num_stages=3), Tile(32, 32, 32, num_warps=4, num_stages=3)),
        Tile(32, 32, 16, num_warps=4, num_stages=2),
    ),
}
_INTERPRETER = Tiles(
    (
        Tile(32, 128, 32, num_warps=4, num_stages=1, tma=True),
        Tile(32, 64, 32, num_warps=4, num_stages=1),
    ),
    Tile(16, 64, 16, num_warps=4, num_stages=1, width=32),
)


@functools.cache
def _measured(device_capability: int) -> dict[bool, Tiles]:
    """Whether for the backward: the tiles with the widest as measured here, see `tiles_file`."""
    found = tiles_file()
    if found.get("capability") != device_capability:
        return {}
    rest = _HOPPER_FORWARD.by_size[1:]
    return {
        backward: Tiles((Tile(**fields), *rest), _UNALIGNED)
        for backward, fields in found.get("mlp", ())
    }


def _tiles(device_capability: int, itemsize: int, backward: bool) -> Tiles:
    if device_capability == 0:
        return _INTERPRETER
    if itemsize == 2 and device_capability in (90, 100, 103):
        tiles = _HOPPER_BACKWARD if backward else _HOPPER_FORWARD
        return _measured(device_capability).get(backward) or tiles
    return _PORTABLE[itemsize]


def specializations(capability: int) -> Iterator[Specialization]:
    """How the launchers below can compile the kernels.

    Not the full product, which has thousands: every tile in bf16 and fp32 with gelu's gated
    epilogue, and again with Conv1D's weights (fp16 takes bf16's tiles, and is here once); on the
    widest tile the other costly activations and the plain epilogues; on a narrow one the rest.
    Biases and pre-activations stored come on top of everything here (but for one), so that what
    does without them fits too.
    """
    for backward in (False, True):
        for dtype, itemsize in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
            tiles = _tiles(capability, itemsize, backward)
            for tile in tiles:
                if dtype == "fp16" and tile is not tiles.by_size[0]:
                    continue
                for conv1d in (False, True):
                    unaligned = tile is tiles.unaligned
                    yield _specialization(
                        backward, dtype, tile, True, "gelu", unaligned, conv1d=conv1d
                    )
        yield _specialization(backward, "bf16", tiles.by_size[0], False, "gelu")
        for lean in (False, True):
            yield _specialization(backward, "bf16", tiles.by_size[0], False, "relu2", lean=lean)
        for activation in ACTIVATIONS:
            costly = activation in ("gelu_tanh", "silu")
            tile = tiles.by_size[0 if costly and backward else -1]
            yield _specialization(backward, "bf16", tile, True, activation)
            if backward and activation in FROM_OUTPUT:
                yield _specialization(backward, "bf16", tile, False, activation)
                yield _specialization(backward, "bf16", tile, False, activation, lean=True)


def _specialization(
    backward: bool,
    dtype: str,
    tile: Tile,
    gated: bool,
    activation: str,
    unaligned: bool = False,
    lean: bool = False,
    conv1d: bool = False,
) -> Specialization:
    """`lean`: neither biases nor pre-activations are stored, in the backward they come anew."""
    if backward:
        kernel = _mlp_backward_kernel
        names = "dy_ptr w_down_ptr gate_ptr up_ptr dgate_ptr dup_ptr hidden_ptr"
        options = dict(
            UP_IS_HIDDEN=_up_is_hidden(gated, activation) and not lean, TRANSPOSED=conv1d
        )
    else:
        kernel = _mlp_forward_kernel
        names = "x_ptr w_gate_ptr w_up_ptr b_gate_ptr b_up_ptr hidden_ptr gate_ptr up_ptr"
        options = dict(
            GATE_BIAS=gated and not lean,
            UP_BIAS=not lean,
            KEEP=not lean,
            TRANSPOSED=not conv1d,
        )
    size = "i32" if unaligned else "i32:16"
    return Specialization(
        kernel,
        {name: f"*{dtype}:16" for name in names.split()}
        | dict(n_rows="i32", n_in=size, n_hidden=size),
        dict(ACTIVATION=activation, GATED=gated)
        | options
        | tile.constexprs(1 if backward else 1 + gated),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        matrix=dtype != "fp32",
    )


def _up_is_hidden(gated: bool, activation: str) -> bool:
    """Whether the output alone gives the derivative, so that no pre-activation is kept."""
    return not gated and activation in FROM_OUTPUT


@operation("ponder::mlp")
def _mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, gate, up) of contiguous x (M, C) and weights as `_laid_out` leaves them; gate and up are
    empty where no backward needs them, or it computes them again.

    up is the hidden activations themselves where their derivative follows from them.
    """
    gated = w_gate is not None
    n_rows, n_in = x.shape
    n_hidden = w_up.shape[0]
    hidden = x.new_empty((n_rows, n_hidden))
    up_is_hidden = _up_is_hidden(gated, activation)
    gate = torch.empty_like(hidden) if keep and gated else x.new_empty(0)
    up = torch.empty_like(hidden) if keep and not up_is_hidden else x.new_empty(0)
    if hidden.numel():
        optional = [hidden if t is None else t for t in (w_gate, b_gate, b_up)]
        launch_product(
            _mlp_forward_kernel,
            _tiles(capability(x.device), x.element_size(), backward=False),
            (x, optional[0], w_up, *optional[1:], hidden, gate, up),
            (n_rows, n_in, n_hidden),
            1 + gated,
            ACTIVATION=activation,
            GATED=gated,
            GATE_BIAS=b_gate is not None,
            UP_BIAS=b_up is not None,
            KEEP=keep and not up_is_hidden,
            TRANSPOSED=w_up.is_contiguous(),
        )
    y = F.linear(hidden, w_down, b_down)
    return y, gate, hidden if keep and up_is_hidden else up


@_mlp.register_fake
def _(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, keep):
    shape = (x.shape[0], w_up.shape[0]) if keep else (0,)
    gate = x.new_empty(0 if w_gate is None else shape)
    return torch.empty_like(x), gate, x.new_empty(shape)


@operation("ponder::mlp_backward")
def _mlp_backward(
    dy: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gated: bool,
    up_is_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_gate, d_up, hidden), (M, F) each; d_gate is empty where there is no gate, hidden where
    up is hidden."""
    dup = torch.empty_like(up)
    dgate = torch.empty_like(up) if gated else up.new_empty(0)
    hidden = up.new_empty(0) if up_is_hidden else torch.empty_like(up)
    if up.numel():
        launch_product(
            _mlp_backward_kernel,
            _tiles(capability(dy.device), dy.element_size(), backward=True),
            (dy, w_down, gate, up, dgate, dup, hidden),
            (dy.shape[0], dy.shape[1], up.shape[1]),
            ACTIVATION=activation,
            GATED=gated,
            UP_IS_HIDDEN=up_is_hidden,
            TRANSPOSED=not w_down.is_contiguous(),
        )
    return dgate, dup, hidden


@_mlp_backward.register_fake
def _(dy, w_down, gate, up, activation, gated, up_is_hidden):
    hidden = up.new_empty(0) if up_is_hidden else torch.empty_like(up)
    return torch.empty_like(up) if gated else up.new_empty(0), torch.empty_like(up), hidden


def _setup_context(ctx, inputs, output):
    x, w_gate, w_up, w_down, b_gate, b_up, _, ctx.activation, ctx.keep = inputs
    _, gate, up = output
    ctx.set_materialize_grads(False)  # gate and up have no gradients: no zeros in their place
    kept = (gate, up) if ctx.keep else (b_gate, b_up)
    ctx.save_for_backward(x, w_gate, w_up, w_down, *kept)


def _weight_gradient(w: Tensor, inputs: Tensor, doutputs: Tensor) -> Tensor:
    """dw of outputs = inputs wᵀ, lying in memory as w does."""
    return doutputs.t() @ inputs if w.is_contiguous() else (inputs.t() @ doutputs).t()


def _backward(ctx, dy, *_):
    if dy is None:  # what comes after has no gradient
        return (None,) * 9
    x, w_gate, w_up, w_down, gate, up = ctx.saved_tensors
    gated = w_gate is not None
    up_is_hidden = ctx.keep and _up_is_hidden(gated, ctx.activation)
    if not ctx.keep:
        b_gate, b_up = gate, up
        gate = F.linear(x, w_gate, b_gate) if gated else x.new_empty(0)
        up = F.linear(x, w_up, b_up)
    dy = dy.contiguous()
    dgate, dup, hidden = _mlp_backward(dy, w_down, gate, up, ctx.activation, gated, up_is_hidden)
    if up_is_hidden:
        hidden = up
    need_x, need_gate, need_up, need_down, need_b_gate, need_b_up, need_b_down, *_ = (
        ctx.needs_input_grad
    )
    dx = None
    if need_x:
        dx = dup @ w_up
        dx = torch.addmm(dx, dgate, w_gate) if gated else dx
    return (
        dx,
        _weight_gradient(w_gate, x, dgate) if need_gate else None,
        _weight_gradient(w_up, x, dup) if need_up else None,
        _weight_gradient(w_down, hidden, dy) if need_down else None,
        dgate.sum(0) if need_b_gate else None,
        dup.sum(0) if need_b_up else None,
        dy.sum(0) if need_b_down else None,
        None,
        None,
    )


_mlp.register_autograd(_backward, setup_context=_setup_context)


def _check(name: str, activation: str, x: Tensor, shapes: dict[str, tuple]) -> None:
    """Raise ValueError unless each tensor in `shapes` has its shape, and x's dtype and device."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: activation is {activation!r}; known are {', '.join(ACTIVATIONS)}"
        )
    for argument, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(tensor.shape)}; with x of shape "
                f"{tuple(x.shape)} it needs {shape}"
            )
        same = tensor.dtype == x.dtype or autocast_dtype(x)
        if not same or tensor.device != x.device:
            raise ValueError(
                f"{name}: {argument} is {tensor.dtype} on {tensor.device}; it must be as x, "
                f"{x.dtype} on {x.device}"
            )


def _laid_out(w: Tensor, like: Tensor) -> Tensor:
    """w, contiguous the other way round (Conv1D's) if `like` is, else contiguous; copied if not."""
    if like.is_contiguous() or not like.t().is_contiguous():
        return w.contiguous()
    return w.t().contiguous().t()


def _fused(
    name: str, activation: str, recompute: bool, x: Tensor, *parameters: Tensor | None
) -> Tensor:
    """`parameters`: w_gate, w_up, w_down, b_gate, b_up, b_down."""
    cast: tuple[Any, ...] = autocast(x.reshape(-1, x.shape[-1]), *parameters)
    rows, w_gate, w_up, w_down, *biases = cast
    check_dtype(name, "x", rows.dtype)
    inputs = [
        rows.contiguous(),
        None if w_gate is None else _laid_out(w_gate, w_up),
        _laid_out(w_up, w_up),
        _laid_out(w_down, w_down),
        *(b if b is None else b.contiguous() for b in biases),
    ]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return _mlp(*inputs, activation, keep and not recompute)[0].view(x.shape)


def _plain(reference: Callable[..., Tensor], recompute: bool, *inputs) -> Tensor:
    """The path on CPU tensors."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(reference, *inputs, use_reentrant=False, preserve_rng_state=False)
    return reference(*inputs)


def mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "gelu",
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Multi-layer perceptron of one hidden layer: y = act(x w_upᵀ + b_up) w_downᵀ + b_down.

    x (..., C), w_up (F, C), w_down (C, F), b_up (F,), b_down (C,) in fp32 (IEEE products), fp16 or
    bf16; y as x. Products accumulate in fp32. Activations: relu, relu2 (relu squared), gelu (by
    erf), gelu_tanh, silu, sigmoid, tanh, identity.

    Weights may be contiguous (torch.nn.Linear's) or transposed views of contiguous ones (pass a
    Conv1D's `weight.t()`); both are read as they lie, and their gradients lie as they do. Anything
    else is copied.

    Kept for the backward, beside x: 2 F bytes a token (4 F in fp32). For relu, relu2, sigmoid, tanh
    and identity they hold the hidden activations, whose derivative follows from them (relu2' =
    2 relu = 2 sqrt(relu2)); for the others the pre-activations, and the hidden ones are computed
    again. With `recompute`: 0 bytes; the backward starts with one more product, 2 C F operations a
    token on top of 8 C F.

    Raises ValueError for an unknown activation, and for shapes, dtypes or devices that do not fit.
    Sources: Rumelhart, Hinton and Williams 1986; relu2: So et al. 2021, "Primer".
    """
    n_in, n_hidden = x.shape[-1], w_up.shape[0]
    _check(
        "mlp",
        activation,
        x,
        dict(
            w_up=(w_up, (n_hidden, n_in)),
            w_down=(w_down, (n_in, n_hidden)),
            b_up=(b_up, (n_hidden,)),
            b_down=(b_down, (n_in,)),
        ),
    )
    if not use_triton(x):
        return _plain(mlp_reference, recompute, x, w_up, w_down, activation, b_up, b_down)
    return _fused("mlp", activation, recompute, x, None, w_up, w_down, None, b_up, b_down)


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Gated perceptron: y = (act(x w_gateᵀ + b_gate) * (x w_upᵀ + b_up)) w_downᵀ + b_down.

    With silu it is SwiGLU, with gelu GEGLU. x (..., C), w_gate and w_up (F, C), w_down (C, F),
    b_gate and b_up (F,), b_down (C,) in fp32 (IEEE products), fp16 or bf16; y as x. Products
    accumulate in fp32. Activations and the layouts of weights as for `mlp`; w_gate is copied if it
    does not lie as w_up does.

    Kept for the backward, beside x: 4 F bytes a token (8 F in fp32), the pre-activations of gate
    and up (PyTorch keeps twice as much). With `recompute`: 0 bytes; the backward starts with two
    more products, 4 C F operations a token on top of 12 C F.

    Raises ValueError for an unknown activation, and for shapes, dtypes or devices that do not fit.
    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    n_in, n_hidden = x.shape[-1], w_up.shape[0]
    _check(
        "gated_mlp",
        activation,
        x,
        dict(
            w_gate=(w_gate, (n_hidden, n_in)),
            w_up=(w_up, (n_hidden, n_in)),
            w_down=(w_down, (n_in, n_hidden)),
            b_gate=(b_gate, (n_hidden,)),
            b_up=(b_up, (n_hidden,)),
            b_down=(b_down, (n_in,)),
        ),
    )
    parameters = w_gate, w_up, w_down
    biases = b_gate, b_up, b_down
    if not use_triton(x):
        return _plain(gated_mlp_reference, recompute, x, *parameters, activation, *biases)
    return _fused("gated_mlp", activation, recompute, x, *parameters, *biases)

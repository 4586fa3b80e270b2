import importlib

import pytest
import torch

from ponder.kernels import gated_mlp, mlp
from ponder.kernels._activations import ACTIVATIONS
from ponder.kernels.mlp import gated_mlp_reference, mlp_reference

from .numerics import DTYPES, EPSILON, check

# (M, C, F). The three ways to cut a product: blocks by TMA (several tiles in both directions, each
# with a remainder; tiles of rows in groups of eight and one more), blocks by pointers (too few
# tiles for TMA), and sizes that allow no wide load; then the smallest of all.
TMA, POINTERS, UNALIGNED = (37, 48, 272), (5, 80, 48), (19, 21, 69)
SHAPES = [TMA, (274, 16, 144), POINTERS, UNALIGNED, (1, 16, 16), (1, 1, 1)]


def weights(count, shape, dtype, device):
    """x (M, C); `count` of (F, C); one of (C, F): scaled as at a model's start."""
    torch.manual_seed(0)
    m, c, f = shape
    x = torch.randn(m, c, dtype=dtype, device=device)
    inner = [torch.randn(f, c, dtype=dtype, device=device) / c**0.5 for _ in range(count)]
    return [x, *inner, torch.randn(c, f, dtype=dtype, device=device) / f**0.5]


def conv1d(inputs):
    """The same values with every weight a transposed view, as a Conv1D's is passed."""
    return [t.t().contiguous().t() if t.dim() == 2 else t for t in inputs]


def check_plain(shape, dtype, device, activation, bias=False, layout=list, **options):
    x, *parameters = weights(1, shape, dtype, device)
    names = "y dx dw_up dw_down"
    if bias:
        _, c, f = shape
        parameters += [torch.randn(n, dtype=dtype, device=device) for n in (f, c)]
        names += " db_up db_down"

    def ours(x, *parameters):
        w_up, w_down, *biases = layout(parameters)
        biases = dict(zip(("b_up", "b_down"), biases, strict=False))
        return mlp(x, w_up, w_down, activation=activation, **biases, **options)

    check(
        ours,
        lambda x, u, d, *biases: mlp_reference(x, u, d, activation, *biases),
        [x, *parameters],
        reduction=max(shape),
        names=names,
    )


def check_gated(shape, dtype, device, activation, biases="", layout=list, **options):
    """`biases`: the names of those that are given, of b_gate, b_up and b_down."""
    x, *parameters = weights(2, shape, dtype, device)
    _, c, f = shape
    given = biases.split()
    parameters += [
        torch.randn(c if b == "b_down" else f, dtype=dtype, device=device) for b in given
    ]

    def ours(x, *parameters):
        w_gate, w_up, w_down, *values = layout(parameters)
        named = dict(zip(given, values, strict=True))
        return gated_mlp(x, w_gate, w_up, w_down, activation=activation, **named, **options)

    def reference(x, w_gate, w_up, w_down, *values):
        named = dict(zip(given, values, strict=True))
        return gated_mlp_reference(x, w_gate, w_up, w_down, activation, **named)

    check(
        ours,
        reference,
        [x, *parameters],
        reduction=max(shape),
        names=" ".join(["y dx dw_gate dw_up dw_down", *(f"d{b}" for b in given)]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype, device):
    check_plain(TMA, dtype, device, activation, bias=True)
    check_gated(TMA, dtype, device, activation, "b_gate b_up b_down")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, dtype, device):
    check_plain(shape, dtype, device, "gelu", bias=True)
    check_plain(shape, dtype, device, "relu2")
    check_gated(shape, dtype, device, "silu")


@pytest.mark.parametrize("biases", ["b_gate", "b_up", "b_down"])
def test_one_bias_alone(biases, device):
    check_gated(POINTERS, torch.float32, device, "silu", biases)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_conv1d_weights(shape, dtype, device):
    check_plain(shape, dtype, device, "gelu_tanh", bias=True, layout=conv1d)
    check_gated(shape, dtype, device, "silu", layout=conv1d)


# One activation of each kind: its derivative follows from the output, or from the pre-activation.
@pytest.mark.parametrize("layout", [list, conv1d])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recompute(dtype, layout, device):
    for shape in (TMA, UNALIGNED):
        for activation in ("relu2", "gelu"):
            check_plain(shape, dtype, device, activation, bias=True, layout=layout, recompute=True)
        biases = "b_gate b_up b_down"
        check_gated(shape, dtype, device, "silu", biases, layout=layout, recompute=True)


def test_a_gradient_lies_as_its_weight(device):
    x, *parameters = weights(2, POINTERS, torch.float32, device)
    for layout in (list, conv1d):
        leaves = [w.detach().requires_grad_() for w in layout(parameters)]
        grads = torch.autograd.grad(gated_mlp(x, *leaves).sum(), leaves)
        assert [g.stride() for g in grads] == [w.stride() for w in leaves]


def test_weights_of_mixed_and_other_layouts(device):
    """Copied where they must be: gate unlike up, and columns of a wider matrix."""
    x, w_gate, w_up, w_down = weights(2, POINTERS, torch.float32, device)

    def ours(x, w_gate, w_up, w_down):
        wider = torch.cat([w_down, w_down], 1)[:, : w_down.shape[1]]
        return gated_mlp(x, *conv1d([w_gate]), w_up, wider)

    names = "y dx dw_gate dw_up dw_down"
    check(ours, gated_mlp_reference, [x, w_gate, w_up, w_down], reduction=80, names=names)


def test_rows_that_no_descriptor_takes(device):
    """140 fp16 are 280 bytes, no multiple of 16, though gate and up together have 560."""
    check_gated((37, 48, 140), torch.float16, device, "silu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4099, 264, 2088), (1030, 256, 1040)])
def test_wide_tiles(shape, dtype):
    """Enough tiles for the widest of them, and for the one after."""
    check_plain(shape, dtype, "cuda", "gelu", bias=True)
    check_plain(shape, dtype, "cuda", "relu2")
    check_gated(shape, dtype, "cuda", "silu", "b_gate b_up b_down")
    check_plain(shape, dtype, "cuda", "gelu_tanh", bias=True, layout=conv1d, recompute=True)
    check_gated(shape, dtype, "cuda", "silu", layout=conv1d, recompute=True)


def test_shapes_reach_every_kind_of_tile(device):
    module = importlib.import_module("ponder.kernels.mlp")
    chosen = [
        module._INTERPRETER.choose(*shape, 1, itemsize=4, processors=4, aligned=True)
        for shape in (TMA, POINTERS, UNALIGNED)
    ]
    assert chosen == list(module._INTERPRETER)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "gelu_tanh", "silu"])
def test_near_zero(activation, device):
    """Small pre-activations, where a careless formula cancels."""
    x, w_up, w_down = weights(1, POINTERS, torch.float32, device)
    inputs = [1e-4 * x, w_up, w_down]
    check(
        lambda *inputs: mlp(*inputs, activation=activation),
        lambda *inputs: mlp_reference(*inputs, activation),
        inputs,
        reduction=80,
        names="y dx dw_up dw_down",
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "sigmoid", "tanh"])
def test_far_from_zero(activation, device):
    """No NaN where an exponential overflows or dies."""
    x, w_up, w_down = weights(1, POINTERS, torch.float32, device)
    inputs = [100 * x, w_up, w_down]
    check(
        lambda *inputs: mlp(*inputs, activation=activation),
        lambda *inputs: mlp_reference(*inputs, activation),
        inputs,
        reduction=80,
        names="y dx dw_up dw_down",
    )


def test_leading_dimensions_and_strides(device):
    x, w_gate, w_up, w_down = weights(2, (24, 16, 40), torch.float32, device)
    x = x.view(4, 6, 16).transpose(0, 1)
    w_gate, w_down = w_gate.t().contiguous().t(), w_down.t().contiguous().t()
    check(
        gated_mlp,
        gated_mlp_reference,
        [x, w_gate, w_up, w_down],
        reduction=40,
        names="y dx dw_gate dw_up dw_down",
    )


def test_no_rows(device):
    x, w_up, w_down = (t.requires_grad_() for t in weights(1, (0, 16, 24), torch.float32, device))
    y = mlp(x, w_up, w_down)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert x.grad.shape == (0, 16)
    assert not w_up.grad.any() and not w_down.grad.any()


def test_only_what_needs_a_gradient_gets_one(device):
    x, w_gate, w_up, w_down = weights(2, POINTERS, torch.float32, device)
    full = [t.clone().requires_grad_() for t in (x, w_gate, w_up, w_down)]
    gated_mlp(*full).sum().backward()
    frozen = [x, w_gate, w_up.requires_grad_(), w_down]
    gated_mlp(*frozen).sum().backward()
    torch.testing.assert_close(w_up.grad, full[2].grad)
    assert x.grad is None and w_gate.grad is None and w_down.grad is None


@pytest.mark.parametrize("layout", [list, conv1d])
@pytest.mark.parametrize("activation, kept", [("relu2", 1), ("gelu", 1), ("gated", 2)])
def test_memory_kept_for_backward(activation, kept, layout, device):
    """So many times F elements a row, as the docstrings say, beside the inputs; or none."""
    m, _, f = POINTERS
    x, *parameters = weights(1 + (kept == 2), POINTERS, torch.float32, device)
    inputs = [t.requires_grad_() for t in (x, *layout(parameters))]
    sizes = []

    def pack(tensor):
        if all(tensor.data_ptr() != t.data_ptr() for t in inputs):
            sizes.append(tensor.numel())
        return tensor

    def forward(**options):
        sizes.clear()
        gated_mlp(*inputs, **options) if kept == 2 else mlp(
            *inputs, activation=activation, **options
        )
        return sum(sizes)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert forward() == kept * m * f
        assert forward(recompute=True) == 0
        with torch.no_grad():
            assert forward() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, device):
    tolerance = 8 * EPSILON[dtype]
    inputs = [t.requires_grad_() for t in weights(1, POINTERS, torch.float32, device)]
    with torch.autocast(device, dtype=dtype):
        y = mlp(*inputs, activation="relu2")
    assert y.dtype == dtype
    y.float().square().sum().backward()
    truth = [t.detach().to(dtype).double().requires_grad_() for t in inputs]
    expected = mlp_reference(*truth, "relu2")
    expected.square().sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, true in zip(inputs, truth, strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - true.grad).norm() < tolerance * true.grad.norm()


def test_unsupported_input_is_named(device):
    x, w_gate, w_up, w_down = weights(2, (3, 16, 24), torch.float32, device)
    with pytest.raises(ValueError, match="activation is 'swish'; known are relu, relu2, gelu"):
        mlp(x, w_up, w_down, activation="swish")
    with pytest.raises(ValueError, match=r"w_down has shape \(24, 16\).*needs \(16, 24\)"):
        mlp(x, w_up, w_up)
    with pytest.raises(ValueError, match=r"w_gate has shape \(23, 16\).*needs \(24, 16\)"):
        gated_mlp(x, w_gate[:23], w_up, w_down)
    with pytest.raises(ValueError, match=r"b_up has shape \(16,\).*needs \(24,\)"):
        mlp(x, w_up, w_down, b_up=w_up[0])
    with pytest.raises(ValueError, match=r"b_gate has shape \(16,\).*needs \(24,\)"):
        gated_mlp(x, w_gate, w_up, w_down, b_gate=w_up[0])
    with pytest.raises(ValueError, match="w_up is torch.float16 on .*as x, torch.float32"):
        mlp(x, w_up.half(), w_down)
    with pytest.raises(ValueError, match="x is torch.float64; supported are"):
        mlp(x.double(), w_up.double(), w_down.double())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_opcheck(gated, activation, device):
    op = torch.ops.ponder.mlp.default
    x, w_gate, w_up, w_down = (
        t.requires_grad_() for t in weights(2, (3, 16, 24), torch.float32, device)
    )
    bias = torch.randn(24, device=device, requires_grad=True)
    gate = (w_gate, w_up, w_down, bias) if gated else (None, w_up, w_down, None)
    for keep in (True, False):  # False: nothing needs a gradient, or the backward recomputes
        torch.library.opcheck(
            torch.ops.ponder.mlp.default, (x, *gate, bias, None, activation, keep)
        )
    still = [t.detach() if isinstance(t, torch.Tensor) else t for t in (x, *gate, bias)]
    torch.library.opcheck(op, (*still, None, activation, False))
    dy, gate, up = x.detach(), torch.randn(3, 24, device=device), torch.rand(3, 24, device=device)
    gate = gate if gated else gate.new_empty(0)
    for up_is_hidden in {False, not gated and activation == "relu2"}:
        inputs = (dy, w_down.detach(), gate, up, activation, gated, up_is_hidden)
        torch.library.opcheck(torch.ops.ponder.mlp_backward.default, inputs)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_in_one_graph(recompute, device):
    x, *parameters = weights(2, POINTERS, torch.float32, device)
    inputs = [t.requires_grad_() for t in (x, *conv1d(parameters))]

    def step(*inputs):
        return gated_mlp(*inputs, recompute=recompute)

    upstream = torch.randn_like(inputs[0])
    eager = torch.autograd.grad(step(*inputs), inputs, upstream)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*inputs), inputs, upstream), eager, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# The CPU path is PyTorch's own; here it is judged against formulas written out in fp64.
FORMULAS = {
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    "identity": lambda x: x,
}


@pytest.mark.cpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cpu_path(activation, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    act = FORMULAS[activation]
    x, w_gate, w_up, w_down = weights(2, (5, 8, 12), torch.float64, "cpu")
    b_gate, b_up, b_down = (torch.randn(n).double() for n in (12, 12, 8))
    torch.testing.assert_close(
        mlp(x, w_up, w_down, activation=activation, b_up=b_up, b_down=b_down),
        act(x @ w_up.t() + b_up) @ w_down.t() + b_down,
    )
    torch.testing.assert_close(
        gated_mlp(
            *(x, w_gate, w_up, w_down),
            activation=activation,
            b_gate=b_gate,
            b_up=b_up,
            b_down=b_down,
        ),
        (act(x @ w_gate.t() + b_gate) * (x @ w_up.t() + b_up)) @ w_down.t() + b_down,
    )


@pytest.mark.cpu
def test_cpu_path_recomputes(monkeypatch):
    """The same gradients; only inputs and what checkpointing needs of them are kept."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [t.requires_grad_() for t in weights(2, (50, 8, 12), torch.float64, "cpu")]
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    for layer, tensors in ((mlp, [inputs[0], *inputs[2:]]), (gated_mlp, inputs)):
        plain = torch.autograd.grad(layer(*tensors).sum(), tensors)
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(*tensors, recompute=True)
        assert sum(sizes) <= sum(t.numel() for t in tensors)
        again = torch.autograd.grad(y.sum(), tensors)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_an_output_without_a_gradient_gives_none(recompute, device):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    x, up, down = (
        torch.randn(s, device=device, requires_grad=True) for s in ((3, 8), (12, 8), (8, 12))
    )
    y = mlp(x, up, down, recompute=recompute)
    (Stop.apply(y).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and up.grad is None and down.grad is None

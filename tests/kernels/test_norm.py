import functools

import pytest
import torch
import torch.nn.functional as F

from ponder.kernels import layer_norm, rms_norm
from ponder.kernels.norm import layer_norm_reference, rms_norm_reference

from .numerics import DTYPES, EPSILON, check, relative_error

# The interpreter takes 2 ms a row, and needs no more of them to see two in one sum.
PROGRAMS = 512 if torch.cuda.is_available() else 8

# One column, less than a block, a power of two, just past one; one row, and a few rows more than
# partial sums of the weight's gradient. With an eps that shows: a tiny one leaves nothing of
# one column's RMS norm's gradient but rounding.
SHAPES = [(1, 1), (3, 5), (2, 7, 64), (1, 129), (PROGRAMS + 3, 40)]
REFERENCE = {rms_norm: rms_norm_reference, layer_norm: layer_norm_reference}
NORMS = pytest.mark.parametrize("norm", REFERENCE, ids=lambda norm: norm.__name__)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    monkeypatch.setattr("ponder.kernels.norm.PROGRAMS", PROGRAMS)


def inputs(shape, dtype, device):
    torch.manual_seed(0)
    x, residual = torch.randn((2, *shape), dtype=dtype, device=device)
    weight, bias = torch.randn((2, shape[-1]), dtype=dtype, device=device)
    return x, weight, bias, residual


def with_residual(norm, **options):
    """The definition's sum and its norm: (y, h)."""

    def reference(x, weight, bias, residual):
        h = x + residual
        return REFERENCE[norm](h, weight, bias, **options).to(x.dtype), h

    return reference


@NORMS
@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape, dtype, norm, device):
    x, weight, bias, _ = inputs(shape, dtype, device)
    for leaves, names in (([x, weight], "y dx dweight"), ([x, weight, bias], "y dx dweight dbias")):
        ours, reference = (functools.partial(f, eps=3.0) for f in (norm, REFERENCE[norm]))
        check(ours, reference, leaves, reduction=x.numel(), names=names)


@NORMS
@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_with_residual(shape, dtype, norm, device):
    check(
        lambda x, w, b, r: norm(x, w, b, residual=r, eps=3.0),
        with_residual(norm, eps=3.0),
        list(inputs(shape, dtype, device)),
        reduction=shape[0] * shape[-1],
        names="y h dx dweight dbias dresidual",
    )


@NORMS
def test_half_branch_on_an_fp32_stream(norm, device):
    _, weight, bias, residual = inputs((33, 40), torch.float32, device)
    x = torch.randn(33, 40, dtype=torch.bfloat16, device=device)
    check(
        lambda x, w, b, r: norm(x, w, b, residual=r),
        with_residual(norm),
        [x, weight, bias, residual],
        reduction=x.numel(),
        names="y h dx dweight dbias dresidual",
    )
    y, h = norm(x, weight, residual=residual)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)


@NORMS
def test_agrees_with_torch(norm, device):
    """The references are ours too, so the definitions are held to PyTorch's once."""
    x, weight, bias, _ = inputs((6, 200), torch.float32, device)
    if norm is layer_norm:
        theirs = F.layer_norm(x, (200,), weight, bias, 0.1)
    else:
        theirs = F.rms_norm(x, (200,), weight, 0.1) + bias
    torch.testing.assert_close(norm(x, weight, bias, eps=0.1), theirs)


@pytest.mark.parametrize("n_cols", [1, 40, 129])
def test_layer_norm_of_constant_rows_is_the_bias(n_cols, device):
    """The rounding of a row's mean, divided by sqrt(eps), must not become the output."""
    x = torch.tensor([[0.0], [1e4], [-9999.123], [3e-3]], device=device).expand(4, n_cols)
    _, weight, bias, _ = inputs((4, n_cols), torch.float32, device)
    x = x.clone().requires_grad_()
    y = layer_norm(x, weight, bias)
    torch.testing.assert_close(y, bias.expand_as(y), rtol=0, atol=1e-5)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    expected = (weight - weight.mean()) / 1e-5**0.5  # nothing is normalized, only scaled
    torch.testing.assert_close(dx, expected.expand_as(dx), rtol=1e-5, atol=1e-3)


@EACH_DTYPE
def test_layer_norm_of_rows_far_from_zero(dtype, device):
    """Rows whose deviations are small beside their mean, at most as wrong as PyTorch's own."""
    x, weight, bias, _ = inputs((7, 300), dtype, device)
    x = x + torch.tensor([1e4, -1e4, 100, 0, -3, 1, 1e3], device=device)[:, None].to(dtype)

    def run(fn, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = fn(*leaves)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    truth = run(layer_norm_reference, *(t.double() for t in (x, weight, bias)))
    ours = run(layer_norm, x, weight, bias)
    theirs = run(lambda x, w, b: F.layer_norm(x, w.shape, w, b), x, weight, bias)
    for label, a, b, t in zip("y dx dweight dbias".split(), ours, theirs, truth, strict=True):
        error, allowed = relative_error(a, t), 1.25 * relative_error(b, t) + 1e-6
        assert error <= allowed, f"{label}: error {error:.2e}, allowed {allowed:.2e}"


@NORMS
def test_large_and_tiny_rows(norm, device):
    _, weight, bias, _ = inputs((4, 40), torch.float32, device)
    x = torch.randn(4, 40, device=device) * torch.tensor([[1e4], [1e-4], [1e15], [0.0]])
    check(norm, REFERENCE[norm], [x, weight, bias], reduction=x.numel())


@NORMS
def test_gradients_repeat_to_the_bit_and_accumulate(norm, device):
    x, weight, bias, residual = inputs((PROGRAMS + 3, 40), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    y, h = norm(x, weight, bias, residual=residual)
    total = (y * torch.linspace(-1, 1, 40, device=device)).sum() + h.sum()
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    for _ in range(2):
        total.backward(retain_graph=True)
    for leaf, gradient in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient)


@NORMS
def test_non_contiguous_and_empty(norm, device):
    x = torch.randn(8, 6, device=device).t()
    weight, bias = torch.randn(8, 2, device=device).unbind(1)
    reference = REFERENCE[norm]
    torch.testing.assert_close(norm(x, weight, bias), reference(x, weight, bias))
    y, h = norm(x, weight, bias, residual=x.flip(0))
    torch.testing.assert_close(y, reference(x + x.flip(0), weight, bias))
    torch.testing.assert_close(h, x + x.flip(0))
    bias = bias.clone().requires_grad_()
    empty = norm(x[:0], weight, bias)
    assert empty.shape == (0, 8)
    (gradient,) = torch.autograd.grad(empty.sum(), bias)
    assert gradient.shape == (8,) and not gradient.any()


@NORMS
def test_on_cpu_tensors(norm, way_on_a_cpu):
    """Where Triton is not."""
    x, weight, bias, residual = inputs((3, 40), torch.float32, "cpu")
    for leaves in ([x, weight], [x, weight, bias]):
        check(norm, REFERENCE[norm], leaves, reduction=x.numel())
    y = norm(x.double(), weight, bias)
    torch.testing.assert_close(y, REFERENCE[norm](x.double(), weight, bias))
    for dtype in (torch.float32, torch.bfloat16):
        # As a model does it: a strided view, and a weight in fp32 whatever x is.
        some = torch.randn(3, 5, 4, 32, dtype=dtype).transpose(1, 2)
        weights = torch.randn(2, 32)[: 1 + (norm is layer_norm)]
        check(norm, REFERENCE[norm], [some, *weights], reduction=some.numel())
    empty = torch.ones(0, 40, requires_grad=True)
    norm(empty, weight).sum().backward()
    assert empty.grad.shape == (0, 40)
    half = x.half()
    y, h = norm(half, weight, bias, residual=residual)
    assert (y.dtype, h.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(y, with_residual(norm)(half, weight, bias, residual)[0])


@NORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_many_rows_are_summed_in_fp32_on_a_cpu(norm, dtype, way_on_a_cpu):
    """PyTorch's layer_norm there sums them in x's dtype: in bf16 5 % off after 4096 rows."""
    x, weight, bias, upstream = inputs((4096, 16), dtype, "cpu")
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found = torch.autograd.grad(norm(*leaves), leaves, upstream)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    true = torch.autograd.grad(REFERENCE[norm](*wide), wide, upstream.double())
    for value, exact in zip(found, true, strict=True):
        assert relative_error(value, exact) <= 2 * EPSILON[dtype]


@NORMS
def test_unsupported_input_is_named(norm, device):
    x = torch.randn(2, 8, device=device)
    weight = torch.ones(8, device=device)
    name = norm.__name__
    with pytest.raises(ValueError, match=f"{name}: x is a single number"):
        norm(x[0, 0], weight[0])
    with pytest.raises(ValueError, match=rf"{name}: weight has shape \(7,\).*needs \(8,\)"):
        norm(x, weight[:7])
    with pytest.raises(ValueError, match=rf"{name}: bias has shape \(1, 8\).*needs \(8,\)"):
        norm(x, weight, weight[None])
    with pytest.raises(ValueError, match=f"{name}: residual is"):
        norm(x, weight, residual=x.half())
    with pytest.raises(ValueError, match=f"{name}: residual is .*and dtype torch.float64$"):
        norm(x.double(), weight.double(), residual=x)
    with pytest.raises(ValueError, match=f"{name}: x is torch.int32"):
        norm(x.int(), weight)
    with pytest.raises(ValueError, match=f"{name}: x has 8193 columns; at most 8192"):
        norm(torch.ones(1, 8193, device=device), torch.ones(8193, device=device))


@pytest.mark.parametrize("centered", [False, True])
def test_opcheck(centered, device):
    x, weight, bias, residual = inputs((3, 16), torch.float32, device)
    op = torch.ops.ponder.norm.default
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    torch.library.opcheck(op, (x, weight, bias, residual, 1e-6, centered))
    torch.library.opcheck(op, (x, weight, None, None, 1e-6, centered))


@NORMS
def test_compiles_whole(norm, device):
    x, weight, bias, residual = inputs((3, 16), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def run(norm):
        y, h = norm(x, weight, bias, residual=residual)
        return y, h, *torch.autograd.grad((y * h).sum(), leaves)

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(norm))

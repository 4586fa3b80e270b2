import math

import pytest
import torch

from ponder.kernels import softmax
from ponder.kernels.softmax import MAX_WHOLE, softmax_reference

from .numerics import DTYPES, check

# One column; less than a block of 256; a block; just past one; the longest row that a program holds
# whole, and one that it takes in blocks, of which the last has one column.
SHAPES = [(3, 1), (2, 5, 65), (1, 256), (4, 257), (2, MAX_WHOLE), (2, MAX_WHOLE + 1)]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(shape, dtype, path):
    torch.manual_seed(0)
    x = 3 * torch.randn(shape, dtype=dtype, device=path)
    check(softmax, softmax_reference, [x], reduction=shape[-1], names="y dx")


@pytest.mark.parametrize("dim", [0, 1, -2, 2])
def test_any_dimension_of_any_strides(dim, path):
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6, device=path).transpose(0, 1)
    check(
        lambda x: softmax(x.transpose(1, 2), dim),
        lambda x: softmax_reference(x.transpose(1, 2), dim),
        [x],
        reduction=6,
        names="y dx",
    )
    one_row = torch.randn(6, 1, device=path).expand(6, 5)
    torch.testing.assert_close(softmax(one_row, dim % 2), torch.softmax(one_row, dim % 2))


@EACH_DTYPE
@pytest.mark.parametrize("n_cols", [40, MAX_WHOLE + 40])
def test_large_logits(n_cols, dtype, path):
    """Near 1e4, near -1e4, both at once, and all alike: nothing overflows or is rounded away."""
    torch.manual_seed(0)
    x = torch.randn(4, n_cols, device=path)
    x += torch.tensor([[1e4], [-1e4], [0], [0]], device=path)
    x[2, ::2], x[2, 1::2], x[3] = -1e4, 1e4, 1e4
    check(softmax, softmax_reference, [x.to(dtype)], reduction=n_cols, names="y dx")
    torch.testing.assert_close(softmax(x[3:]), torch.full_like(x[3:], 1 / n_cols))


@pytest.mark.parametrize("n_cols", [40, MAX_WHOLE + 40])
def test_infinities_and_nan_are_as_in_torch(n_cols, path):
    x = torch.zeros(5, n_cols, device=path)
    x[0, :-2] = -math.inf  # whole blocks of it before the first number
    x[1] = -math.inf
    x[2, 3] = math.inf
    x[3, 3] = math.nan
    y = softmax(x)
    torch.testing.assert_close(y, torch.softmax(x, -1), equal_nan=True)
    assert y[0].tolist() == [0.0] * (n_cols - 2) + [0.5] * 2
    assert y.isnan().all(1).tolist() == [False, True, True, True, False]
    leaf = x[::4].clone().requires_grad_()
    upstream = torch.arange(n_cols, device=path).float()
    (dx,) = torch.autograd.grad(softmax(leaf)[0], leaf, upstream)
    assert dx[0].tolist() == [0.0] * (n_cols - 2) + [-0.25, 0.25] and not dx[1].any()


def test_gradients_accumulate_at_any_scale(path):
    x = torch.randn(3, 40, device=path, requires_grad=True)
    upstream = torch.randn(3, 40, device=path)
    (expected,) = torch.autograd.grad(softmax_reference(x), x, upstream)
    y = softmax(x)
    for scale in (1.0, 1023.0):
        y.backward(scale * upstream, retain_graph=True)
    torch.testing.assert_close(x.grad / 1024, expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape, path):
    x = torch.randn(shape, device=path, requires_grad=True)
    y = softmax(x, 1)
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_unsupported_input_is_named(path):
    x = torch.randn(3, 5, device=path)
    for dim in (2, -3):
        with pytest.raises(ValueError, match=rf"softmax: dim is {dim}; .*at least -2.*less than 2"):
            softmax(x, dim)
    with pytest.raises(ValueError, match="softmax: x is torch.int64"):
        softmax(x.long())


def test_a_single_number_is_a_row_of_one(path):
    assert softmax(torch.tensor(3.0, device=path)) == 1.0


def test_opcheck(device):
    x = torch.randn(3, 40, device=device)[:, :37].requires_grad_()
    torch.library.opcheck(torch.ops.ponder.softmax.default, (x,))


def test_compiles_whole(path):
    x = torch.randn(3, 4, 5, device=path, requires_grad=True)
    compiled = torch.compile(softmax, fullgraph=True, backend="aot_eager")
    ours, truth = compiled(x, 1), softmax_reference(x, 1)
    torch.testing.assert_close(ours, truth)
    gradients = (torch.autograd.grad(y.square().sum(), x) for y in (ours, truth))
    torch.testing.assert_close(*gradients)

"""Arithmetic in bf16 by the interpreter that the other tests rest on, beside PyTorch's."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@triton.jit
def _elementwise(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < N - 1, other=2.5)
    y = tl.load(y_ptr + i)
    less = tl.where(x < y, 1.0, 0.0).to(tl.bfloat16)
    larger = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)  # else it may leave out a NaN
    results = (x + y, x * y, -x, tl.abs(x), larger, less, tl.exp2(x.to(tl.float32)))
    for row in tl.static_range(len(results)):
        tl.store(out_ptr + row * N + i, results[row])


@triton.jit
def _product(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


def test_elementwise():
    x, y = torch.randn(2, 4096).bfloat16()
    x[:4] = torch.tensor([torch.inf, torch.nan, 1e-40, -0.0])
    out = torch.empty(7, 4096, dtype=torch.bfloat16)
    _elementwise[(1,)](x, y, out, 4096)
    x[-1] = 2.5
    truth = [x + y, x * y, -x, x.abs(), torch.maximum(x, y), (x < y).bfloat16(), x.float().exp2()]
    for ours, theirs in zip(out, truth, strict=True):
        torch.testing.assert_close(ours, theirs.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_casts_round_to_nearest_even():
    x = torch.randn(4096) * torch.logspace(-30, 30, 4096)
    x[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2**-133])  # ties, and one below normal numbers
    half = torch.empty(4096, dtype=torch.bfloat16)
    _copy[(1,)](x, half, 4096)
    assert torch.equal(half, x.bfloat16())
    _copy[(1,)](half, x, 4096)
    assert torch.equal(x, half.float())


@triton.jit
def _copy(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


def test_products_accumulate_in_fp32():
    x, y = torch.randn(2, 64, 64).bfloat16()
    out = torch.empty(64, 64)
    _product[(1,)](x, y, out, 64)
    torch.testing.assert_close(out, x.float() @ y.float())

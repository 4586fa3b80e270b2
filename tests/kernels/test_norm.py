import pytest
import torch

from ponder.kernels import rms_norm
from ponder.kernels.norm import rms_norm_reference

from .numerics import check

# One column, less than a block, a power of two, just past one; one row, and rows past the
# 512 partial sums of the weight's gradient.
SHAPES = [(1, 1), (3, 5), (2, 7, 64), (1, 129), (515, 40)]


def with_residual(x, weight, residual):
    h = x + residual
    return rms_norm_reference(h, weight), h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    check(rms_norm, rms_norm_reference, [x, weight], reduction=x.numel(), names="y dx dweight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_with_residual(shape, dtype, device):
    torch.manual_seed(1)
    x, residual = torch.randn((2, *shape), dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    check(
        lambda x, w, r: rms_norm(x, w, residual=r),
        with_residual,
        [x, weight, residual],
        reduction=x.numel(),
        names="y h dx dweight dresidual",
    )


def test_half_branch_on_an_fp32_stream(device):
    torch.manual_seed(2)
    x = torch.randn(33, 40, dtype=torch.float16, device=device)
    weight, residual = torch.randn(40, device=device), torch.randn(33, 40, device=device)

    def reference(x, weight, residual):
        h = x + residual
        return rms_norm_reference(h, weight).to(x.dtype), h

    check(
        lambda x, w, r: rms_norm(x, w, residual=r),
        reference,
        [x, weight, residual],
        reduction=x.numel(),
        names="y h dx dweight dresidual",
    )
    y, h = rms_norm(x, weight, residual=residual)
    assert (y.dtype, h.dtype) == (torch.float16, torch.float32)


def test_non_contiguous_and_empty(device):
    x = torch.randn(8, 6, device=device).t()
    weight = torch.randn(8, device=device)
    torch.testing.assert_close(rms_norm(x, weight), rms_norm_reference(x, weight))
    assert rms_norm(x[:0], weight).shape == (0, 8)


def test_unsupported_input_is_named(device):
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\).*needs \(8,\)"):
        rms_norm(x, torch.ones(7, device=device))
    with pytest.raises(ValueError, match="residual is"):
        rms_norm(x, torch.ones(8, device=device), residual=x.half())
    with pytest.raises(ValueError, match="at most 8192"):
        rms_norm(torch.ones(1, 8193, device=device), torch.ones(8193, device=device))


def test_opcheck(device):
    from ponder.kernels import norm

    x = torch.randn(3, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    torch.library.opcheck(norm._rms_norm, (x, weight, x.detach().clone(), 1e-6))

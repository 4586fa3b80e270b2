"""The machine that compiled kernels run on (tests/ptx): right where PTX is, and wrong elsewhere.

It runs in processes with PONDER_PTX alone, of which test_compiled.py starts some.
"""

import os
import re

import pytest
import torch

if not os.environ.get("PONDER_PTX"):
    pytest.skip("runs where PONDER_PTX names a chip", allow_module_level=True)

import triton
import triton.language as tl

from ponder.tests.ptx import chip
from ponder.tests.ptx.program import Program

HOPPER = os.environ["PONDER_PTX"] == "90"


def product(by_tma: bool):
    """A product of matrices whose loads run ahead: cp.async or TMA, and wgmma or mma."""

    @triton.jit
    def product_kernel(
        a_ptr, b_ptr, c_ptr, M, N, K, TMA: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
    ):
        start_m, start_n = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
        o_m, o_n = start_m + tl.arange(0, BLOCK), start_n + tl.arange(0, BLOCK)
        if TMA:
            a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK, BLOCK_K])
            b = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BLOCK_K, BLOCK])
        b_c = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start_k in range(0, K, BLOCK_K):
            if TMA:
                b_a, b_b = a.load([start_m, start_k]), b.load([start_k, start_n])
            else:
                o_k = start_k + tl.arange(0, BLOCK_K)
                seen = o_k < K
                b_a = tl.load(a_ptr + o_m[:, None] * K + o_k, (o_m < M)[:, None] & seen, 0.0)
                b_b = tl.load(b_ptr + o_k[:, None] * N + o_n, seen[:, None] & (o_n < N), 0.0)
            b_c = tl.dot(b_a, b_b, b_c)
        tl.store(c_ptr + o_m[:, None] * N + o_n, b_c, (o_m < M)[:, None] & (o_n < N))

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        (m, k), n = a.shape, b.shape[1]
        c = torch.empty(m, n)
        grid = (triton.cdiv(m, 64), triton.cdiv(n, 64))
        product_kernel[grid](a, b, c, m, n, k, by_tma, 64, 32, num_stages=3)
        return c

    return run


def matrices(dtype: torch.dtype):
    torch.manual_seed(0)
    return torch.randn(72, 256).to(dtype), torch.randn(256, 136).to(dtype)


LOADS = [False, True] if HOPPER else [False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_tma", LOADS)
def test_products(by_tma, dtype):
    a, b = matrices(dtype)
    run = product(by_tma)
    for _ in range(6):  # the order of all that happens is another each time
        torch.testing.assert_close(run(a, b), a.float() @ b.float(), rtol=1e-5, atol=1e-4)


FAULTS = {  # what is left out of which kernel's PTX
    "barriers": (False, r"bar\.sync\s+0;"),
    "waiting for copies": (False, r"cp\.async\.wait_group\s+\d+;"),
}
if HOPPER:
    FAULTS |= {
        "waiting for products": (False, r"wgmma\.wait_group\.sync\.aligned\s+\d+;"),
        "waiting for TMA": (True, r"@!complete bra\.uni waitLoop;"),
        "bytes that an mbarrier expects": (True, r"@%p\d+ mbarrier\.arrive\.expect_tx.*;"),
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_left_out_shows(fault, monkeypatch):
    by_tma, pattern = FAULTS[fault]
    removed = []

    def faulty(text: str) -> Program:
        text, n = re.subn(pattern, "", text)
        removed.append(n)
        return Program(text)

    monkeypatch.setattr(chip, "Program", faulty)
    run = product(by_tma)
    a, b = matrices(torch.float16)
    right = 0
    for _ in range(12):
        try:
            right += torch.allclose(run(a, b), a.float() @ b.float(), rtol=1e-5, atol=1e-4)
        except RuntimeError:
            pass
    assert removed and removed[0] > 0
    assert right < 12


@pytest.mark.skipif(not HOPPER, reason="only there a fence is needed")
def test_a_missing_fence_shows(monkeypatch):
    """Numbers that were computed go to wgmma by way of shared memory."""

    @triton.jit
    def square_kernel(x_ptr, y_ptr, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)
        x = tl.load(x_ptr + at) * 2
        tl.store(y_ptr + at, tl.dot(x, x))

    x, y = torch.randn(64, 64).half(), torch.empty(64, 64)
    square_kernel[(1,)](x, y, 64)
    torch.testing.assert_close(y, (2 * x).float() @ (2 * x).float(), rtol=1e-5, atol=1e-4)
    square_kernel.device_caches.clear()
    monkeypatch.setattr(
        chip, "Program", lambda text: Program(re.sub("fence.proxy.async.*", "", text))
    )
    with pytest.raises(RuntimeError, match="fence.proxy.async"):
        square_kernel[(1,)](x, y, 64)


def test_what_lies_outside_of_tensors_is_not_read():
    @triton.jit
    def copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y_ptr + i, tl.load(x_ptr + i))

    x, y = torch.randn(128), torch.empty(128)
    copy_kernel[(1,)](x, y, 128)
    assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="in no tensor"):
        copy_kernel[(1,)](x[:64].clone(), y, 128)


def test_numbers():
    """Arithmetic beside PyTorch's: rounding, denormals, NaN, and integers."""

    @triton.jit
    def numbers_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
        results = (x + y, x * y, x / y, -x, tl.abs(x), tl.maximum(x, y), tl.minimum(x, y))
        for row in tl.static_range(len(results)):
            tl.store(out_ptr + row * N + i, results[row].to(tl.float32))

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, y = torch.randn(2, 1024).to(dtype)
        x[:6] = torch.tensor([torch.inf, torch.nan, 1e-40, -0.0, 65519.0, 6e-8])
        y[0] = 1.0
        out = torch.empty(7, 1024)
        numbers_kernel[(1,)](x, y, out, 1024)
        truth = [x + y, x * y, x / y, -x, x.abs(), torch.fmax(x, y), torch.fmin(x, y)]
        for row, (ours, theirs) in enumerate(zip(out, truth, strict=True)):
            if row == 2:  # Triton divides in fp32, and does not round to fp16
                theirs = x.float() / y.float()
            torch.testing.assert_close(ours, theirs.float(), rtol=2**-22, atol=0, equal_nan=True)

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F

from ponder.kernels import mse_loss

from .numerics import DTYPES, check, relative_error

# The package's attribute of this name is the function.
module = importlib.import_module("ponder.kernels.mse_loss")
reference = module.mse_loss_reference

# One element, a scalar; less than a block; a block; past one, with a remainder.
SHAPES = [(1,), (), (3, 5), (2, module.BLOCK // 2), (3, module.BLOCK + 1)]
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def both(reduction):
    return [functools.partial(f, reduction=reduction) for f in (mse_loss, reference)]


@REDUCTIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_loss(shape, dtype, reduction, path):
    torch.manual_seed(0)
    x, target = torch.randn((2, *shape), dtype=dtype, device=path)
    names = "loss dinput dtarget"
    check(*both(reduction), [x, target], reduction=x.numel(), names=names)
    if dtype != torch.float32:  # a 16-bit prediction of an fp32 target
        check(*both(reduction), [x, torch.randn_like(target.float())], reduction=x.numel())


@REDUCTIONS
def test_more_blocks_than_programs(reduction, device, monkeypatch):
    """Three programs take 3, 3 and 1 of 7 blocks."""
    monkeypatch.setattr(module, "PROGRAMS", 3)
    x, target = torch.randn(2, 6 * module.BLOCK + 5, device=device)
    check(*both(reduction), [x, target], reduction=x.numel(), names="loss dinput dtarget")


@REDUCTIONS
def test_agrees_with_torch(reduction, path):
    x, target = torch.randn(2, 3, 50, device=path)
    theirs = F.mse_loss(x, target, reduction=reduction)
    torch.testing.assert_close(mse_loss(x, target, reduction=reduction), theirs)


@REDUCTIONS
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_equal_values(dtype, reduction, path):
    """±1e4, whose squares do not fit fp16; and equal ones, with nothing to lose."""
    torch.manual_seed(0)
    x, target = 1e4 * torch.randn(2, 3, 50, device=path)
    x, target = x.clamp(-6e4, 6e4).to(dtype), target.clamp(-6e4, 6e4).to(dtype)
    fns = both(reduction)
    wide = [t.double().requires_grad_() for t in (x, target)]
    leaves = [t.clone().requires_grad_() for t in (x, target)]
    ours, truth = fns[0](*leaves), fns[1](*wide)
    assert ours.dtype == torch.float32 and relative_error(ours.detach(), truth.detach()) < 1e-6
    gradients = (torch.autograd.grad(y.sum() / 8, t) for y, t in ((ours, leaves), (truth, wide)))
    for a, t in zip(*gradients, strict=True):
        assert relative_error(a, t) < 2 * torch.finfo(dtype).eps
    x.requires_grad_()
    loss = fns[0](x, x.detach())
    assert not loss.any() and not torch.autograd.grad(loss.sum(), x)[0].any()


@REDUCTIONS
def test_only_the_gradient_that_is_asked_for(reduction, path):
    x, target = torch.randn(2, 3, 50, device=path)
    for needs in ((True, False), (False, True)):
        leaves = [t.clone().requires_grad_(n) for t, n in zip((x, target), needs, strict=True)]
        leaf = leaves[needs.index(True)]
        found, expected = (
            torch.autograd.grad(fn(*leaves).sum(), leaf)[0] for fn in both(reduction)
        )
        torch.testing.assert_close(found, expected)


@REDUCTIONS
def test_repeats_to_the_bit_and_accumulates_at_any_scale(reduction, path):
    x, target = torch.randn(2, 3, 5000, device=path)
    x.requires_grad_()
    ours, reference = both(reduction)
    loss = ours(x, target)
    assert torch.equal(loss, ours(x, target))
    upstream = torch.rand_like(loss)
    (expected,) = torch.autograd.grad(reference(x, target), x, 1024 * upstream)
    for scale in (1.0, 1023.0):
        loss.backward(scale * upstream, retain_graph=True)
    torch.testing.assert_close(x.grad, expected)


@REDUCTIONS
def test_non_contiguous_and_empty(reduction, path):
    x = torch.randn(7, 5, device=path).t()
    target = torch.randn(5, 1, device=path).expand(5, 7)
    names = "loss dinput dtarget"
    check(*both(reduction), [x, target], reduction=x.numel(), names=names)
    ours, reference = both(reduction)
    torch.testing.assert_close(ours(x, target), reference(x, target))
    empty = x[:0].clone().requires_grad_()
    loss = ours(empty, target[:0])
    torch.testing.assert_close(loss, reference(empty, target[:0]), equal_nan=True)
    assert torch.autograd.grad(loss.sum(), empty)[0].shape == (0, 7)


def test_unsupported_input_is_named(path):
    x = torch.randn(3, 5, device=path)
    with pytest.raises(ValueError, match=r"mse_loss: reduction is 'avg'.*'mean'"):
        mse_loss(x, x, reduction="avg")
    with pytest.raises(ValueError, match=r"mse_loss: target is \(5,\).*\(3, 5\)"):
        mse_loss(x, x[0])
    with pytest.raises(ValueError, match=r"mse_loss: target is \(3, 5\) torch.float16.*float32"):
        mse_loss(x, x.half())
    with pytest.raises(ValueError, match="mse_loss: input is torch.int64"):
        mse_loss(x.long(), x)


@pytest.mark.parametrize("per_element", [False, True])
def test_opcheck(per_element, device):
    x, target = torch.randn(2, 50, device=device).unbind()
    op = torch.ops.ponder.mse_loss.default
    torch.library.opcheck(op, (x.requires_grad_(), target.requires_grad_(), per_element))


@REDUCTIONS
def test_compiles_whole(reduction, path):
    x, target = torch.randn(2, 3, 5, device=path)
    x.requires_grad_()
    ours, reference = both(reduction)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ours, truth = compiled(x, target), reference(x, target)
    torch.testing.assert_close(ours, truth)
    gradients = (torch.autograd.grad(y.sum(), x) for y in (ours, truth))
    torch.testing.assert_close(*gradients)

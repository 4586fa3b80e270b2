import functools
import math

import pytest
import torch
import torch.nn.functional as F

from ponder.kernels import cross_entropy
from ponder.kernels.cross_entropy import cross_entropy_reference

from .numerics import check

# One class; less than a block of 256; a block; past 256 (blocks of 2048) and past 4096 (of 8192),
# with a remainder; one row and many.
SHAPES = [(3, 1), (2, 5, 65), (1, 256), (4, 2100), (3, 8200)]


@pytest.fixture(params=["kernel", "cpu"])
def path(request, device, monkeypatch):
    """Both ways to compute it: the kernels, and PyTorch's operations on CPU tensors."""
    if request.param == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        return "cpu"
    return device


def logits_and_targets(shape, dtype, device, ignored=()):
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape, dtype=dtype, device=device)
    targets = torch.randint(shape[-1], shape[:-1], device=device)
    targets.view(-1)[list(ignored)] = -100
    return logits, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape, dtype, reduction, path):
    logits, targets = logits_and_targets(shape, dtype, path, ignored=[0] if shape[0] > 1 else [])
    before = logits.clone()
    check(
        functools.partial(cross_entropy, targets=targets, reduction=reduction),
        functools.partial(cross_entropy_reference, targets=targets, reduction=reduction),
        [logits],
        reduction=logits.numel(),
        names="loss dlogits",
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_torch(reduction, path):
    """The reference is ours too, so the definition is held to PyTorch's once."""
    logits, targets = logits_and_targets((6, 300), torch.float32, path, ignored=[1, 4])
    targets[targets == -100] = 7  # an ignore_index that is a class
    mine = cross_entropy(logits, targets, ignore_index=7, reduction=reduction)
    theirs = F.cross_entropy(logits, targets, ignore_index=7, reduction=reduction)
    torch.testing.assert_close(mine, theirs)
    assert mine.dtype == torch.float32


def test_targets_of_any_integer_dtype_and_logits_of_any_strides(path):
    logits, targets = logits_and_targets((4, 300), torch.float32, path)
    truth = F.cross_entropy(logits, targets)
    for x in (logits.t().contiguous().t(), torch.cat((logits, logits), 1)[:, :300]):
        torch.testing.assert_close(cross_entropy(x, targets.int()), truth)
    rows = logits[:1].expand(4, 300)
    torch.testing.assert_close(cross_entropy(rows, targets), F.cross_entropy(rows, targets))


def test_every_upstream_scale_and_repeated_backward(path):
    logits, targets = logits_and_targets((4, 65), torch.float32, path, ignored=[2])
    logits.requires_grad_()
    loss = cross_entropy(logits, targets)
    (expected,) = torch.autograd.grad(cross_entropy_reference(logits, targets), logits)
    for _ in range(2):
        (1024 * loss).backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 2048 * expected)


def test_no_valid_target_gives_zero(path):
    logits = torch.randn(3, 65, device=path, requires_grad=True)
    targets = torch.full((3,), -100, device=path)
    assert F.cross_entropy(logits, targets).isnan()  # what the docstring says of PyTorch
    for reduction in ("mean", "sum"):
        loss = cross_entropy(logits, targets, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and not gradient.any()
    empty = logits[:0]
    assert cross_entropy(empty, targets[:0]).item() == 0
    assert cross_entropy(empty, targets[:0], reduction="none").shape == (0,)


@pytest.mark.parametrize("n_cols", [65, 2100])
def test_extreme_logits(n_cols, path):
    """Large logits neither overflow nor cancel; -inf is a class that cannot be."""
    large = torch.zeros(1, n_cols, device=path)
    large[0, -1] = 1e30
    targets = torch.tensor([0], device=path)
    assert cross_entropy(large, targets + n_cols - 1).item() == 0
    assert cross_entropy(large, targets).item() == pytest.approx(1e30)
    barred = torch.full((1, n_cols), -math.inf, device=path)
    barred[0, -2:] = 1.0  # whole blocks are -inf before the first number
    barred.requires_grad_()
    loss = cross_entropy(barred, targets + n_cols - 1)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, barred)
    expected = torch.zeros_like(gradient)
    expected[0, -2:] = torch.tensor([0.5, -0.5])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("wrong", [-1, 65, 2**40])
def test_a_target_out_of_range(wrong, device):
    """Named on the CPU. The kernel itself gives NaN, and leaves the other rows alone."""
    logits, targets = logits_and_targets((3, 65), torch.float32, device)
    truth = F.cross_entropy(logits, targets, reduction="none")
    targets[1] = wrong
    if device == "cpu":
        with pytest.raises(ValueError, match=f"a target is {wrong}; .* less than 65.*-100"):
            cross_entropy(logits, targets)
    logits.requires_grad_()
    losses, _ = torch.ops.ponder.cross_entropy(logits, targets, -100)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]
    torch.testing.assert_close(losses[[0, 2]], truth[[0, 2]])


def test_unsupported_input_is_named(device):
    logits, targets = logits_and_targets((3, 65), torch.float32, device)
    with pytest.raises(ValueError, match=r"reduction is 'avg'.*'mean'"):
        cross_entropy(logits, targets, reduction="avg")
    with pytest.raises(ValueError, match=r"targets are \(2,\).*\(3,\)"):
        cross_entropy(logits, targets[:2])
    with pytest.raises(ValueError, match="targets are torch.float32.*integers"):
        cross_entropy(logits, targets.float())


def test_opcheck(device):
    logits, targets = logits_and_targets((3, 65), torch.float32, device, ignored=[1])
    op = torch.ops.ponder.cross_entropy.default
    torch.library.opcheck(op, (logits.requires_grad_(), targets, -100))


def test_compiles_whole_on_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    logits, targets = logits_and_targets((6, 65), torch.float32, "cpu", ignored=[1])
    logits.requires_grad_()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    loss, truth = compiled(logits, targets), cross_entropy_reference(logits, targets)
    torch.testing.assert_close(loss, truth)
    (gradient,), (expected,) = (torch.autograd.grad(y, logits) for y in (loss, truth))
    torch.testing.assert_close(gradient, expected)

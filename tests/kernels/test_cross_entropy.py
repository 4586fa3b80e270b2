import functools
import math

import pytest
import torch
import torch.nn.functional as F

from ponder.kernels import cross_entropy, linear_cross_entropy
from ponder.kernels.cross_entropy import cross_entropy_reference

from .numerics import DTYPES, check

# One class; less than a block of 256; a block; past 256 (blocks of 2048) and past 4096 (of 8192),
# with a remainder; one row and many.
SHAPES = [(3, 1), (2, 5, 65), (1, 256), (4, 2100), (3, 8200)]
OFF = [0.0, 0.0, 0.0]  # the options, to the operation itself
# Each option alone, and all of them together.
EACH: list[dict] = [dict(label_smoothing=0.1), dict(z_loss=0.01), dict(softcap=2.0)]
OPTIONS = pytest.mark.parametrize(
    "options", [*EACH, EACH[0] | EACH[1] | EACH[2]], ids=["smoothing", "z_loss", "softcap", "all"]
)


def logits_and_targets(shape, dtype, device, ignored=()):
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape, dtype=dtype, device=device)
    targets = torch.randint(shape[-1], shape[:-1], device=device)
    targets.view(-1)[list(ignored)] = -100
    return logits, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
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


@OPTIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_options(shape, dtype, options, path):
    logits, targets = logits_and_targets(shape, dtype, path, ignored=[0] if shape[0] > 1 else [])
    for reduction in ("mean", "none"):
        check(
            functools.partial(cross_entropy, targets=targets, reduction=reduction, **options),
            functools.partial(
                cross_entropy_reference, targets=targets, reduction=reduction, **options
            ),
            [logits],
            reduction=logits.numel(),
            names="loss dlogits",
        )


@pytest.mark.parametrize("options", [{}, *EACH], ids=["plain", "smoothing", "z_loss", "softcap"])
def test_one_class_loses_nothing(options, path):
    """But what the log-sum-exp, here the logit itself, costs."""
    logits = torch.tensor([[0.0], [1e4], [-3.0], [7.0]], device=path, requires_grad=True)
    targets = torch.tensor([0, 0, 0, -100], device=path)
    losses = cross_entropy(logits, targets, reduction="none", **options)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    z_loss = options.get("z_loss", 0)
    expected = torch.tensor([0, z_loss * 1e8, z_loss * 9, 0], device=path)
    torch.testing.assert_close(losses, expected)
    expected = torch.tensor([[0], [z_loss * 2e4], [z_loss * -6], [0]], device=path)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_past_128k(dtype, path):
    logits, targets = logits_and_targets((2, 131_075), dtype, path)
    targets[1] = 131_074
    for options in ({}, EACH[0] | EACH[1] | EACH[2]):
        check(
            functools.partial(cross_entropy, targets=targets, reduction="none", **options),
            functools.partial(
                cross_entropy_reference, targets=targets, reduction="none", **options
            ),
            [logits],
            reduction=logits.shape[1],
            names="loss dlogits",
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_torch(reduction, path):
    """The reference is ours too, so the definition is held to PyTorch's once."""
    logits, targets = logits_and_targets((6, 300), torch.float32, path, ignored=[1, 4])
    targets[targets == -100] = 7  # an ignore_index that is a class
    ours = functools.partial(cross_entropy, logits, targets, ignore_index=7, reduction=reduction)
    theirs = functools.partial(F.cross_entropy, target=targets, ignore_index=7, reduction=reduction)
    torch.testing.assert_close(ours(), theirs(logits))
    smooth = theirs(logits, label_smoothing=0.3)
    torch.testing.assert_close(ours(label_smoothing=0.3), smooth)
    torch.testing.assert_close(ours(softcap=2), theirs(2 * torch.tanh(logits / 2)))
    penalty = (0.1 * logits.logsumexp(-1) ** 2)[targets != 7]
    if reduction == "none":
        penalty = torch.zeros_like(smooth).masked_scatter(targets != 7, penalty)
    else:
        penalty = getattr(penalty, reduction)()
    torch.testing.assert_close(ours(z_loss=0.1), theirs(logits) + penalty)
    assert ours().dtype == torch.float32


def test_targets_of_any_integer_dtype_and_logits_of_any_strides(path):
    logits, targets = logits_and_targets((4, 300), torch.float32, path)
    truth = F.cross_entropy(logits, targets)
    for x in (logits.t().contiguous().t(), torch.cat((logits, logits), 1)[:, :300]):
        torch.testing.assert_close(cross_entropy(x, targets.int()), truth)
    rows = logits[:1].expand(4, 300)
    torch.testing.assert_close(cross_entropy(rows, targets), F.cross_entropy(rows, targets))


@pytest.mark.parametrize("options", [{}, EACH[0] | EACH[1] | EACH[2]], ids=["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_upstream_scale_and_repeated_backward(reduction, options, path):
    logits, targets = logits_and_targets((4, 65), torch.float32, path, ignored=[2])
    logits.requires_grad_()
    loss = cross_entropy(logits, targets, reduction=reduction, **options)
    truth = cross_entropy_reference(logits, targets, reduction=reduction, **options)
    upstream = torch.randn_like(loss)
    (expected,) = torch.autograd.grad(truth, logits, upstream)
    for _ in range(2):
        loss.backward(1024 * upstream, retain_graph=True)
    torch.testing.assert_close(logits.grad / 2048, expected)


@pytest.mark.parametrize("options", [{}, EACH[0] | EACH[1] | EACH[2]], ids=["plain", "all"])
def test_no_valid_target_gives_zero(options, path):
    logits = torch.randn(3, 65, device=path, requires_grad=True)
    targets = torch.full((3,), -100, device=path)
    assert F.cross_entropy(logits, targets).isnan()  # what the docstring says of PyTorch
    for reduction in ("mean", "sum"):
        loss = cross_entropy(logits, targets, reduction=reduction, **options)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and not gradient.any()
    empty = logits[:0]
    assert cross_entropy(empty, targets[:0], **options).item() == 0
    assert cross_entropy(empty, targets[:0], reduction="none", **options).shape == (0,)


@pytest.mark.parametrize("options", [{}, *EACH], ids=["plain", "smoothing", "z_loss", "softcap"])
@pytest.mark.parametrize("kind", ["high", "low", "both", "constant", "sure"])
def test_large_logits(kind, options, path):
    """±1e4: a small loss and its gradient are not rounded away beside them."""
    logits, targets = logits_and_targets((6, 300), torch.float32, path)
    if kind == "both":
        logits[::2] = 1e4 * logits[::2].sign()
        logits[1::2] *= 3e3
    elif kind == "constant":
        logits = torch.tensor([0, 1e4, -1e4, 3, 77.7, 1e-3], device=path)[:, None].repeat(1, 300)
    elif kind == "sure":  # of the target: the loss is small, and so is its gradient
        logits.scatter_(1, targets[:, None], 12.0)
    logits += {"high": 1e4, "low": -1e4, "sure": 1e4}.get(kind, 0)
    check(
        functools.partial(cross_entropy, targets=targets, reduction="none", **options),
        functools.partial(cross_entropy_reference, targets=targets, reduction="none", **options),
        [logits],
        reduction=300,
        names="loss dlogits",
    )


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
    losses, _ = torch.ops.ponder.cross_entropy(logits, targets, -100, OFF)
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
    with pytest.raises(ValueError, match="there are 0 classes"):
        cross_entropy(logits[:, :0], targets)
    with pytest.raises(ValueError, match="targets are torch.float32.*integers"):
        cross_entropy(logits, targets.float())
    for option, value in [
        ("label_smoothing", -0.1),
        ("label_smoothing", 1.5),
        ("z_loss", -1.0),
        ("z_loss", math.inf),
        ("softcap", 0.0),
        ("softcap", -30.0),
        ("softcap", math.nan),
    ]:
        with pytest.raises(ValueError, match=f"cross_entropy: {option} is {value}; it must be"):
            cross_entropy(logits, targets, **{option: value})


@pytest.mark.parametrize("options", [OFF, [0.1, 0.01, 2.0]])
def test_opcheck(options, device):
    logits, targets = logits_and_targets((3, 65), torch.float32, device, ignored=[1])
    op = torch.ops.ponder.cross_entropy.default
    torch.library.opcheck(op, (logits.requires_grad_(), targets, -100, options))


@pytest.mark.parametrize("options", [{}, EACH[0] | EACH[1] | EACH[2]], ids=["plain", "all"])
def test_compiles_whole(options, path):
    logits, targets = logits_and_targets((6, 65), torch.float32, path, ignored=[1])
    logits.requires_grad_()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(logits, targets, **options)
    truth = cross_entropy_reference(logits, targets, **options)
    torch.testing.assert_close(loss, truth)
    (gradient,), (expected,) = (torch.autograd.grad(y, logits) for y in (loss, truth))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("head", [False, True], ids=["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("layout", ["column", "expanded", "reversed"])
def test_targets_lie_in_memory_as_they_like(layout, head, path):
    torch.manual_seed(0)
    table = torch.randint(7, (4, 3), device=path)
    targets = {
        "column": table[:, -1:],
        "expanded": table[:1, :1].expand(4, 1),
        "reversed": table.t().reshape(3, 4).t()[:, 1:2],
    }[layout]
    x, weight = torch.randn(4, 1, 5, device=path), torch.randn(7, 5, device=path)
    truth = F.cross_entropy((x @ weight.t()).view(4, 7), targets.flatten(), reduction="none")
    if head:
        found = linear_cross_entropy(x, weight, targets, reduction="none")
    else:
        found = cross_entropy(x @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(found.flatten(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [False, True], ids=["cross_entropy", "linear_cross_entropy"])
def test_bytes_are_classes(head, path):
    """-100, what is ignored, is 156 in uint8."""
    torch.manual_seed(0)
    targets = torch.tensor([156, 1, 2, 156], dtype=torch.uint8, device=path)
    x, weight = torch.randn(4, 5, device=path), torch.randn(256, 5, device=path)
    logits = x @ weight.t()
    truth = F.cross_entropy(logits, targets.long())
    found = linear_cross_entropy(x, weight, targets) if head else cross_entropy(logits, targets)
    for loss in (found, cross_entropy_reference(logits, targets)):
        torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-5)

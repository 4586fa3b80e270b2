import functools
import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ponder.kernels import linear_cross_entropy

from .numerics import DTYPES, check, relative_error

# The package's attribute of this name is the function.
module = importlib.import_module("ponder.kernels.linear_cross_entropy")
reference = module.linear_cross_entropy_reference

# (shape of x, V): one token; fewer tokens than a chunk; chunks with a remainder, V past a block of
# 256 and not a multiple of the padding; one class; a chunk of one row, V past a block of 2048.
SHAPES = [((1, 8), 5), ((2, 3, 16), 65), ((2, 11, 24), 300), ((3, 4), 1), ((3, 8), 4200)]
OFF = [0.0, 0.0, 0.0]  # the options, to the operations themselves
# Each option alone, and all of them together; the last as a list, as the operations take them.
EACH: list[dict] = [dict(label_smoothing=0.1), dict(z_loss=0.01), dict(softcap=2.0)]
ALL, ON = EACH[0] | EACH[1] | EACH[2], [0.1, 0.01, 2.0]
OPTIONS = pytest.mark.parametrize(
    "options", [*EACH, ALL], ids=["smoothing", "z_loss", "softcap", "all"]
)
PLAIN_OR_ALL = pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])


@pytest.fixture
def path(path, monkeypatch):
    """Both ways to compute it, in chunks of at most 1500 logits however few there are."""
    monkeypatch.setattr(module, "PLAIN", 0)
    monkeypatch.setitem(module.CHUNK, path, 1500)
    return path


def inputs(shape, n_cols, dtype, device, ignored=()):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(n_cols, shape[-1], dtype=dtype, device=device) / shape[-1] ** 0.5
    bias = torch.randn(n_cols, dtype=dtype, device=device)
    targets = torch.randint(n_cols, shape[:-1], device=device)
    targets.view(-1)[list(ignored)] = -100
    return x, weight, bias, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, n_cols", SHAPES)
def test_linear_cross_entropy(shape, n_cols, dtype, reduction, path):
    ignored = [1, 2] if len(shape) == 3 else []
    x, weight, bias, targets = inputs(shape, n_cols, dtype, path, ignored)
    check(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b, reduction=reduction),
        lambda x, w, b: reference(x, w, targets, b, reduction=reduction),
        [x, weight, bias],
        reduction=max(x.numel(), n_cols),
        names="loss dx dweight dbias",
    )
    check(
        functools.partial(linear_cross_entropy, targets=targets, reduction=reduction),
        functools.partial(reference, targets=targets, reduction=reduction),
        [x, weight],
        reduction=max(x.numel(), n_cols),
        names="loss dx dweight",
    )


@OPTIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, n_cols", [s for s in SHAPES if s[1] > 1])
def test_options(shape, n_cols, dtype, options, path):
    ignored = [1, 2] if len(shape) == 3 else []
    x, weight, bias, targets = inputs(shape, n_cols, dtype, path, ignored)
    for reduction in ("mean", "none"):
        kind: dict = dict(reduction=reduction, **options)
        check(
            lambda x, w, b, k=kind: linear_cross_entropy(x, w, targets, bias=b, **k),
            lambda x, w, b, k=kind: reference(x, w, targets, b, **k),
            [x, weight, bias],
            reduction=max(x.numel(), n_cols),
            names="loss dx dweight dbias",
        )


@PLAIN_OR_ALL
def test_a_vocabulary_past_128k(options, path, monkeypatch):
    """In chunks of one row."""
    monkeypatch.setitem(module.CHUNK, path, 2**17)
    x, weight, bias, targets = inputs((2, 4), 131_075, torch.float32, path)
    check(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b, **options),
        lambda x, w, b: reference(x, w, targets, b, **options),
        [x, weight, bias],
        reduction=len(weight),
        names="loss dx dweight dbias",
    )


@pytest.mark.parametrize("options", [{}, *EACH], ids=["plain", "smoothing", "z_loss", "softcap"])
def test_large_logits(options, path):
    """Up to about ±1e4, and rows of equal logits."""
    x, weight, bias, targets = inputs((22, 24), 300, torch.float32, path)
    x[::2] *= 4e3
    x[1::4] = 0
    check(
        lambda x, w: linear_cross_entropy(x, w, targets, reduction="sum", **options),
        lambda x, w: reference(x, w, targets, reduction="sum", **options),
        [x, weight],
        reduction=x.numel(),
        names="loss dx dweight",
    )


@pytest.mark.cpu
def test_few_logits_take_the_plain_operations(monkeypatch):
    """The third way to compute it: nothing is chunked, and the answer is the same."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(module, "_in_chunks", None)
    x, weight, bias, targets = inputs((2, 3, 16), 65, torch.float32, "cpu", [1])
    for reduction, options in itertools.product(("mean", "sum", "none"), ({}, ALL)):
        kind: dict = dict(reduction=reduction, **options)
        check(
            lambda x, w, b, k=kind: linear_cross_entropy(x, w, targets, bias=b, **k),
            lambda x, w, b, k=kind: reference(x, w, targets, b, **k),
            [x, weight, bias],
            reduction=x.numel(),
            names="loss dx dweight dbias",
        )


def test_agrees_with_torch(path):
    """The reference is ours too, so the definition is held to PyTorch's once."""
    x, weight, bias, targets = inputs((22, 24), 300, torch.float32, path)
    targets[:3] = 7  # an ignore_index that is a class
    for reduction in ("mean", "sum", "none"):
        mine = linear_cross_entropy(
            x, weight, targets.int(), bias=bias, ignore_index=7, reduction=reduction
        )
        logits = F.linear(x, weight, bias)
        theirs = F.cross_entropy(logits, targets, ignore_index=7, reduction=reduction)
        torch.testing.assert_close(mine, theirs)
        options = dict(reduction=reduction, label_smoothing=0.1)
        mine = linear_cross_entropy(x, weight, targets, bias=bias, **options)
        torch.testing.assert_close(mine, F.cross_entropy(logits, targets, **options))


def test_strided_inputs_stay_as_they_were(path):
    x, weight, bias, targets = inputs((22, 24), 300, torch.float32, path)
    x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    before = [t.clone() for t in (x, weight, bias)]
    check(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b),
        lambda x, w, b: reference(x, w, targets, b),
        [x, weight, bias],
        reduction=x.numel(),
    )
    assert all(torch.equal(a, b) for a, b in zip((x, weight, bias), before, strict=True))


@PLAIN_OR_ALL
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward_accumulates(reduction, options, path):
    leaves = inputs((22, 24), 300, torch.float32, path, [4])
    targets = leaves[3]
    x, weight, bias = (t.requires_grad_() for t in leaves[:3])
    loss = linear_cross_entropy(x, weight, targets, bias=bias, reduction=reduction, **options)
    upstream = torch.randn_like(loss)
    for scale in (1.0, 3.0):
        loss.backward(scale * upstream, retain_graph=True)
    truth = reference(x, weight, targets, bias, reduction=reduction, **options)
    expected = torch.autograd.grad(truth, (x, weight, bias), 4 * upstream)
    torch.testing.assert_close((x.grad, weight.grad, bias.grad), expected)


def test_an_upstream_gradient_past_fp16(path):
    """A loss scale may exceed what fp16 holds although the scaled gradients do not."""
    x, weight, _, targets = inputs((22, 24), 300, torch.float16, path)
    x, weight = x.requires_grad_(), (weight / 64).requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, reduction="sum")
    dx, dweight = torch.autograd.grad(loss, (x, weight), torch.tensor(1e5, device=path))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = torch.autograd.grad(1e5 * reference(*wide, targets, reduction="sum"), wide)
    assert relative_error(dx, truth[0]) < 2**-9
    dweight, truth = dweight[dweight.isfinite()], truth[1][dweight.isfinite()]
    assert len(truth) > 0 and relative_error(dweight, truth) < 2**-9


def test_only_the_gradients_that_are_asked_for(path, monkeypatch):
    x, weight, bias, targets = inputs((6, 24), 300, torch.float32, path)
    seen = []
    original = module._in_chunks

    def spy(*args):
        seen.append(tuple(args[8:]))
        return original(*args)

    monkeypatch.setattr(module, "_in_chunks", spy)
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        leaves = [
            t.clone().requires_grad_(n) for t, n in zip((x, weight, bias), needs, strict=True)
        ]
        leaf = leaves[needs.index(True)]
        for reduction in ("mean", "none"):
            loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction=reduction)
            truth = reference(*leaves[:2], targets, leaves[2], reduction=reduction)
            found, expected = (torch.autograd.grad(y.sum(), leaf)[0] for y in (loss, truth))
            torch.testing.assert_close(found, expected)
        assert seen == [needs, (), needs]
        seen.clear()
    with torch.no_grad():
        loss = linear_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2])
    torch.testing.assert_close(loss, reference(*leaves[:2], targets, leaves[2]).detach())
    assert seen == [()]


@PLAIN_OR_ALL
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_valid_target_gives_zero(n_rows, reduction, options, path):
    x, weight, bias, targets = inputs((n_rows, 8), 65, torch.float32, path, range(n_rows))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = linear_cross_entropy(x, weight, targets, bias=bias, reduction=reduction, **options)
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.item() == 0
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()
    losses = linear_cross_entropy(x, weight, targets, reduction="none", **options)
    assert losses.shape == (n_rows,) and not losses.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_keeps_losses_and_weight_gradient_in_fp32(reduction, path):
    """At least as near to the truth as PyTorch's own operations under the same autocast."""
    x, weight, bias, targets = inputs((20, 24), 300, torch.float32, path)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def run(fn, leaves):
        loss = fn(*leaves)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    def torch_own(x, w, b):
        return F.cross_entropy(F.linear(x, w, b), targets, reduction=reduction)

    truth = run(torch_own, [t.detach().double().requires_grad_() for t in leaves])
    with torch.autocast(path, torch.bfloat16):
        ours = run(
            lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b, reduction=reduction), leaves
        )
        theirs = run(torch_own, leaves)
    for label, a, b, t in zip("loss dx dweight dbias".split(), ours, theirs, truth, strict=True):
        assert a.dtype == torch.float32
        error, allowed = relative_error(a, t), 1.25 * relative_error(b, t) + 1e-5
        assert error <= allowed, f"{label}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("wrong", [-1, 65, 2**40])
def test_a_target_out_of_range(wrong, path):
    """Named on the CPU. The kernel itself gives NaN."""
    x, weight, _, targets = inputs((3, 8), 65, torch.float32, path)
    targets[1] = wrong
    if path == "cpu":
        with pytest.raises(ValueError, match=f"a target is {wrong}; .* less than 65.*-100"):
            linear_cross_entropy(x, weight, targets)
    if module.use_triton(x):
        needs = (True, False, False)
        args = (x, weight, None, targets, None, -100, OFF, x.dtype)
        total, dx, _, _ = module._total(*args, *needs)
        assert total.isnan()
        assert dx.isnan().any(1).tolist() == [False, True, False]


def test_unsupported_input_is_named(path):
    x, weight, bias, targets = inputs((3, 8), 65, torch.float32, path)
    with pytest.raises(ValueError, match=r"weight is \(65, 7\).*\(V, 8\)"):
        linear_cross_entropy(x, weight[:, :7], targets)
    with pytest.raises(ValueError, match=r"bias is \(64,\).*\(65,\)"):
        linear_cross_entropy(x, weight, targets, bias=bias[:64])
    with pytest.raises(ValueError, match="weight is torch.float16.*torch.float32"):
        linear_cross_entropy(x, weight.half(), targets)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: targets are \(2,\).*\(3,\)"):
        linear_cross_entropy(x, weight, targets[:2])
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        linear_cross_entropy(x, weight, targets, reduction="avg")
    with pytest.raises(ValueError, match="linear_cross_entropy: softcap is 0; it must be positive"):
        linear_cross_entropy(x, weight, targets, softcap=0)


def test_a_second_derivative_raises(path):
    x, weight, _, targets = inputs((3, 8), 65, torch.float32, path)
    x.requires_grad_()
    for reduction in ("mean", "none"):
        loss = (x.sum() * linear_cross_entropy(x, weight, targets, reduction=reduction)).sum()
        with pytest.raises(RuntimeError, match="no second derivative, which create_graph=True"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("options", [OFF, ON])
def test_opcheck(options, path):
    x, weight, bias, targets = inputs((6, 24), 300, torch.float32, path, [2])
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    args = (x, weight, bias, targets)
    rest = (-100, options, x.dtype)
    torch.library.opcheck(torch.ops.ponder.linear_cross_entropy_losses, (*args, *rest))
    needs = (True, True, True)
    torch.library.opcheck(torch.ops.ponder.linear_cross_entropy_total, (*args, None, *rest, *needs))


@PLAIN_OR_ALL
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole(reduction, options, path):
    x, weight, bias, targets = inputs((22, 24), 300, torch.float32, path, [1])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(x, weight, targets, bias=bias, reduction=reduction, **options)
    truth = reference(x, weight, targets, bias, reduction=reduction, **options)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (loss, truth))
    )


PEAK = """
import importlib, re, sys, torch
module = importlib.import_module("ponder.kernels.linear_cross_entropy")
torch.set_num_threads(1)

def peak(n_rows, chunk, fn, **options):
    # MiB of resident memory, at the highest, above where it was, for a forward and a backward.
    module.CHUNK["cpu"], module.PLAIN = chunk, 0
    x = torch.randn(n_rows, 16, requires_grad=True)
    weight = torch.randn(8192, 16, requires_grad=True)
    targets = torch.randint(8192, (n_rows,))
    open("/proc/self/clear_refs", "w").write("5")
    status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
    before = status("VmRSS")
    fn(x, weight, targets, **options).sum().backward()
    return (status("VmHWM") - before) / 1024

ours, plain = module.linear_cross_entropy, module.linear_cross_entropy_reference
options = dict(label_smoothing=0.1, z_loss=0.01, softcap=2.0)
peak(512, 2**19, ours)  # the first run also loads code
print(peak(2048, 2**19, plain))
for kind in ({}, dict(reduction="none"), options):
    for n_rows, chunk in ((512, 2**19), (2048, 2**19), (2048, 2**22)):
        print(peak(n_rows, chunk, ours, **kind))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_grows_with_the_chunk_and_not_with_the_tokens():
    """Measured in a process of its own, whose freed memory goes back at once."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    # In MiB: 64 of logits in all; 2 or 16 in a chunk; small x, weight and gradients.
    plain, *ours = map(float, run.stdout.split())
    assert plain > 64, f"all the logits at once took {plain:.1f} MiB: the measure is blind"
    assert len(ours) == 9
    for few, many, tall in (ours[:3], ours[3:6], ours[6:]):
        assert many < few + 4, f"four times the tokens took {many:.1f} MiB after {few:.1f}"
        assert many < 8, f"{many:.1f} MiB for a buffer of 2"
        assert tall > many + 10, f"a chunk eight times as tall took {tall:.1f} MiB after {many:.1f}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_a_gpu(monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cuda", 2**20)

    def peak(n_rows):
        x = torch.randn(n_rows, 64, device="cuda", requires_grad=True)
        weight = torch.randn(8192, 64, device="cuda", requires_grad=True)
        targets = torch.randint(8192, (n_rows,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(x, weight, targets).backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    few, many = peak(1024), peak(8192)
    assert many < few + 16, f"{many:.1f} MiB after {few:.1f}; all the logits are 256"

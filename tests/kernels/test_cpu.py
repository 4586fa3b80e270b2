"""What is written in C for CPU tensors, and how it is compiled."""

import importlib
import subprocess
import tempfile

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ponder import provenance
from ponder.kernels import (
    _attention_cpu,
    _cpu,
    _decode_attention_cpu,
    _native,
    attention,
    cross_entropy,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary,
)
from ponder.kernels._activations import activated
from ponder.kernels._cpu import SOURCE
from ponder.kernels._native import library, threaded_library
from ponder.kernels.cross_entropy import cross_entropy_reference
from ponder.kernels.linear_cross_entropy import linear_cross_entropy_reference
from ponder.kernels.norm import layer_norm_reference, rms_norm_reference
from ponder.models import decoder

from .numerics import EPSILON, relative_error

SOURCES = [SOURCE, _attention_cpu.SOURCE, _decode_attention_cpu.SOURCE, decoder.SOURCE]
REFERENCE = {rms_norm: rms_norm_reference, layer_norm: layer_norm_reference}
FP32, BF16 = torch.float32, torch.bfloat16
losses = importlib.import_module("ponder.kernels.cross_entropy")
linear = importlib.import_module("ponder.kernels.linear_cross_entropy")


pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def calls(monkeypatch):
    """The functions of `_cpu` that are called, by name, as they come."""
    seen = []
    names = "norm", "norm_backward", "rotate", "rotate_backward", "hidden", "hidden_backward"
    for name in (*names, "losses"):
        was = getattr(_cpu, name)

        def recorded(*given, was=was, name=name, **named):
            seen.append(name)
            return was(*given, **named)

        monkeypatch.setattr(_cpu, name, recorded)
    return seen


@pytest.fixture
def few(monkeypatch):
    """The losses take C for few logits, too."""
    monkeypatch.setattr(losses, "FEW", 0)
    monkeypatch.setattr(_cpu, "SHARE", 1)


# Rows of less than a vector, of vectors and a rest; fewer rows than parts, and more.
@pytest.mark.parametrize("shape", [(3, 2), (5, 7), (2, 3, 16), (70, 100), (129, 64)], ids=str)
@pytest.mark.parametrize(
    "dtype, stream", [(FP32, None), (BF16, None), (FP32, FP32), (BF16, BF16), (BF16, FP32)]
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("norm", [rms_norm, layer_norm], ids=lambda norm: norm.__name__)
def test_norms_with_a_residual_stream(norm, biased, shape, dtype, stream, calls):
    """Against fp64 of what came, as it was rounded; both outputs lead to the loss."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    parameters = [torch.randn(shape[-1], requires_grad=True) for _ in range(1 + biased)]
    residual = None if stream is None else torch.randn(shape).to(stream).requires_grad_()
    leaves = [x, *parameters] + [residual] * (residual is not None)
    h = x if residual is None else (x.float() + residual.float()).to(stream)
    wide = h.detach().double().requires_grad_()
    doubles = [p.detach().double().requires_grad_() for p in parameters]
    truth = REFERENCE[norm](wide, *doubles, eps=0.1)
    found = norm(x, *parameters, residual=residual, eps=0.1)
    y, stream_out = found if residual is not None else (found, None)
    upstream, above = torch.randn(shape).to(dtype), torch.randn(shape).to(h.dtype)
    loss, expected = (y * upstream).sum(), (truth * upstream.double()).sum()
    if stream_out is not None:
        assert torch.equal(stream_out, h)
        loss = loss.float() + (stream_out * above).sum()
        expected = expected + (wide * above.double()).sum()
    got = [y, *torch.autograd.grad(loss, leaves)]
    dwide, *dparameters = torch.autograd.grad(expected, [wide, *doubles])
    assert calls == ["norm", "norm_backward"]
    dtypes = [dtype, dtype] + [FP32] * len(parameters) + [stream] * (residual is not None)
    assert [g.dtype for g in got] == dtypes
    sums = 2 * EPSILON[FP32] * x.numel() ** 0.5
    for value, true in zip(got, [truth, dwide, *dparameters, dwide], strict=False):
        assert relative_error(value, true) <= sums + 2 * EPSILON[value.dtype]


def test_the_stream_alone_is_used():
    x, residual = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    _, h = rms_norm(x, weight, residual=residual)
    dx, dresidual, dweight = torch.autograd.grad(h.sum(), [x, residual, weight])
    assert torch.equal(dx, torch.ones(4, 8)) and torch.equal(dresidual, dx)
    assert not dweight.any()


# Less than a vector, several runs of them and a rest.
@pytest.mark.parametrize("shape", [(3,), (5, 1, 700)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", _cpu.ACTIVATIONS)
def test_activations(activation, gated, dtype, shape, calls, monkeypatch):
    """Against fp64: a few units in the last place, where PyTorch's own have some more."""
    monkeypatch.setattr(_cpu, "SHARE", 1)
    torch.manual_seed(0)
    leaves = [(3 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(1 + gated)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn(shape).to(dtype)
    found, truth = activated(activation, *leaves), activated(activation, *wide)
    got = [found, *torch.autograd.grad(found, leaves, upstream)]
    true = [truth, *torch.autograd.grad(truth, wide, upstream.double())]
    assert calls == ["hidden", "hidden_backward"]
    for value, exact in zip(got, true, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, exact) < EPSILON[dtype] + 3 * EPSILON[FP32]


@pytest.mark.parametrize("activation", _cpu.ACTIVATIONS)
def test_activations_at_the_ends(activation):
    """Zero, not a remnant times a large number; what is no number stays one."""
    x = torch.tensor([-torch.inf, -1e38, -1e4, -90.0, 0.0, 90.0, torch.inf, torch.nan])
    y = activated(activation, x.requires_grad_())
    assert torch.equal(y[5:6], x[5:6] ** (2 if activation == "relu2" else 1))
    assert (y[:5].abs() < 2e-36).all() and y[6] == torch.inf and y[7].isnan()
    (slope,) = torch.autograd.grad(y[:6].sum(), x)
    assert (slope[:4].abs() < 2e-36).all() and slope[5] == (180 if activation == "relu2" else 1)


def test_an_activation_keeps_what_it_got_and_no_more():
    """Of a gated one gate and up, not the activation between; of relu² what it gave, which the
    product that follows keeps too."""
    kept = []
    gate, up = torch.randn(2, 5, 16, requires_grad=True).unbind()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        activated("silu", gate, up)
        y = activated("relu2", gate)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in (gate, up, y)]


def test_the_same_bits_whatever_the_threads(few):
    torch.manual_seed(1)
    x, residual = torch.randn(2, 67, 48, dtype=BF16), torch.randn(2, 67, 48)
    weight, q = torch.randn(48, requires_grad=True), torch.randn(2, 3, 67, 16)
    cos, sin = torch.randn(2, 67, 8)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            given = [t.clone().requires_grad_() for t in (x, residual)]
            y, h = rms_norm(given[0], weight, residual=given[1])
            grads = torch.autograd.grad(y.float().square().sum() + h.sum(), [*given, weight])
            gate, up = torch.randn(2, 3000, generator=torch.Generator().manual_seed(2))
            norm = torch.linspace(-1, 1, 16, requires_grad=True)
            turned = rotary(q, q, cos, sin, q_norm=norm, k_norm=norm)
            grads += torch.autograd.grad(turned[0].square().sum() + turned[1].sum(), norm)
            turned += rotary(q, q, cos, sin)
            turned += both_ways(torch.stack([gate, up] * 3), torch.arange(6))
            found.append([y, h, *grads, *turned, activated("silu", gate, up)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_qk_norm_and_rotation_are_one_pass_each_way(dtype, calls):
    """Laid out as attention takes them, and their gradients as the projections do."""
    torch.manual_seed(2)
    q, k = torch.randn(2, 2, 70, 3, 16).to(dtype).transpose(2, 3).unbind()
    norms = [*torch.randn(2, 16).requires_grad_()]
    inputs = [q.requires_grad_(), k.requires_grad_()]
    y = rotary(*inputs, *torch.randn(2, 70, 8), q_norm=norms[0], k_norm=norms[1])
    grads = torch.autograd.grad(y, [*inputs, *norms], [torch.ones_like(x) for x in y])
    assert calls == ["rotate", "rotate_backward"]
    assert all(x.is_contiguous() for x in y)
    assert all(x.transpose(1, 2).is_contiguous() for x in grads[:2])
    assert [x.dtype for x in (*y, *grads)] == [dtype] * 4 + [FP32] * 2


OPTIONS = dict(label_smoothing=0.1, z_loss=1e-2, softcap=3.0)


# Less than a vector; vectors and a rest; several runs of them and a rest.
@pytest.mark.parametrize("width", [3, 48, 2 * 1024 + 77])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "options", [{}, *({k: v} for k, v in OPTIONS.items()), OPTIONS, dict(softcap=1e4)], ids=str
)
def test_cross_entropy(options, dtype, width, calls, few):
    """Of logits that lie in wider rows, most of them below zero, with targets to be ignored."""
    torch.manual_seed(4)
    logits = (2 * torch.randn(7, width + 5) - 5).to(dtype)[:, :width].requires_grad_()
    targets = torch.randint(width, (7,))
    targets[2] = -100
    upstream = torch.randn(7)
    wide = logits.detach().double().requires_grad_()
    found = cross_entropy(logits, targets, reduction="none", **options)
    truth = cross_entropy_reference(wide, targets, reduction="none", **options)
    (got,) = torch.autograd.grad(found, logits, upstream)
    (true,) = torch.autograd.grad(truth, wide, upstream.double())
    assert calls == ["losses", "losses"] and (found.dtype, got.dtype) == (FP32, dtype)
    assert found[2] == 0 and not got[2].any()
    assert relative_error(found, truth) < 8 * EPSILON[FP32]
    assert relative_error(got, true) < 8 * EPSILON[FP32] + EPSILON[dtype]
    mean = cross_entropy(logits, targets, **options)
    torch.testing.assert_close(mean, found.sum() / 6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_in_chunks(reduction, options, dtype, calls, monkeypatch):
    """Logits become their own gradient; with an upstream gradient a row they are computed again."""
    monkeypatch.setattr(linear, "PLAIN", 0)
    # Of 11 rows, 4, 4 and 3; in bf16 a chunk may be four times as large.
    monkeypatch.setitem(linear.CHUNK, "cpu", 4 * 70 if dtype == FP32 else 70)
    torch.manual_seed(5)
    x, weight, bias = torch.randn(11, 16), torch.randn(70, 16), torch.randn(70)
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    targets, upstream = torch.randint(70, (11,)), torch.rand(11) + 0.5
    targets[[3, 8]] = -100
    upstream = upstream if reduction == "none" else upstream[0]

    def both(leaves):
        x, weight, bias = leaves
        f = linear_cross_entropy if leaves[0].dtype == dtype else linear_cross_entropy_reference
        loss = f(x, weight, targets, bias=bias, reduction=reduction, **options)
        return loss, *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))

    got = both(leaves)
    assert calls == ["losses"] * (6 if reduction == "none" else 3)
    for value, true in zip(
        got, both([t.detach().double().requires_grad_() for t in leaves]), strict=True
    ):
        assert relative_error(value, true) < 32 * EPSILON[dtype]


def both_ways(logits, targets):
    logits = logits.requires_grad_()
    found = cross_entropy(logits, targets, reduction="none")
    return found.detach(), *torch.autograd.grad(found.sum(), logits)


def test_losses_of_logits_that_are_large_or_alike(few):
    """Neither a small loss beside large logits is rounded away, nor a long sum off the mark."""
    logits = torch.full((1, 2**17), 1e4 - 20)
    logits[0, 5] = 1e4
    loss, gradient = both_ways(logits, torch.tensor([5]))
    true = ((2**17 - 1) * torch.tensor(-20.0, dtype=torch.float64).exp()).log1p()
    assert loss.item() == pytest.approx(true.item(), abs=8 * EPSILON[FP32])
    assert gradient[0, 5].item() == pytest.approx(-true.item(), abs=8 * EPSILON[FP32])
    logits = torch.full((1, 2**17), 0.3)  # e^(0.3 − 1.5) each: a plain sum of them is 1e-4 off
    logits[0, 0] = 1.5
    loss, _ = both_ways(logits, torch.tensor([7]))
    assert relative_error(loss, cross_entropy_reference(logits.double(), torch.tensor([7]))) < 1e-6
    logits, target = 1e4 + torch.randn(2, 3000), torch.tensor([7, 8])
    logits[1] -= 3e4
    logits[1, 1500:] -= 500.0  # nothing beside what stands before
    options = dict(label_smoothing=0.3)
    truth = cross_entropy_reference(logits.double(), target, **options)
    assert relative_error(cross_entropy(logits, target, **options), truth) < 1e-6


def test_logits_that_lie_in_columns(few):
    logits, targets = torch.randn(40, 6).T, torch.arange(6)
    truth = cross_entropy_reference(logits, targets, reduction="none")
    torch.testing.assert_close(both_ways(logits, targets)[0], truth)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [3, 65])  # in a vector, in the rest
def test_the_loss_of_what_is_no_number_is_pytorchs(value, place, few):
    logits = torch.randn(4, 67)
    logits[1, place], logits[2] = value, value
    targets = torch.tensor([0, 1, 2, place])
    own = logits.clone().requires_grad_()
    truth = torch.nn.functional.cross_entropy(own, targets, reduction="none")
    (gradient,) = torch.autograd.grad(truth.sum(), own)
    for found, true in zip(both_ways(logits, targets), (truth, gradient), strict=True):
        torch.testing.assert_close(found, true.detach(), equal_nan=True)


def test_a_target_that_nobody_looked_at_is_no_number():
    """As on a GPU; a compiled model's targets are not looked at. Nothing beside is read."""
    logits, found = torch.randn(3, 40), torch.empty(3)
    gradient = torch.empty(3, 40)
    targets = torch.tensor([7, -1, 40])
    _cpu.losses(logits, targets, -100, (0.0, 0.0, 0.0), losses=found, dlogits=gradient)
    assert found[1:].isnan().all() and gradient[1:].isnan().all()
    torch.testing.assert_close(found[0], cross_entropy_reference(logits[0], targets[0]))
    assert gradient[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_is_no_number_stays_in_its_row(dtype, value):
    x = torch.randn(3, 40).to(dtype)
    x[1, 37] = value
    found, truth = rms_norm(x, torch.ones(40)), rms_norm_reference(x, torch.ones(40))
    torch.testing.assert_close(found, truth, equal_nan=True)
    assert found[[0, 2]].isfinite().all() and found[1, 37].isnan()


def test_what_looks_at_the_calls_sees_operations(calls, few):
    x, weight = torch.randn(4, 8), torch.ones(8)
    q, cos, sin = torch.randn(1, 2, 3, 8), *torch.randn(2, 3, 4)
    with FlopCounterMode(display=False):
        rms_norm(x, weight)
        layer_norm(x, weight)
        rotary(q, q, cos, sin)
        rotary(q, q, cos, sin, q_norm=weight, k_norm=weight)
        activated("silu", x, x)
        cross_entropy(x, torch.arange(4))
    torch.func.grad(lambda x: rms_norm(x, weight).sum())(x)
    scripted = torch.jit.trace(lambda x: rms_norm(x, weight), x, check_trace=False)
    torch.testing.assert_close(scripted(-x), rms_norm_reference(-x, weight))
    for other in (x.half(), x.double()):  # nor of what C does not know
        rms_norm(other, weight)
        layer_norm(other, weight, weight)
        activated("silu", other)
        cross_entropy(other, torch.arange(4))
    activated("gelu", x, x)
    activated("silu", x, x.bfloat16())
    activated("silu", x, weight)
    assert not calls


def test_without_threads_it_stands_back_for_pytorchs(monkeypatch, anew):
    """As Apple's compiler makes it, which has no OpenMP."""
    monkeypatch.setattr(_native, "CHOICES", tuple(x for x in _native.CHOICES if "openmp" not in x))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            library.cache_clear(), threaded_library.cache_clear()
            torch.set_num_threads(threads)
            assert _cpu.takes(torch.ones(1)) == (threads == 1)
    finally:
        torch.set_num_threads(before)
        library.cache_clear(), threaded_library.cache_clear()


WIDTHS = {
    "4 lanes": ["-march=x86-64"],
    "8 lanes": ["-march=haswell"],
    "16 lanes": ["-march=skylake-avx512"],
    "16 lanes, bf16 products": ["-march=cooperlake"],
    "16 lanes, tiles": ["-march=sapphirerapids"],
}


@pytest.mark.skipif(_native.platform.machine() != "x86_64", reason="names of x86-64 CPUs")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_compiles_without_a_warning_for_every_width_of_vectors(source, width):
    command = _native.compiler()
    assert command is not None, "the tests need a C compiler"
    words = [*command, *_native.COMMON.split(), *WIDTHS[width], "-fopenmp", "-Wall", "-Wextra"]
    words.remove("-shared")  # with which nothing is linked here
    words += ["-Werror", "-fsyntax-only", str(source)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """A process that has not compiled yet, with a cache of its own."""
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "cache"))
    library.cache_clear()
    yield tmp_path / "cache"
    library.cache_clear()


@pytest.mark.skipif("AMX" not in provenance.machine()["processor"], reason="needs a CPU with AMX")
def test_tiles_are_taken_where_the_cpu_has_them(anew, monkeypatch):
    """And give what vectors give, but for the order of sums."""
    torch.manual_seed(0)
    q, k, v, upstream = torch.randn(4, 2, 3, 100, 48, dtype=BF16)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def computed():
        threaded_library.cache_clear(), library.cache_clear()
        out = attention(*leaves, causal=True)
        return out, *torch.autograd.grad(out, leaves, upstream)

    c = library(decoder.SOURCE)
    assert c is not None and (c.step(1), c.step(0)) == (32, 2)
    by_tiles = computed()
    none = tuple(f"{x} -mno-amx-tile -mno-amx-bf16" for x in _native.CHOICES)
    monkeypatch.setattr(_native, "CHOICES", none)
    by_vectors = computed()
    threaded_library.cache_clear()
    assert not all(map(torch.equal, by_tiles, by_vectors))
    for x, y in zip(by_tiles, by_vectors, strict=True):
        assert relative_error(x, y.double()) <= 2 * EPSILON[BF16]


def test_it_is_compiled_once(anew, monkeypatch):
    assert library(SOURCE) is not None
    [made] = anew.iterdir()
    library.cache_clear()
    monkeypatch.setattr(_native, "_compiled", None)
    assert library(SOURCE) is not None and [*anew.iterdir()] == [made]


def test_a_cache_that_is_closed_is_no_obstacle(anew, monkeypatch, tmp_path):
    anew.write_text("a file where the folder would be")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert library(SOURCE) is not None
    assert [*tmp_path.iterdir()] == [anew]  # nothing is left behind


def test_a_user_without_a_home_is_no_obstacle(anew, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_native.Path, "home", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert library(SOURCE) is not None and [*anew.iterdir()]
    library.cache_clear()
    monkeypatch.delenv("PONDER_CACHE")
    assert library(SOURCE) is not None


def test_without_a_compiler_there_is_none(anew, monkeypatch):
    monkeypatch.setenv("PATH", str(anew))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert _native.compiler() is None and library(SOURCE) is None


def test_a_compiler_that_fails_is_told(anew, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'broken: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match="^cpu.c could not be .*: broken: no such header$"):
        assert library(SOURCE) is None
    assert not [*anew.iterdir()]

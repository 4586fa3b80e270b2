"""How a launcher is called: directly in eager PyTorch, as an op where something traces the call."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ponder import kernels
from ponder.kernels import _runtime, norm, rms_norm
from ponder.kernels._runtime import tl


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_tracer_sees_the_op_and_eager_calls_do_without(device, monkeypatch):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    with Seen() as seen:
        traced = torch.autograd.grad(rms_norm(x, weight).sum(), (x, weight))
    assert "ponder.norm.default" in seen.names
    assert "ponder.norm_backward.default" in seen.names

    def refused(*_):
        raise AssertionError("the op was called")

    monkeypatch.setattr(norm._norm, "op", refused)
    monkeypatch.setattr(norm._norm_backward, "op", refused)
    eager = torch.autograd.grad(rms_norm(x, weight).sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_a_second_derivative_is_refused(device):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device)
    y = rms_norm(x, weight)
    for loss in (
        y.square().sum(),
        y.sum(),
    ):  # the gradient of y is one to be differentiated, or not
        with pytest.raises(RuntimeError, match="no second derivative, which create_graph=True"):
            torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
    torch.autograd.grad(y.sum(), x)


def _calls_with_one_argument_elsewhere():
    x, heads, numbers = torch.ones(4, 16), torch.ones(1, 2, 4, 16), torch.zeros(4, dtype=torch.long)
    angles, length = torch.ones(4, 8), torch.ones(1, dtype=torch.long)
    streams = dict(seeds=numbers, positions=numbers)
    yield kernels.attention, (heads, heads, heads), {}, 2, "v"
    yield kernels.decode_attention, (heads, heads, heads, length), {}, 3, "lengths"
    yield kernels.rms_norm, (x, x[0]), {}, 1, "weight"
    yield kernels.rotary, (heads, heads, angles, angles), {}, 3, "sin"
    yield kernels.mse_loss, (x, x), {}, 1, "target"
    yield kernels.cross_entropy, (x, numbers), {}, 1, "targets"
    yield kernels.linear_cross_entropy, (x, x, numbers), {}, 1, "weight"
    yield (
        kernels.sample_tokens,
        (x,),
        streams | dict(temperature=torch.ones(4)),
        None,
        "temperature",
    )
    yield kernels.mlp, (x, x, x.t()), dict(activation="relu"), 1, "w_up"


@pytest.mark.parametrize(
    "fn, args, options, place, name",
    [
        pytest.param(*call, id=f"{call[0].__name__} {call[-1]}")
        for call in _calls_with_one_argument_elsewhere()
    ],
)
def test_a_tensor_on_another_device_is_named(fn, args, options, place, name, device):
    """A kernel would take its address for one of its own device."""
    args = [x.to("meta" if i == place else device) for i, x in enumerate(args)]
    options = {
        k: x.to("meta" if k == name else device) if torch.is_tensor(x) else x
        for k, x in options.items()
    }
    with pytest.raises(ValueError, match=rf"{name} (is|are).* on meta; .* on {device}"):
        fn(*args, **options)


def test_nor_where_the_calls_are_traced(device):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    weight = torch.randn(16, device=device)
    with Seen(), pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(rms_norm(x, weight).sum(), x, create_graph=True)


def test_a_forward_mode_derivative_is_refused(device):
    """PyTorch would give zeros."""
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)

    with pytest.raises(NotImplementedError, match="ponder::norm has no forward-mode derivative"):
        torch.func.jvp(lambda x: rms_norm(x, weight), (x,), (torch.randn_like(x),))


def test_threads_that_launch_first_at_once_meet_whole_modules(monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed here")
    scope = dict(jit=_runtime.jit)
    exec("@jit\ndef inner(): ...\n@jit\ndef outer(): inner()", scope)
    kernels_of_it = [scope["outer"], scope["inner"]] * 2

    def slow(fn, **options):
        time.sleep(0.05)
        return SimpleNamespace(fn=fn)

    def met(kernel) -> set[type]:
        assert kernel.compiled.fn is kernel.fn
        return {type(scope[name]) for name in ("inner", "outer")}

    monkeypatch.setattr(triton, "jit", slow)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == {SimpleNamespace} for found in pool.map(met, kernels_of_it))


def add_kernel(x_ptr, bias_ptr, n, scale, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    pass


ARGUMENTS = dict(x=torch.zeros(64), bias=None, n=3, scale=1.5, BLOCK=16, FLAG=False)
CHANGES = [
    dict(x=torch.zeros(64, dtype=torch.bfloat16)),
    dict(x=torch.zeros(65)[1:]),  # not aligned to 16 bytes
    dict(bias=torch.zeros(4)),
    dict(n=1),
    dict(n=32),
    dict(n=2**31),
    dict(scale=2.5),
    dict(BLOCK=32),
    dict(FLAG=True),
    dict(num_warps=8),
]


@pytest.fixture
def launched():
    """(how often Triton was asked to launch, what was launched), on a chip that is none."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    from triton.runtime.jit import JITFunction

    from ponder.tests.ptx.chip import Compiled, chip

    asked, found = [], []

    class Noted(Compiled):
        def __init__(self, signature):
            self.signature = signature

        def run(self, *args):
            programs, given = args[:3], args[9:]
            found.append((programs, self.signature, given))

    def compiled(kernel, key, signature, device, constexprs, options, attrs, warmup):
        kept = (*signature.values(), *attrs.items(), *constexprs.items(), options.num_warps)
        kernel.device_caches[device][0][key] = made = Noted(repr(kept))
        return made

    run = JITFunction.run

    def counted(*args, **options):
        asked.append(args)
        return run(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", counted)
        with chip(90, compiled, use_triton=lambda x: True, processors=1):
            kernel = JITFunction(add_kernel)

            def start(x, bias, n, scale, programs=5, **constants):
                _runtime.launch(kernel, programs, (x, bias), (n, scale), **constants)

            yield start, asked, found


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_triton_compiled_is_launched_directly(change, launched):
    start, asked, found = launched
    for arguments in (ARGUMENTS, ARGUMENTS | change) * 2:
        start(**arguments)
    assert len(asked) == 2  # once for either
    first, second, *again = found
    assert again == [first, second]
    x, bias, n, scale, block, flag, *_ = (ARGUMENTS | change).values()
    programs, _, (given_x, given_bias, *others) = second
    assert programs == (5, 1, 1)
    assert given_x is x and given_bias is bias and others == [n, scale, block, flag]


def test_a_compiled_kernel_starts_as_triton_starts_it():
    """Triton's own class, whose start of a kernel alone is replaced."""
    triton = pytest.importorskip("triton", reason="Triton is not installed here")
    from triton.runtime.jit import JITFunction

    from ponder.tests.ptx.chip import chip

    starts = []

    def compiled(fn, key, signature, device, constexprs, options, attrs, warmup):
        cache, _, target, _, _ = fn.device_caches[device]
        source = fn.ASTSource(fn, signature, constexprs, attrs)
        cache[key] = made = triton.compile(source, target=target, options=options.__dict__)
        made.module, made.function = "module", "function"  # nothing is loaded
        made._run = lambda *args: starts.append(args)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "tl", triton.language)
        with chip(90, compiled, use_triton=lambda x: True, processors=1):
            kernel, x = JITFunction(add_kernel), torch.zeros(64)
            for _ in range(2):
                _runtime.launch(kernel, 2, (x, None), (3, 1.5), BLOCK=16, FLAG=True, num_warps=2)
    by_triton, direct = ([*args[:6], *args[9:]] for args in starts)  # without hooks
    assert by_triton == direct
    assert direct[:5] == [2, 1, 1, 0, "function"]
    assert direct[6:] == [x, None, 3, 1.5, 16, True]


def test_what_is_launched_directly_has_the_tensors_of_the_call(launched):
    start, asked, found = launched
    for i in range(3):
        start(**ARGUMENTS | dict(x=torch.full((8,), float(i))), programs=(i + 1, 2, 3))
    assert len(asked) == 1
    assert [(programs, float(x[0])) for programs, _, (x, *_) in found] == [
        ((1, 2, 3), 0.0),
        ((2, 2, 3), 1.0),
        ((3, 2, 3), 2.0),
    ]


def test_launches_that_are_kept_have_a_bound(launched, monkeypatch):
    start, asked, found = launched
    monkeypatch.setattr(_runtime, "MOST_LAUNCHED", 3)
    for n in range(2, 12):
        start(**ARGUMENTS | dict(n=n))
        assert len(_runtime._launched) <= 3
    assert [given[2] for _, _, given in found] == list(range(2, 12))


def test_the_sizes_of_tensors_matter_on_amd(launched, monkeypatch):
    """Whether one has more than 2 GB is a part of what Triton compiles for there."""
    start, asked, found = launched
    monkeypatch.setattr(torch.version, "hip", "6.4")
    start(**ARGUMENTS)
    start(**ARGUMENTS)
    assert len(asked) == len(found) == 2


def test_descriptors_take_their_memory_for_the_launch_and_no_longer(monkeypatch):
    import triton

    events = []
    monkeypatch.setattr(triton, "set_allocator", lambda f: events.append("set"))

    class Kernel:
        def __getitem__(self, programs):
            return lambda *args, **options: events.append((programs, args, options))

    _runtime.launch(Kernel(), 3, (None,), (2,), num_warps=4)
    assert events == [((3, 1, 1), (None, 2), dict(num_warps=4))]
    _runtime.launch(Kernel(), 3, (), (1,), descriptors=True)
    assert events[1:] == ["set", ((3, 1, 1), (1,), {})]


@pytest.mark.parametrize(
    "capability, hip, triton", [((7, 5), None, False), ((9, 0), None, True), ((9, 0), "6.4", True)]
)
def test_old_gpus_take_pytorch_and_amd_s_are_no_hopper(capability, hip, triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    caches = _runtime.capability, _runtime._supported
    for cache in caches:
        cache.cache_clear()
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert _runtime.use_triton(tensor) == (triton and _runtime.triton_installed())
    assert (_runtime.capability(torch.device("cuda", 0)) in (90, 100)) == (triton and not hip)
    for cache in caches:
        cache.cache_clear()

import importlib
import inspect

import pytest
import torch

from ponder.kernels import attention
from ponder.kernels.attention import attention_reference

from .numerics import DTYPES, EPSILON, HARDWARE, check, relative_error, run

module = importlib.import_module("ponder.kernels.attention")

# (B, Hq, Hkv, T, S, D, causal). Head dimensions that are a block, that the kernel pads (16, 80,
# 96) and that the launcher pads (20); groups of 1, 2 and 4 heads; a first, a middle and a last
# partial tile both ways (tiles are 32 to 128 here), T < S, T > S (rows that see no key), length 1.
CASES = [
    (2, 2, 1, 17, 17, 16, True),
    (1, 2, 2, 5, 9, 20, False),
    (2, 4, 2, 130, 130, 64, True),
    (1, 4, 1, 70, 131, 80, True),
    (1, 2, 1, 131, 70, 96, True),
    (1, 2, 1, 131, 70, 96, False),
    (1, 1, 1, 65, 65, 128, True),
    (1, 2, 2, 33, 40, 256, True),
    (3, 4, 2, 1, 67, 32, True),
]


def qkv(batch, n_heads, n_kv_heads, n_queries, n_keys, head_dim, dtype, device):
    torch.manual_seed(0)
    q = torch.randn(batch, n_heads, n_queries, head_dim, dtype=dtype, device=device)
    k, v = torch.randn(2, batch, n_kv_heads, n_keys, head_dim, dtype=dtype, device=device)
    return [q, k, v]


def check_attention(inputs, causal, scale=None):
    check(
        lambda q, k, v: attention(q, k, v, causal=causal, scale=scale),
        lambda q, k, v: attention_reference(q, k, v, causal, scale),
        inputs,
        reduction=inputs[1].shape[2] + inputs[0].shape[2] + inputs[0].shape[3],
        names="out dq dk dv",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, dtype, device):
    *sizes, causal = case
    check_attention(qkv(*sizes, dtype, device), causal)


def test_any_layout(device):
    """Heads behind positions, one fused (B, T, H, D) projection, a strided D, a shifted start."""
    torch.manual_seed(1)
    fused = torch.randn(2, 40, 3, 4, 16, device=device)
    layouts = {
        "fused": [fused[:, :, i].transpose(1, 2) for i in range(3)],
        "strided": [torch.randn(2, 3, 16, 40, device=device).mT for _ in range(3)],
        "shifted": [torch.randn(2, 3, 40, 17, device=device)[..., 1:] for _ in range(3)],
        "shared": [torch.randn(1, 1, 40, 16, device=device).expand(2, 3, -1, -1)] * 3,
    }
    for name, inputs in layouts.items():
        expected = attention_reference(*inputs)
        torch.testing.assert_close(attention(*inputs), expected, msg=lambda m, n=name: f"{n}: {m}")
    out = attention(*layouts["fused"])
    assert out.transpose(1, 2).is_contiguous(), "the output should keep q's layout"


def test_gradients_of_views(device):
    """Gradients arrive through views of one leaf, from an upstream gradient with strides of 0."""
    torch.manual_seed(2)
    leaf = torch.randn(2, 40, 3, 4, 16, device=device)

    def loss(fn, x):
        q, k, v = (x[:, :, i].transpose(1, 2) for i in range(3))
        return fn(q, k, v[:, :2].repeat(1, 2, 1, 1)).sum()

    grads = []
    for fn, dtype in ((attention, torch.float32), (attention_reference, torch.float64)):
        x = leaf.to(dtype).requires_grad_()
        grads += torch.autograd.grad(loss(fn, x), x)
    assert relative_error(*grads) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype, device):
    """Logits of some thousands: without the running maximum, exp would overflow.

    There the softmax has one entry near 1, and the gradients of q and k come from differences
    dp - delta that nearly cancel. So their errors are held to absolute bounds: the rounding of
    out, from which delta is computed, and that of the log-sum-exp, from which p is.
    """
    q, k, v = qkv(1, 2, 1, 40, 70, 32, dtype, device)
    inputs, dout = [q * 30, k * 30, v], torch.randn_like(q)
    out, dq, dk, dv = run(attention, inputs, [dout])
    truth = run(attention_reference, [x.double() for x in inputs], [dout])
    largest = (inputs[0].double() @ inputs[1].double().mT).abs().max().item() * 32**-0.5
    assert largest > 3000
    relative = 4 * EPSILON[torch.float32] * largest + 2 * EPSILON[dtype]
    assert relative_error(out, truth[0]) < relative
    assert relative_error(dv, truth[3]) < relative
    delta = (truth[0] * dout).abs().sum(-1).max().item()
    allowed = 32**-0.5 * relative * delta  # of dscore, before the product with k or q
    assert (dq - truth[1]).abs().max() < allowed * inputs[1].abs().max()
    assert (dk - truth[2]).abs().max() < allowed * inputs[0].abs().sum((1, 2)).max()


def test_one_key(device):
    """The softmax of one score is 1: out is v, and q and k have no gradient but for rounding."""
    q, k, v = qkv(2, 2, 2, 67, 1, 32, torch.float32, device)
    out, dq, dk, dv = run(lambda *x: attention(*x, causal=False), [q, k, v], [torch.ones_like(q)])
    torch.testing.assert_close(out, v.expand_as(q), rtol=HARDWARE * out.is_cuda, atol=0)
    torch.testing.assert_close(dv, torch.full_like(v, 67))
    torch.testing.assert_close(dq, torch.zeros_like(q), rtol=0, atol=1e-5)
    torch.testing.assert_close(dk, torch.zeros_like(k), rtol=0, atol=1e-4)


def test_scale(device):
    check_attention(qkv(1, 2, 1, 33, 33, 32, torch.float32, device), False, scale=0.7)


def test_rows_that_see_no_key_give_zero(device):
    q, k, v = qkv(1, 2, 1, 40, 10, 16, torch.float32, device)
    out, dq, _, _ = run(attention, [q, k, v], [torch.ones_like(q)])
    assert (out[:, :, :30] == 0).all() and (out[:, :, 30:] != 0).all()
    assert (dq[:, :, :30] == 0).all()


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty(empty, device):
    batch, n_queries, n_keys = (0 if empty == x else 5 for x in ("batch", "queries", "keys"))
    inputs = qkv(batch, 2, 1, n_queries, n_keys, 16, torch.float32, device)
    results = run(attention, inputs, [torch.ones_like(inputs[0])])
    for result, like in zip(results, [inputs[0], *inputs], strict=True):
        assert result.shape == like.shape and (result == 0).all()


def test_gradients_repeat_bit_for_bit(device):
    inputs = qkv(1, 4, 2, 70, 70, 32, torch.bfloat16, device)
    upstream = [torch.randn_like(inputs[0])]
    first, second = (run(attention, inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Recorder:
    """Stands in for a kernel: notes its launches, runs nothing."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, programs):
        return lambda *args, **options: self.launches.append((self.name, args, options))


def compiled_as(name, args, options):
    """A launch as Triton would compile it for sm_90, in the terms of a Specialization."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    fn = module.KERNELS[name].compiled
    if not isinstance(fn, JITFunction):  # it is the interpreter's
        fn = JITFunction(fn.fn, do_not_specialize=fn.kwargs["do_not_specialize"])
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, kinds, options = binder(*args, **options)
    arguments = {}
    for argument, (kind, divisible) in zip(bound, kinds, strict=True):
        if kind == "constexpr":
            arguments[argument] = bound[argument]
        else:
            arguments[argument] = kind + (":16" if divisible else "")
    return fn.__name__, tuple(arguments.items()), options["num_warps"], options["num_stages"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_one_compilation_serves_all_lengths(head_dim, dtype, device):
    """Each kernel has one specialization for all lengths and layouts, and the list holds it."""
    attention(*[torch.zeros(1, 1, 1, 16, device=device)] * 3)  # from here on kernels are jitted
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "capability", lambda device: 90)
        for name in module.KERNELS:
            patch.setitem(module.KERNELS, name, Recorder(name, launches))
        for n_queries, n_keys, heads in [(1, 1, 1), (7, 16, 2), (16, 7, 2), (131, 1024, 4)]:
            q = torch.zeros(2, n_queries, heads, head_dim, dtype=dtype, device=device)
            k = torch.zeros(2, 1, n_keys, head_dim, dtype=dtype, device=device)
            q = q.transpose(1, 2)
            options = (None, None, None, True, None, None, 1.0, True)  # slopes, spans, causal, …
            out, lse = module._attention(q, k, k, None, *options)
            module._attention_backward(out, None, q, k, k, out, lse, *options)
    found = {compiled_as(*launch) for launch in launches}
    assert len(found) == len(module.KERNELS) == 3
    listed = set()
    for spec in module.specializations(90):
        known = {**spec.signature, **spec.constexprs}
        order = inspect.signature(spec.kernel.fn).parameters
        arguments = tuple((argument, known[argument]) for argument in order)
        listed.add((spec.kernel.__name__, arguments, spec.num_warps, spec.num_stages))
    assert found <= listed


# The rows: T = S, decoding, T < S, T > S (rows that see no key), no key at all; and not causal.
@pytest.mark.cpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # each has a path of its own
@pytest.mark.parametrize("lengths", [(9, 9), (1, 9), (5, 9), (9, 5), (3, 0)], ids=str)
def test_cpu_path(lengths, dtype, causal, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    n_queries, n_keys = lengths
    inputs = qkv(2, 4, 2, n_queries, n_keys, 24, dtype, "cpu")
    check_attention(inputs, causal, scale=0.3)


@pytest.mark.parametrize("path", ["kernel", pytest.param("cpu", marks=pytest.mark.cpu)])
def test_autocast(path, device, monkeypatch):
    """Under autocast fp32 inputs are cast, as in torch's own attention."""
    if path == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        device = "cpu"
    dtype = torch.float16 if path == "kernel" else torch.bfloat16
    inputs = qkv(1, 2, 1, 20, 20, 16, torch.float32, device)
    with torch.autocast(device, dtype):
        out = attention(*inputs)
    assert out.dtype == dtype
    truth = attention_reference(*(x.double() for x in inputs))
    assert relative_error(out, truth) < 4 * EPSILON[dtype]


def test_traces_whole_with_dynamic_lengths(path):
    """torch.compile sees no graph break, and the gradients survive."""
    traced = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 9):
        inputs = qkv(1, 2, 1, n, n + 2, 16, torch.float32, path)
        upstream = [torch.randn_like(inputs[0])]
        expected = run(attention_reference, inputs, upstream)
        for a, b in zip(run(traced, inputs, upstream), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_opcheck(device):
    q, k, v = qkv(2, 2, 1, 9, 12, 16, torch.float32, device)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # (B, T, H, D) in memory
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = (None, None, None, None, True, None, None, 0.25, True)
    torch.library.opcheck(torch.ops.ponder.attention.default, (*leaves, *options))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.ones(2, 4, 16)), r"q \(2, 4, 16\).*4 dimensions"),
        (dict(v=torch.ones(2, 2, 6, 16)), r"v \(2, 2, 6, 16\); k and v must be alike"),
        (dict(q=torch.ones(1, 4, 5, 16)), "with q's batch 1"),
        (dict(q=torch.ones(2, 3, 5, 16)), "q has 3 heads; they must be a multiple of k's 2"),
        (dict(q=torch.ones(2, 4, 5, 16).half()), "q is torch.float16, k torch.float32"),
        (dict(scale=-1.0), "scale is -1.0; it must be a positive number"),
        (dict(scale=float("nan")), "scale is nan"),
        (dict(q=torch.ones(2, 4, 5, 0), k=torch.ones(2, 2, 7, 0)), "a head dimension of 1 or more"),
    ],
)
def test_unsupported_input_is_named(change, message, device):
    inputs = dict(q=torch.ones(2, 4, 5, 16), k=torch.ones(2, 2, 7, 16), v=torch.ones(2, 2, 7, 16))
    inputs = {
        name: x.to(device) if torch.is_tensor(x) else x for name, x in (inputs | change).items()
    }
    with pytest.raises(ValueError, match=message):
        attention(**inputs)


def test_limits_of_the_kernel_are_named(device):
    x = torch.ones(1, 1, 2, 264, device=device)
    with pytest.raises(ValueError, match="head dimension is 264; at most 256"):
        attention(x, x, x)
    with pytest.raises(ValueError, match=r"q is torch.float64; supported"):
        attention(*[x.double()[..., :16]] * 3)

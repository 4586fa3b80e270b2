import sys

import pytest
import torch

from ponder.kernels import rms_norm, rotary
from ponder.kernels.rotary import rotary_reference

from .numerics import DTYPES, check

PROGRAMS = 512 if torch.cuda.is_available() else 3  # of which each then has several tiles


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    monkeypatch.setattr(sys.modules["ponder.kernels.rotary"], "PROGRAMS", PROGRAMS)


# (B, Hq, Hk, T, D): one token; GQA with heads narrower than a tile; D/2 not a power of two and
# heads past a tile's 16 (D = 80); a head wider than most; a token a row, as in decoding.
SHAPES = [
    (1, 1, 1, 1, 2),
    (2, 4, 2, 7, 16),
    (2, 3, 1, 33, 80),
    (1, 2, 2, 5, 256),
    (23, 3, 1, 1, 16),
]


def angles(*shape, device):
    theta = torch.rand(shape, device=device) * 6.28
    return theta.cos(), theta.sin()


def queries_and_keys(shape, dtype, device):
    """As an attention layer has them: (B, T, H, D), transposed."""
    n_row, n_q_head, n_k_head, n_token, head_dim = shape
    q = torch.randn(n_row, n_token, n_q_head, head_dim, dtype=dtype, device=device)
    k = torch.randn(n_row, n_token, n_k_head, head_dim, dtype=dtype, device=device)
    return q.transpose(1, 2), k.transpose(1, 2)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per_row"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary(shape, dtype, per_row, normed, way):
    torch.manual_seed(0)
    q, k = queries_and_keys(shape, dtype, way)
    n_row, _, _, n_token, head_dim = shape
    cos, sin = angles(*([n_row] if per_row else []), n_token, head_dim // 2, device=way)
    weights = [*torch.randn(2, head_dim, dtype=dtype, device=way)] if normed else []

    def call(fn):
        # With an eps that shows, as in the tests of norms.
        return lambda q, k, *w: fn(
            q, k, cos, sin, **dict(zip(("q_norm", "k_norm"), w, strict=False)), eps=3.0
        )

    check(
        call(rotary),
        call(rotary_reference),
        [q, k, *weights],
        reduction=q.numel() if normed else 2,
        names="q k dq dk" + " dq_norm dk_norm" * normed,
    )


def test_with_norms_it_is_rms_norm_and_the_rotation(way):
    """In one, of fp32: nothing is rounded between."""
    torch.manual_seed(5)
    q, k = (x.requires_grad_() for x in queries_and_keys((2, 4, 2, 7, 16), torch.float32, way))
    cos, sin = angles(7, 8, device=way)
    weights = [*torch.randn(2, 16, device=way).requires_grad_()]
    norms = dict(zip(("q_norm", "k_norm"), weights, strict=True))
    found = rotary(q, k, cos, sin, **norms)
    expected = rotary(rms_norm(q, weights[0]), rms_norm(k, weights[1]), cos, sin)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(q)
    for y, truth in ((found, expected), (found[:1], expected[:1])):  # of both, of q alone
        outs = [upstream[:, : x.shape[1]] for x in y]
        grads = [torch.autograd.grad(x, (q, k, *weights), outs, retain_graph=True,
                                     allow_unused=True, materialize_grads=True)
                 for x in (y, truth)]  # fmt: skip
        torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:divide by zero")  # the interpreter's
def test_an_eps_of_zero_and_tokens_past_the_end(way):
    """What stands in a tile past the last token is divided by no root of zero."""
    torch.manual_seed(6)
    q, k = (x.requires_grad_() for x in queries_and_keys((1, 1, 1, 3, 32), torch.float32, way))
    cos, sin = angles(3, 16, device=way)
    weight = torch.ones(32, device=way, requires_grad=True)
    y = rotary(q, k, cos, sin, q_norm=weight, k_norm=weight, eps=0.0)
    for x in torch.autograd.grad(y[0].sum() + y[1].sum(), (q, k, weight)):
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_norms_repeat_to_the_bit(dtype, way):
    torch.manual_seed(7)
    q, k = (x.requires_grad_() for x in queries_and_keys((2, 2, 1, 70, 16), dtype, way))
    cos, sin = angles(70, 8, device=way)
    weights = [*torch.randn(2, 16, device=way).requires_grad_()]
    y = rotary(q, k, cos, sin, q_norm=weights[0], k_norm=weights[1])
    upstream = [torch.randn_like(x) for x in y]
    first, second = (torch.autograd.grad(y, weights, upstream, retain_graph=True) for _ in "ab")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32


def test_bf16_rotates_in_fp32_on_cpu(way_on_a_cpu):
    torch.manual_seed(1)
    q, k = queries_and_keys((2, 4, 2, 7, 16), torch.bfloat16, "cpu")
    cos, sin = angles(7, 8, device="cpu")
    for y, truth in zip(rotary(q, k, cos, sin), rotary_reference(q, k, cos, sin), strict=True):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, truth)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: x[:, :, :1].expand_as(x),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[:1].expand_as(x),
    ],
    ids=["contiguous", "last", "slice", "strided", "token", "head", "row"],
)
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per_row"])
def test_any_strides(layout, per_row, way):
    torch.manual_seed(2)
    q, k = (layout(x) for x in queries_and_keys((2, 4, 2, 5, 16), torch.float32, way))
    before = q.clone(), k.clone()
    cos, sin = angles(*[2] * per_row, 5, 8, device=way)
    torch.testing.assert_close(rotary(q, k, cos, sin), rotary_reference(*before, cos, sin))
    weight = torch.randn(16, 2, device=way)[:, 0].requires_grad_()
    norms = dict(q_norm=weight, k_norm=weight)
    found, truth = rotary(q, k, cos, sin, **norms), rotary_reference(*before, cos, sin, **norms)
    torch.testing.assert_close(found, truth)
    upstream = [layout(torch.randn_like(x)) for x in truth]
    gradients = (torch.autograd.grad(y, weight, upstream) for y in (found, truth))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close((q, k), before, rtol=0, atol=0)


def test_positions_enter_only_as_differences(way):
    """The point of it: the score of a query and a key depends on their distance alone."""
    torch.manual_seed(3)
    n_token, head_dim = 12, 32
    q, k = torch.randn(2, 1, 1, 1, head_dim, device=way).expand(2, 1, 1, n_token, head_dim)
    frequency = 100.0 ** -(torch.arange(head_dim // 2, device=way) / (head_dim // 2))
    theta = torch.arange(n_token, device=way)[:, None] * frequency
    q, k = rotary(q, k, theta.cos(), theta.sin())
    scores = (q @ k.transpose(-1, -2))[0, 0]
    for distance in range(1 - n_token, n_token):
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-4, rtol=0)


def test_the_rotation_back_undoes_it_and_gradients_have_gradients(way):
    torch.manual_seed(4)
    q, k = queries_and_keys((1, 2, 1, 5, 16), torch.float32, way)
    cos, sin = angles(5, 8, device=way)
    torch.testing.assert_close(rotary(*rotary(q, k, cos, sin), cos, -sin), (q, k))
    q, u = q.clone().requires_grad_(), torch.randn_like(q).requires_grad_()
    y, _ = rotary(q, k, cos, sin)
    (dq,) = torch.autograd.grad(y, q, u, create_graph=True)
    v = torch.randn_like(dq)
    (du,) = torch.autograd.grad(dq, u, v)  # the rotation itself: dq is linear in u
    torch.testing.assert_close(du, rotary_reference(v, k, cos, sin)[0])


def test_empty(way):
    cos, sin = angles(0, 8, device=way)
    q, k = rotary(
        torch.ones(2, 4, 0, 16, device=way), torch.ones(2, 2, 0, 16, device=way), cos, sin
    )
    assert (q.shape, k.shape) == ((2, 4, 0, 16), (2, 2, 0, 16))
    weight = torch.ones(16, device=way, requires_grad=True)
    q, k = rotary(q, k, cos, sin, q_norm=weight, k_norm=weight)
    (gradient,) = torch.autograd.grad(q.sum() + k.sum(), weight)
    assert gradient.shape == (16,) and not gradient.any()


def test_unsupported_input_is_named(device):
    q, k = torch.ones(2, 4, 3, 8, device=device), torch.ones(2, 2, 3, 8, device=device)
    cos, sin = angles(3, 4, device=device)
    with pytest.raises(ValueError, match=r"q is \(2, 4, 3, 7\).*even D"):
        rotary(q[..., :7], k, cos, sin)
    with pytest.raises(ValueError, match=r"k is \(2, 2, 2, 8\).*\(2, H, 3, 8\)"):
        rotary(q, k[:, :, :2], cos, sin)
    with pytest.raises(ValueError, match="k is torch.float16"):
        rotary(q, k.half(), cos, sin)
    with pytest.raises(ValueError, match=r"sin is \(2, 4\).*\(3, 4\) or \(2, 3, 4\)"):
        rotary(q, k, cos, sin[:2])
    with pytest.raises(ValueError, match=r"sin is \(2, 3, 4\)"):
        rotary(q, k, cos, sin.expand(2, 3, 4))
    with pytest.raises(ValueError, match="k_norm is None; q and k are both normalized"):
        rotary(q, k, cos, sin, q_norm=cos[0])
    with pytest.raises(ValueError, match=r"k_norm is \(4,\); it must be \(8,\)"):
        rotary(q, k, cos, sin, q_norm=q[0, 0, 0], k_norm=cos[0])


def test_opcheck(device):
    rotary_op = torch.ops.ponder.rotary.default
    q, k = queries_and_keys((2, 4, 2, 5, 16), torch.float32, device)
    cos, sin = angles(2, 5, 8, device=device)
    torch.library.opcheck(rotary_op, (q.requires_grad_(), k.requires_grad_(), cos, sin, False))
    weights = torch.randn(2, 16, device=device).requires_grad_()
    normed = torch.ops.ponder.normed_rotary.default
    torch.library.opcheck(normed, (q, k, cos, sin, *weights.unbind(), 1e-6))


@pytest.mark.cpu
def test_compiles_whole_on_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q, k = queries_and_keys((2, 4, 2, 5, 16), torch.float32, "cpu")
    cos, sin = angles(5, 8, device="cpu")
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    q, k = q.requires_grad_(), k.requires_grad_()
    out, truth = compiled(q, k, cos, sin), rotary_reference(q, k, cos, sin)
    torch.testing.assert_close(out, truth)
    grads, expected = (
        torch.autograd.grad(sum(y.square().sum() for y in ys), (q, k)) for ys in (out, truth)
    )
    torch.testing.assert_close(grads, expected)


@pytest.mark.cpu
def test_a_function_transform_differentiates_it_on_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    torch.manual_seed(0)
    q, k = queries_and_keys((1, 2, 1, 5, 16), torch.float32, "cpu")
    cos, sin = angles(5, 8, device="cpu")

    def loss(q, k):
        return sum(y.square().sum() for y in rotary(q, k, cos, sin))

    for found, x in zip(torch.func.grad(loss, argnums=(0, 1))(q, k), (q, k), strict=True):
        torch.testing.assert_close(found, 2 * x)  # a rotation keeps lengths


def test_compiles_with_tables_whose_size_is_fixed(monkeypatch):
    """While the tokens' number is a symbol."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cos, sin = angles(5, 8, device="cpu")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cos", cos)
            self.register_buffer("sin", sin)

        def forward(self, q, k):
            return rotary(q, k, self.cos, self.sin)

    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    q, k = queries_and_keys((2, 2, 1, 5, 16), torch.float32, "cpu")
    for found, expected in zip(compiled(q, k), layer(q, k), strict=True):
        torch.testing.assert_close(found, expected)

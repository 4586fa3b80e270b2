"""Every differentiable function on random shapes, dtypes and options, drawn by hypothesis.

(attention and sample_tokens have such tests of their own, beside the rest of theirs.)
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder import kernels
from ponder.kernels._activations import ACTIVATIONS
from ponder.kernels.cross_entropy import cross_entropy_reference
from ponder.kernels.decode_attention import decode_attention_reference
from ponder.kernels.linear_cross_entropy import linear_cross_entropy_reference
from ponder.kernels.mlp import gated_mlp_reference, mlp_reference
from ponder.kernels.mse_loss import mse_loss_reference
from ponder.kernels.norm import layer_norm_reference, rms_norm_reference
from ponder.kernels.rotary import rotary_reference
from ponder.kernels.softmax import softmax_reference

from .numerics import DTYPES, EPSILON, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON_32 = EPSILON[torch.float32]


def check(fn, reference, inputs: list[torch.Tensor], reduction: int, cancels: bool = False) -> None:
    """Assert that outputs and gradients are those of inputs a few roundings away.

    The truth is the reference in fp64. How far a rounding of every input and upstream gradient
    moves it is measured; a sum of `reduction` terms may be off by as much times its square root,
    and what is rounded to a 16-bit dtype by as much in that dtype. So sums that cancel are held to
    the size of their terms, whatever those are. `cancels`: within the backward pass too, where the
    terms are the upstream gradient's size.
    """
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    with torch.no_grad():
        shapes = reference(*wide)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    upstream = [torch.randn_like(y) for y in shapes]
    truth = run(reference, wide, upstream)
    moved = [torch.zeros((), dtype=torch.float64)] * len(truth)
    unit = EPSILON[dtype] + 2 * EPSILON_32 * reduction**0.5
    for _ in range(3):
        near, near_upstream = (
            [x * (1 + unit * torch.randn_like(x)) if x.is_floating_point() else x for x in tensors]
            for tensors in (wide, upstream)
        )
        there = run(reference, near, near_upstream)
        moved = [
            torch.maximum(m, (a - b).norm().cpu())
            for m, a, b in zip(moved, there, truth, strict=True)
        ]
    least = 1e-30 + cancels * 2 * unit * math.hypot(*(g.norm().item() for g in upstream))
    for i, (x, t, m) in enumerate(zip(run(fn, inputs, upstream), truth, moved, strict=True)):
        error, allowed = (x.double() - t).norm().item(), 4 * m.item() + 2 * unit * t.norm().item()
        assert error <= allowed + least, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"


class Draw:
    """Tensors and choices, all from what hypothesis draws."""

    def __init__(self, data):
        self.data = data
        self.dtype = self.one_of(DTYPES)
        self.random = torch.Generator().manual_seed(self.number(0, 2**32))

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def one_of(self, values):
        return self.data.draw(st.sampled_from(list(values)))

    def yes(self) -> bool:
        return self.data.draw(st.booleans())

    def tensor(self, *shape: int, scale: float = 1.0, strided: bool = False) -> torch.Tensor:
        if strided:  # every second number of a longer last dimension
            return self.tensor(*shape[:-1], 2 * shape[-1], scale=scale)[..., ::2]
        return (scale * torch.randn(shape, generator=self.random)).to(DEVICE, self.dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.random).to(DEVICE)


def norm(draw: Draw) -> None:
    ours, reference = draw.one_of(
        [(kernels.rms_norm, rms_norm_reference), (kernels.layer_norm, layer_norm_reference)]
    )
    rows, width = draw.number(1, 40), draw.number(1, 300)
    # Of few columns the gradient is what remains when nearly all cancels, unless eps keeps some.
    eps = draw.one_of([1e-6, 1e-2, 3.0]) if width > 16 else 3.0
    inputs = [draw.tensor(rows, width, strided=draw.yes()), draw.tensor(width)]
    if draw.yes():
        inputs.append(draw.tensor(width))
    check(
        lambda x, *w: ours(x, *w, eps=eps),
        lambda x, *w: reference(x, *w, eps=eps),
        inputs,
        reduction=rows * width,
    )


def mlp(draw: Draw) -> None:
    rows, width, inner = draw.number(1, 40), draw.number(1, 48), draw.number(1, 100)
    activation, recompute = draw.one_of(ACTIVATIONS), draw.yes()
    gated, conv1d = draw.yes(), draw.yes()
    shapes = [(inner, width)] * (1 + gated) + [(width, inner)]
    weights = [draw.tensor(*s, scale=s[1] ** -0.5) for s in shapes]
    names = [n for n in ("b_gate", "b_up", "b_down")[not gated :] if draw.yes()]
    biases = [draw.tensor(width if n == "b_down" else inner) for n in names]
    ours = kernels.gated_mlp if gated else kernels.mlp
    reference = gated_mlp_reference if gated else mlp_reference

    def call(x, *rest):
        weights, biases = rest[: len(shapes)], dict(zip(names, rest[len(shapes) :], strict=True))
        if conv1d:
            weights = [w.t().contiguous().t() for w in weights]
        return ours(x, *weights, activation=activation, recompute=recompute, **biases)

    def truth(x, *rest):
        biases = dict(zip(names, rest[len(shapes) :], strict=True))
        return reference(x, *rest[: len(shapes)], activation=activation, **biases)

    check(call, truth, [draw.tensor(rows, width), *weights, *biases], max(rows, width, inner))


def rotary(draw: Draw) -> None:
    batch, heads, kv_heads, length = (draw.number(1, most) for most in (3, 5, 3, 70))
    half = draw.number(1, 40)
    angles = (torch.randn(half)[None] * torch.arange(length)[:, None]).to(DEVICE)
    if draw.yes():
        angles = angles[draw.integers(length, batch, length)]
    q, k = (draw.tensor(batch, length, h, 2 * half).transpose(1, 2) for h in (heads, kv_heads))
    normed = draw.yes()
    weights = [draw.tensor(2 * half) for _ in range(2 * normed)]
    # As for norms: of few dimensions the gradient is what remains when nearly all cancels.
    eps = draw.one_of([1e-6, 1e-2, 3.0]) if half > 8 else 3.0

    def call(fn):
        def run(q, k, *w):
            wide = torch.promote_types(q.dtype, torch.float32)
            cos, sin = angles.cos().to(wide), angles.sin().to(wide)
            norms = dict(zip(("q_norm", "k_norm"), w, strict=False))
            return fn(q, k, cos, sin, **norms, eps=eps)

        return run

    reduction = q.numel() if normed else 2
    check(call(kernels.rotary), call(rotary_reference), [q, k, *weights], reduction)


def options_of_losses(draw: Draw, n_classes: int) -> dict:
    options: dict = dict(reduction=draw.one_of(["mean", "sum", "none"]))
    if draw.yes():
        options["label_smoothing"] = draw.one_of([0.1, 1.0])
    if draw.yes():
        options["z_loss"] = 1e-2
    if draw.yes():
        options["softcap"] = draw.one_of([1.5, 30.0])
    if draw.yes():
        options["ignore_index"] = draw.number(0, n_classes - 1)
    return options


def cross_entropy(draw: Draw) -> None:
    rows, n_classes = draw.number(1, 20), draw.one_of([2, 50, 257, 2100])
    options = options_of_losses(draw, n_classes)
    logits = draw.tensor(rows, n_classes, scale=draw.one_of([0.1, 3.0]), strided=draw.yes())
    targets = draw.integers(n_classes, rows)
    check(
        lambda x: kernels.cross_entropy(x, targets, **options),
        lambda x: cross_entropy_reference(x, targets, **options),
        [logits],
        reduction=rows * n_classes,
    )


def linear_cross_entropy(draw: Draw) -> None:
    rows, width, n_classes = draw.number(1, 20), draw.number(1, 40), draw.number(2, 400)
    options = options_of_losses(draw, n_classes)
    inputs = [draw.tensor(rows, width), draw.tensor(n_classes, width, scale=width**-0.5)]
    if draw.yes():
        inputs.append(draw.tensor(n_classes))
    targets = draw.integers(n_classes, rows)
    check(
        lambda x, w, b=None: kernels.linear_cross_entropy(x, w, targets, bias=b, **options),
        lambda x, w, b=None: linear_cross_entropy_reference(x, w, targets, b, **options),
        inputs,
        reduction=rows * width * n_classes,
    )


def softmax(draw: Draw) -> None:
    shape, dim = [draw.number(1, 5) for _ in range(3)], draw.number(-3, 2)
    shape[dim] = draw.number(1, 300)
    x = draw.tensor(*shape, scale=draw.one_of([0.1, 10.0]), strided=draw.yes())
    check(
        lambda x: kernels.softmax(x, dim),
        lambda x: softmax_reference(x, dim),
        [x],
        reduction=x.shape[dim],
        cancels=True,
    )


def mse_loss(draw: Draw) -> None:
    reduction, shape = draw.one_of(["mean", "sum", "none"]), [draw.number(1, 90) for _ in range(2)]
    check(
        lambda x, y: kernels.mse_loss(x, y, reduction=reduction),
        lambda x, y: mse_loss_reference(x, y, reduction),
        [draw.tensor(*shape), draw.tensor(*shape)],
        reduction=math.prod(shape),
    )


def decode_attention(draw: Draw) -> None:
    kv_heads, group, new, head_dim = (draw.number(1, most) for most in (2, 3, 2, 48))
    groups, samples = draw.number(1, 2), draw.number(1, 2)
    rows, capacity = groups * samples, draw.number(new, 300)
    lengths = new + draw.integers(capacity - new + 1, rows)
    options: dict = {}
    if draw.yes():
        options["window"] = draw.number(1, 500)
    if draw.yes():
        options["softcap"] = 3.0
    caches = [draw.tensor(rows, kv_heads, capacity, head_dim) for _ in range(2)]
    inputs = [draw.tensor(rows, kv_heads * group, new, head_dim), *caches]
    sinks = draw.tensor(kv_heads * group) if draw.yes() else None
    n_prefix = draw.number(1, 560) if draw.yes() else 0
    if n_prefix:
        inputs += [draw.tensor(groups, kv_heads, n_prefix, head_dim) for _ in range(2)]
        options["prefix_lengths"] = draw.integers(n_prefix + 1, groups)

    def outputs(fn):
        def call(q, k, v, *prefix):
            sink = sinks if sinks is None else sinks.to(q.dtype)
            with torch.no_grad():
                out = fn(q, k, v, lengths, sinks=sink, prefix=prefix or None, **options)
            # Inference only; a product of 0 gives the gradients that the check asks for.
            return out + 0.0 * sum(x.sum() for x in (q, k, v, *prefix))

        return call

    check(
        outputs(kernels.decode_attention),
        outputs(decode_attention_reference),
        inputs,
        reduction=(capacity + n_prefix) * head_dim,
    )


# With the 50 of attention, 500 examples.
COUNT = {norm: 100, mlp: 50, rotary: 60, cross_entropy: 70, linear_cross_entropy: 50}
COUNT |= {softmax: 60, mse_loss: 30, decode_attention: 30}


@pytest.mark.parametrize("operation", COUNT, ids=lambda f: f.__name__)
def test_any_configuration(operation):
    @settings(max_examples=COUNT[operation], deadline=None, derandomize=True)
    @given(st.data())
    def examples(data):
        operation(Draw(data))

    examples()

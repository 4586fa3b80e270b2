import math

import pytest
import torch

from ponder.kernels import _decode_attention_cpu
from ponder.kernels.decode_attention import decode_attention, decode_attention_reference

from .numerics import DTYPES, EPSILON, relative_error


def truth(q, k, v, lengths, scale=None):
    """One row, head and query at a time, on the visible positions alone, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    n_row, n_head, n_new, head_dim = q.shape
    group = n_head // k.shape[1]
    for b in range(n_row):
        for h in range(n_head):
            for t in range(n_new):
                seen = int(lengths[b]) - n_new + t + 1
                keys, values = k[b, h // group, :seen], v[b, h // group, :seen]
                scores = keys @ q[b, h, t] * (head_dim**-0.5 if scale is None else scale)
                out[b, h, t] = scores.softmax(0) @ values
    return out


def problem(n_row, n_head, n_kv_head, n_new, capacity, head_dim, lengths, dtype, device):
    torch.manual_seed(0)
    q = torch.randn(n_row, n_head, n_new, head_dim, dtype=dtype, device=device)
    k, v = torch.randn(2, n_row, n_kv_head, capacity, head_dim, dtype=dtype, device=device)
    return q, k, v, torch.tensor(lengths, device=device)


# Every head dimension class; one head a group and several; one token and several; more rows of a
# tile than 16, and than 64; lengths of 1, at, before and after the edges of a block (64) and of a
# split (256); capacities of one split and of several, with remainders.
GRID = [
    (3, 1, 1, 1, 16, 16, [1, 15, 16]),
    (3, 4, 2, 1, 300, 32, [64, 65, 300]),
    (4, 4, 1, 3, 513, 80, [3, 256, 257, 513]),
    (2, 2, 2, 2, 70, 96, [2, 70]),
    (2, 6, 2, 5, 130, 64, [9, 130]),
    (1, 5, 1, 14, 272, 40, [265]),
    (2, 8, 4, 1, 260, 128, [259, 40]),
    (2, 1, 1, 1, 33, 256, [33, 8]),
]


def check(shape, dtype, device):
    q, k, v, lengths = problem(*shape, dtype, device)
    expected = truth(q, k, v, lengths)
    beyond = torch.arange(k.shape[2], device=device) >= lengths[:, None]
    garbage = torch.finfo(dtype).max
    for cache in (k, v):
        cache.masked_fill_(beyond[:, None, :, None], garbage)
        cache[:, :, 1::2].masked_fill_(beyond[:, None, 1::2, None], -garbage)
    reference = decode_attention_reference(q, k, v, lengths)
    tolerance = 2 * EPSILON[torch.float32] * (k.shape[2] * k.shape[3]) ** 0.5 + 2 * EPSILON[dtype]
    error = relative_error(decode_attention(q, k, v, lengths), expected)
    reference_error = relative_error(reference, expected)
    assert reference_error <= tolerance
    assert error <= reference_error + tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GRID)
def test_against_truth(shape, dtype, device):
    check(shape, dtype, device)


# Besides: more heads in a group than are taken at once, in bf16 of no whole vector; an odd head
# dimension, which in bf16 is PyTorch's.
@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [*GRID, (3, 7, 1, 8, 90, 34, [90, 8, 33]), (2, 4, 2, 1, 50, 37, [50, 31])]
)
def test_against_truth_on_a_cpu(shape, dtype, way_on_a_cpu, monkeypatch):
    monkeypatch.setattr(_decode_attention_cpu, "SHARE", 1)  # a thread for the least work, too
    check(shape, dtype, way_on_a_cpu)


@pytest.mark.cpu
def test_what_is_in_c(monkeypatch):
    """The cache of a decode step is; what C does not know is PyTorch's."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    was, taken = _decode_attention_cpu.decode_attention_in_c, []
    monkeypatch.setattr(
        _decode_attention_cpu,
        "decode_attention_in_c",
        lambda *given: (taken.append(True), was(*given))[1],
    )

    def in_c(dtype=torch.float32, tokens=1, head_dim=16, turned=False, **options):
        taken.clear()
        q, k, v, lengths = problem(2, 4, 2, tokens, 20, head_dim, [20, 9], dtype, "cpu")
        k = k.mT.contiguous().mT if turned else k
        decode_attention(q, k, v, lengths, **options)
        return bool(taken)

    prefix = tuple(torch.randn(2, 1, 2, 30, 16))
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    assert in_c() and in_c(torch.bfloat16) and in_c(tokens=8) and in_c(head_dim=256)
    assert in_c(scale=0.3) and in_c(prefix=prefix) and in_c(block_table=table)
    assert in_c(head_dim=37) and not in_c(torch.bfloat16, head_dim=37)
    assert not in_c(torch.float16) and not in_c(tokens=9) and not in_c(head_dim=257)
    assert not in_c(turned=True) and not in_c(block_table=table.expand(2, 2))
    assert not in_c(window=5) and not in_c(softcap=5.0) and not in_c(sinks=torch.zeros(4))


def test_strides_scale_and_int32_lengths(way):
    device = way
    q, k, v, lengths = problem(2, 4, 2, 3, 40, 32, [40, 7], torch.float32, device)
    expected = truth(q, k, v, lengths, scale=0.3)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    wider = torch.full((2, 2, 64, 32), math.nan, device=device)
    wider[:, :, :40] = k
    turned = v.transpose(2, 3).contiguous().transpose(2, 3)
    for values in (v, turned):
        y = decode_attention(transposed, wider[:, :, :40], values, lengths.int(), scale=0.3)
        assert relative_error(y, expected) < 1e-6


def same_bits(shape, capacities, device, dtype=torch.float32):
    """The rows' bits on caches of several capacities, with other rows and other garbage each."""
    n_row, n_head, n_kv_head, n_new, head_dim, lengths = shape
    full = max(capacities)
    q, k, v, lengths = problem(
        n_row, n_head, n_kv_head, n_new, full, head_dim, lengths, dtype, device
    )
    beyond = (torch.arange(full, device=device) >= lengths[:, None])[:, None, :, None]
    first = None
    for i, capacity in enumerate(capacities):
        other = [torch.randn_like(x) * 10.0**i for x in (q, k, v)]
        caches = [torch.where(beyond, y, x) for x, y in ((k, other[1]), (v, other[2]))]
        if i == 0:
            caches = [torch.where(beyond, 0.0, x) for x in (k, v)]
        mine = torch.arange(n_row, device=device)[:, None, None, None] % 2 == 0
        caches = [
            torch.where(mine, x, y)[:, :, :capacity] for x, y in zip(caches, other[1:], strict=True)
        ]
        rows = torch.where(mine, q, other[0])
        y = decode_attention(rows, *caches, lengths)[::2]
        first = y if first is None else first
        assert torch.equal(first, y), f"{shape}: S = {capacity} against {capacities[0]}"


def test_bits_of_a_row_are_its_own_in_the_kernel(device):
    same_bits((3, 2, 1, 1, 16, [9, 16, 5]), [16, 272, 528], device)
    same_bits((3, 2, 2, 2, 32, [257, 256, 260]), [272, 512, 528], device)


# Small products that torch.bmm would do by another path, one row, the sizes of a small model, and
# contractions that MKL would cut at places that depend on their length.
@pytest.mark.cpu
@pytest.mark.parametrize(
    ("shape", "capacities"),
    [
        ((1, 1, 1, 1, 16, [7]), (16, 32, 48, 96, 512)),
        ((3, 4, 4, 1, 16, [3, 9, 16]), (16, 32, 64, 128, 144, 240, 272, 1024)),
        ((256, 4, 2, 1, 32, [1 + i % 64 for i in range(256)]), (64, 80, 128, 144, 192, 256)),
        ((64, 4, 4, 1, 32, [1 + i for i in range(64)]), (64, 80, 128, 240, 256, 512)),
        ((33, 4, 2, 5, 96, [150 - i for i in range(33)]), (160, 176, 224, 272)),
        ((8, 4, 1, 1, 64, [368 - i for i in range(8)]), (368, 384, 432, 704, 768)),
        ((2, 6, 2, 2, 256, [300, 297]), (304, 320, 368, 432, 512)),
        ((5, 3, 1, 1, 64, [200, 9, 500, 1, 384]), (512, 528, 768, 1024, 2048)),
        ((3, 9, 3, 5, 80, [300, 100, 50]), (304, 320, 400, 496)),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_a_row_are_its_own_on_cpu(shape, capacities, threads, set_threads, way_on_a_cpu):
    set_threads(threads)
    same_bits(shape, capacities, way_on_a_cpu)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_in_c_are_so_for_any_capacity(dtype, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    same_bits((3, 6, 2, 1, 48, [3, 17, 40]), (40, 41, 57, 300), "cpu", dtype)
    same_bits((5, 3, 3, 4, 20, [5, 9, 33, 4, 32]), (33, 35, 64), "cpu", dtype)


def test_a_length_too_short_stays_finite(way):
    device = way
    q, k, v, lengths = problem(3, 2, 1, 2, 300, 16, [0, 1, 2], torch.float32, device)
    y = decode_attention(q, k, v, lengths)
    first = v[:, :, :1].expand(-1, 2, 2, -1)
    torch.testing.assert_close(y[:2], first[:2])
    torch.testing.assert_close(y[2, :, 0], first[2, :, 0])
    reference = decode_attention_reference(q, k, v, lengths)
    torch.testing.assert_close(y, reference)


def test_empty_batch_and_no_gradient(way):
    device = way
    q, k, v, lengths = problem(2, 2, 1, 1, 16, 16, [4, 5], torch.float32, device)
    for path in (decode_attention, decode_attention_reference):
        assert path(q[:0], k[:0], v[:0], lengths[:0]).shape == (0, 2, 1, 16)
    assert not decode_attention(q.requires_grad_(), k, v, lengths).requires_grad


def test_unsupported_input_is_named(device):
    q, k, v, lengths = problem(2, 4, 2, 1, 16, 16, [4, 5], torch.float32, device)
    with pytest.raises(ValueError, match=r"q is \(4, 1, 16\)"):
        decode_attention(q[0], k, v, lengths)
    with pytest.raises(ValueError, match=r"k_cache is .*must be \(2, Hkv, S, 16\)"):
        decode_attention(q, k[:1], v, lengths)
    with pytest.raises(ValueError, match="v_cache is .*as k_cache"):
        decode_attention(q, k, v[:, :, :8], lengths)
    with pytest.raises(ValueError, match="4 query heads do not divide among 3"):
        decode_attention(q, *torch.zeros(2, 2, 3, 16, 16, device=device), lengths)
    with pytest.raises(ValueError, match="17 new tokens.*16 positions"):
        decode_attention(q.repeat(1, 1, 17, 1), k, v, lengths)
    with pytest.raises(ValueError, match=r"lengths is \(1,\).*\(2,\) int32 or int64"):
        decode_attention(q, k, v, lengths[:1])
    with pytest.raises(ValueError, match="lengths is .*float32"):
        decode_attention(q, k, v, lengths.float())
    with pytest.raises(ValueError, match="v_cache is torch.float16"):
        decode_attention(q, k, v.half(), lengths)
    with pytest.raises(ValueError, match="heads of 257 dimensions; at most 256"):
        big = torch.zeros(2, 2, 16, 257, device=device)
        decode_attention(torch.zeros(2, 2, 1, 257, device=device), big, big, lengths)


def test_opcheck(device):
    q, k, v, lengths = problem(2, 4, 2, 1, 272, 16, [4, 270], torch.float32, device)
    torch.library.opcheck(torch.ops.ponder.decode_attention.default, (q, k, v, lengths, 0.25))

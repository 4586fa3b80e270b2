"""decode_attention's window, softcap, sinks, shared prefix and pages, alone and together."""

import math

import pytest
import torch

from ponder.kernels.decode_attention import decode_attention, decode_attention_reference

from .numerics import DTYPES, EPSILON, relative_error


def truth(
    q,
    k,
    v,
    lengths,
    *,
    window=None,
    softcap=None,
    sinks=None,
    prefix=None,
    prefix_lengths=None,
):
    """One query at a time, on the positions that it sees alone, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    n_row, n_head, n_new, head_dim = q.shape
    for b in range(n_row):
        for h in range(n_head):
            head = h * k.shape[1] // n_head
            before = [x[:0, 0, 0].reshape(0, head_dim) for x in (k, v)]
            if prefix is not None:
                group = b * len(prefix[0]) // n_row
                valid = prefix[0].shape[2] if prefix_lengths is None else prefix_lengths[group]
                before = [x[group, head, :valid].double() for x in prefix]
            for t in range(n_new):
                seen = int(lengths[b]) - n_new + t + 1
                keys, values = (
                    torch.cat([x, y[b, head, :seen]])[-(window or 10**9) :]
                    for x, y in zip(before, (k, v), strict=True)
                )
                scores = keys @ q[b, h, t] * head_dim**-0.5
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double()])
                out[b, h, t] = scores.softmax(0)[: len(values)] @ values
    return out


def problem(n_row, n_head, n_kv_head, n_new, capacity, head_dim, lengths, dtype, device):
    """q, caches with the largest finite numbers beyond the lengths, and the lengths."""
    torch.manual_seed(0)
    q = torch.randn(n_row, n_head, n_new, head_dim, dtype=dtype, device=device)
    lengths = torch.tensor(lengths, device=device)
    return q, *filled(n_row, n_kv_head, capacity, head_dim, lengths, dtype, device), lengths


def filled(n, n_kv_head, capacity, head_dim, lengths, dtype, device):
    beyond = (torch.arange(capacity, device=device) >= lengths[:, None])[:, None, :, None]
    caches = torch.randn(2, n, n_kv_head, capacity, head_dim, dtype=dtype, device=device)
    return caches.masked_fill_(beyond, torch.finfo(dtype).max).unbind()


def shared(n_kv_head, capacity, head_dim, lengths, dtype, device):
    """A prefix of as many groups as there are lengths, as arguments."""
    lengths = torch.tensor(lengths, device=device)
    prefix = filled(len(lengths), n_kv_head, capacity, head_dim, lengths, dtype, device)
    return dict(prefix=prefix, prefix_lengths=lengths)


def paged(k, v, lengths, page_size):
    """The same caches in pages that lie anyhow, as arguments; an entry of no use is anything."""
    n_row, n_kv_head, capacity, head_dim = k.shape
    n_blocks = -(-capacity // page_size)
    table = torch.randperm(n_row * n_blocks + 3)[: n_row * n_blocks].view(n_row, n_blocks)
    table = table.to(k.device)
    pages = []
    for x in (k, v):
        padded = torch.nn.functional.pad(x, (0, 0, 0, n_blocks * page_size - capacity))
        own = padded.view(n_row, n_kv_head, n_blocks, page_size, head_dim).transpose(1, 2)
        pages.append(torch.zeros(n_row * n_blocks + 3, *own.shape[2:], dtype=x.dtype).to(k.device))
        pages[-1][table] = own
    unused = torch.arange(n_blocks, device=k.device) * page_size >= lengths[:, None]
    garbage = torch.tensor([-1, 10**9], device=k.device)[torch.arange(n_blocks) % 2]
    table = torch.where(unused, garbage, table).int()
    return dict(k_cache=pages[0], v_cache=pages[1], block_table=table)


def check(q, k, v, lengths, page_size=None, **options):
    expected = truth(q, k, v, lengths, **options)
    caches = dict(k_cache=k, v_cache=v)
    if page_size is not None:
        caches = paged(k, v, lengths, page_size)
    reference = decode_attention_reference(q, lengths=lengths, **caches, **options)
    reduction = k.shape[2] + (options["prefix"][0].shape[2] if "prefix" in options else 0)
    tolerance = 2 * EPSILON[torch.float32] * (reduction * k.shape[3]) ** 0.5 + 2 * EPSILON[q.dtype]
    error = relative_error(decode_attention(q, lengths=lengths, **caches, **options), expected)
    reference_error = relative_error(reference, expected)
    assert reference_error <= tolerance
    assert error <= reference_error + tolerance


# One split (256 positions of a row, 512 of a prefix) and several with remainders; one token and
# several; more rows of a tile than 16; lengths at the edges of a block (64) and of a split.
SHORT = (3, 4, 2, 2, 70, 32, [2, 64, 70])
LONG = (4, 4, 1, 5, 600, 40, [6, 256, 257, 600])


# A window of the query alone; of fewer and of more positions than a block and than a split; one
# that begins with a split for some tokens of a row and before it for the others; one beyond all.
@pytest.mark.parametrize("window", [1, 7, 64, 254, 300, 1000])
@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_window(shape, window, device):
    check(*problem(*shape, torch.float32, device), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_softcap_and_sinks(shape, dtype, device):
    inputs = problem(*shape, dtype, device)
    sinks = torch.tensor([-math.inf, -3.0, 0.5, 40.0], device=device)  # none, some, all the weight
    check(*inputs, softcap=0.7)
    check(*inputs, softcap=50.0)
    check(*inputs, sinks=sinks)
    check(*inputs, sinks=sinks.to(dtype), softcap=0.7, window=40)


# (rows, query heads, KV heads, tokens, own positions, head_dim, own lengths), (positions of the
# prefix, its lengths): a row a group and several; more rows than 64; a group of no prefix.
PREFIXES = [
    ((2, 2, 1, 1, 16, 16, [1, 16]), (1, [1, 1])),
    ((6, 4, 2, 2, 70, 32, [2, 64, 70, 5, 6, 7]), (70, [70, 33])),
    ((4, 2, 2, 3, 300, 80, [3, 257, 300, 4]), (1030, [1030, 0])),
    ((11, 7, 1, 1, 33, 24, [1 + 3 * i for i in range(11)]), (513, [512])),
    ((2, 2, 1, 1, 20, 256, [9, 20]), (40, [39])),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "prefix"), PREFIXES)
def test_prefix(shape, prefix, dtype, device):
    check(
        *problem(*shape, dtype, device),
        **shared(shape[2], prefix[0], shape[5], prefix[1], dtype, device),
    )


def test_a_whole_prefix_needs_no_lengths(device):
    inputs = problem(6, 4, 2, 2, 70, 32, [2, 64, 70, 5, 6, 7], torch.float32, device)
    prefix = shared(2, 600, 32, [600] * 3, torch.float32, device)["prefix"]
    check(*inputs, prefix=prefix)
    check(*inputs, prefix=tuple(x[:, :, :0] for x in prefix))
    wider = torch.full((3, 2, 800, 64), math.nan, device=device)[:, :, :600, :32]
    check(*inputs, prefix=(wider.copy_(prefix[0]), prefix[1].mT.contiguous().mT))


# In rows of several lengths the window begins in the row's own cache, or in any split of the
# prefix; for some samples of a group it leaves out splits that others see.
@pytest.mark.parametrize("window", [4, 250, 700, 1300, 3000])
def test_window_over_a_prefix(window, device):
    inputs = problem(6, 2, 1, 2, 600, 16, [2, 600, 255, 600, 256, 300], torch.float32, device)
    check(*inputs, window=window, **shared(1, 1100, 16, [1100, 700], torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 24, 256])
def test_pages(page_size, dtype, device):
    for shape in (SHORT, LONG):
        check(*problem(*shape, dtype, device), page_size=page_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_together(dtype, device):
    inputs = problem(4, 4, 2, 3, 600, 48, [3, 600, 257, 500], dtype, device)
    prefix = shared(2, 700, 48, [700, 513], dtype, device)
    sinks = torch.randn(4, device=device)
    check(*inputs, page_size=24, window=620, softcap=5.0, sinks=sinks, **prefix)


def test_bits_of_a_row_are_not_of_its_group(device):
    """One sample alone, or among 40 others (more than a tile) of other lengths."""
    shape = (41, 2, 1, 1, 300, 16, [1 + 7 * i for i in range(41)])
    q, k, v, lengths = problem(*shape, torch.bfloat16, device)
    options = shared(1, 600, 16, [530], torch.bfloat16, device)
    together = decode_attention(q, k, v, lengths, window=700, **options)
    for i in (0, 17, 40):
        row = slice(i, i + 1)
        alone = decode_attention(q[row], k[row], v[row], lengths[row], window=700, **options)
        assert torch.equal(alone, together[row])


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu(dtype, way_on_a_cpu):
    inputs = problem(4, 4, 2, 3, 60, 48, [3, 60, 57, 50], dtype, way_on_a_cpu)
    prefix = shared(2, 70, 48, [70, 13], dtype, way_on_a_cpu)
    none = shared(2, 70, 48, [0, 70], dtype, way_on_a_cpu)
    sinks = torch.randn(4)
    check(*inputs, page_size=24, window=62, softcap=5.0, sinks=sinks, **prefix)
    check(*inputs, page_size=60, **prefix)
    check(*inputs, page_size=60)
    check(*inputs, **none)
    check(*inputs, prefix=tuple(torch.randn(2, 2, 2, 70, 48, dtype=dtype)))
    check(*inputs, sinks=sinks)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_in_c_do_not_depend_on_who_shares_a_prefix(dtype, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q, k, v, lengths = problem(6, 6, 2, 1, 40, 32, [3, 40, 7, 1, 16, 40], dtype, "cpu")
    options = shared(2, 70, 32, [61], dtype, "cpu")
    together = decode_attention(q, k, v, lengths, **options)
    longer = dict(prefix=tuple(torch.nn.functional.pad(x, (0, 0, 0, 9)) for x in options["prefix"]))
    for i in range(6):
        row = slice(i, i + 1)
        alone = decode_attention(q[row], k[row], v[row], lengths[row], **options | longer)
        assert torch.equal(alone, together[row])


def test_no_rows(device):
    q, k, v, lengths = problem(2, 2, 1, 1, 16, 16, [4, 5], torch.float32, device)
    prefix = shared(1, 20, 16, [20, 20], torch.float32, device)
    none = {
        name: tuple(x[:0] for x in value) if name == "prefix" else value[:0]
        for name, value in prefix.items()
    }
    for path in (decode_attention, decode_attention_reference):
        assert path(q[:0], k[:0], v[:0], lengths[:0], window=3, **none).shape == (0, 2, 1, 16)


def test_unsupported_input_is_named(device):
    q, k, v, lengths = problem(6, 4, 2, 1, 16, 16, [4] * 6, torch.float32, device)
    prefix = tuple(torch.zeros(2, 3, 2, 20, 16, device=device))

    def wrong(match, k=k, v=v, **options):
        with pytest.raises(ValueError, match=match):
            decode_attention(q, k, v, lengths, **options)

    wrong("window is 0; it must be 1", window=0)
    wrong("softcap is -1.0; it must be a positive number", softcap=-1.0)
    wrong("softcap is inf", softcap=float("inf"))
    wrong("scale is nan", scale=float("nan"))
    wrong(r"sinks is \(2,\) .*\(4,\), floating", sinks=torch.zeros(2, device=device))
    wrong(r"sinks is \(4,\) torch.int64", sinks=torch.zeros(4, dtype=torch.long, device=device))
    wrong("prefix_lengths is given; it needs a prefix", prefix_lengths=lengths[:3])
    wrong(r"k_prefix is .*\(groups, 2, P, 16\)", prefix=(prefix[0][:, :1], prefix[1]))
    wrong("v_prefix is .*as k_prefix", prefix=(prefix[0], prefix[1][:, :, :8]))
    wrong("v_prefix is torch.float16", prefix=(prefix[0], prefix[1].half()))
    wrong("4 groups, which do not divide 6", prefix=tuple(torch.zeros(2, 4, 2, 20, 16)))
    wrong(r"prefix_lengths is \(2,\)", prefix=prefix, prefix_lengths=lengths[:2])
    table = torch.zeros(6, 2, dtype=torch.int32, device=device)
    wrong(r"block_table is \(5, 2\).*\(6, blocks", block_table=table[:5])
    wrong("block_table is .*torch.int64", block_table=table.long())
    wrong(r"k_cache is .*\(n_pages, Hkv, page_size, 16\)", k=k[..., :8], block_table=table)
    wrong("1 new tokens; the cache has only 0", block_table=table[:, :0])


def everything(device):
    q, k, v, lengths = problem(2, 4, 2, 1, 272, 16, [4, 270], torch.float32, device)
    pages = paged(k, v, lengths, 16)
    prefix = shared(2, 20, 16, [20], torch.float32, device)
    caches = pages["k_cache"], pages["v_cache"]
    return q, caches, lengths, torch.randn(4, device=device), prefix, pages["block_table"]


def test_opcheck(device):
    q, caches, lengths, sinks, prefix, table = everything(device)
    options = (9, 4.0, sinks, *prefix["prefix"], prefix["prefix_lengths"], table)
    torch.library.opcheck(
        torch.ops.ponder.decode_attention.default, (q, *caches, lengths, 0.25, *options)
    )


def test_compiles_in_one_graph(device):
    q, caches, lengths, sinks, prefix, table = everything(device)
    options = dict(window=9, softcap=4.0, sinks=sinks, block_table=table, **prefix)
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    y = compiled(q, *caches, lengths, **options)
    assert torch.equal(y, decode_attention(q, *caches, lengths, **options))

"""Packing: every token of every document once, documents kept apart, chains of thought cut."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder.models import GPT
from ponder.training import preset
from ponder.training.batch import IGNORE, Batch
from ponder.training.data import load_data
from ponder.training.loop import model_config
from ponder.training.packing import PackedRows, Shorten, best_fit, compacted, cut, pack

PAD, THINK, END = 0, 1, 2
documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def packed(lengths, context, loss=None, tokens=None) -> PackedRows:
    offsets = np.cumsum([0, *lengths])
    if tokens is None:
        tokens = np.arange(offsets[-1]) + 10  # all different, so that each can be found again
    pieces, _ = cut(offsets, context)
    with TemporaryDirectory() as folder:
        facts = pack(Path(folder), "train", pieces, context)
        rows = PackedRows(Path(folder), "train", context, tokens, loss, PAD)
        rows.start, rows.length, rows.ends = map(np.array, (rows.start, rows.length, rows.ends))
    assert facts == {"rows": len(rows), "tokens": sum(n - 1 for n in lengths)}
    return rows


@given(documents, st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_every_token_once_and_documents_apart(lengths, context, data):
    total = sum(lengths)
    loss = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    rows = packed(lengths, context, loss)
    tokens, targets, segment_ids = rows.batch(np.arange(len(rows)))
    assert tokens.shape == (len(rows), context) and segment_ids.dtype == torch.int32
    seen = []
    for row, goal, ids in zip(tokens, targets, segment_ids, strict=True):
        assert torch.equal(ids, ids.sort().values)  # each segment is in one place
        *segments, padding = ids.unique().tolist() + [-1] * int(PAD not in row)
        for segment in segments:
            here = row[ids == segment]
            assert torch.equal(here, here[0] + torch.arange(len(here)))
            for token, target in zip(here.tolist(), goal[ids == segment].tolist(), strict=True):
                assert target == (token + 1 if loss[token + 1 - 10] else IGNORE)
                seen.append(token - 10)
        assert (goal[ids == padding] == IGNORE).all() and (row[ids == padding] == PAD).all()
    last = np.cumsum(lengths) - 1  # of a document: it predicts nothing
    assert sorted(seen) == sorted(set(range(total)) - set(last.tolist()))


@given(documents, st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_rows_are_full_and_documents_cut_only_where_they_must_be(lengths, context):
    pieces, document = cut(np.cumsum([0, *lengths]), context)
    for d, length in enumerate(lengths):
        assert pieces.length[document == d].tolist() == [
            min(context, length - 1 - first) for first in range(0, length - 1, context)
        ]
    fill = np.bincount(best_fit(pieces.length, context), pieces.length)
    assert (fill <= context).all()
    # No two rows would fit into one.
    assert len(fill) < 2 or np.sort(fill)[:2].sum() > context


def test_best_fit_prefers_the_fullest_row():
    # 6 and 5 open two rows; 4 fills up the first exactly, 3 fits only the second, 2 fills that up.
    assert best_fit(np.array([4, 5, 3, 6, 2]), 10).tolist() == [0, 1, 1, 0, 1]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 6), st.integers(1, 4)), min_size=1),
    st.integers(4, 20),
    st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_chains_of_thought_are_cut_as_a_budget_cuts_them(shapes, context, whole):
    # A document is prompt, <think>, thoughts, </think>, answer; -1 thoughts: it does not think.
    texts, at = [], 10
    for prompt, thoughts, answer in shapes:
        fresh = iter(range(at, at + 100))
        text = [next(fresh) for _ in range(prompt)]
        if thoughts >= 0:
            text += [THINK, *(next(fresh) for _ in range(thoughts)), END]
        texts.append(text + [next(fresh) for _ in range(answer)])
        at += 100
    rows = packed([len(t) for t in texts], context, tokens=np.array(sum(texts, [])))
    shorten = Shorten(THINK, END, whole, len(rows.start), seed=0)
    every, epochs = np.arange(len(rows)), np.full(len(rows), 3)
    before, after = rows.batch(every), rows.batch(every, shorten, epochs)
    cuts = 0
    for i in range(len(rows)):
        for segment in range(rows.ends[i + 1] - rows.ends[i]):
            old, goals = (x[i][before.segment_ids[i] == segment].tolist() for x in before[:2])
            new, left = (x[i][after.segment_ids[i] == segment].tolist() for x in after[:2])
            if old == new:
                assert goals == left
                continue
            cuts += 1
            begin, end, kept = old.index(THINK), old.index(END), new.index(END)
            assert new == old[:kept] + old[end:] and begin < kept < end
            assert left == goals[: kept - 1] + [IGNORE] + goals[end:]
        rest = after.segment_ids[i] == int(rows.ends[i + 1] - rows.ends[i])
        assert (after.targets[i][rest] == IGNORE).all()
    if whole == 1.0:
        assert cuts == 0
    again = rows.batch(every, shorten, epochs)
    assert all(torch.equal(a, b) for a, b in zip(after, again, strict=True))


def test_cuts_differ_by_epoch_and_every_length_is_drawn():
    text = [10, THINK, *range(20, 24), END, 11, 12]
    rows = packed([len(text)] * 400, 8, tokens=np.array(text * 400))
    shorten = Shorten(THINK, END, 0.5, len(rows.start), seed=0)
    every = np.arange(len(rows))
    lengths = []
    for epoch in (0, 1):
        tokens = rows.batch(every, shorten, np.full(len(rows), epoch)).tokens
        lengths.append([row.index(END) - row.index(THINK) - 1 for row in tokens.tolist()])
    assert lengths[0] != lengths[1]
    # A row is cut alike whatever stands beside it, and otherwise with another seed.
    part = rows.batch(every[300:], shorten, np.full(100, 1)).tokens
    assert torch.equal(part, tokens[300:])
    other = Shorten(THINK, END, 0.5, len(rows.start), seed=1)
    assert not torch.equal(rows.batch(every, other, np.full(len(rows), 1)).tokens, tokens)
    counts = np.bincount(lengths[0])
    assert len(counts) == 5
    # Half are whole, the other half is of any of the five lengths.
    assert 200 < counts[4] < 280 and (counts[:4] > 20).all()


def test_the_first_of_several_thoughts_is_the_one_that_is_cut():
    text = [10, THINK, 20, 21, 22, END, 11, THINK, 23, 24, END, 12]
    rows = packed([len(text)] * 40, 11, tokens=np.array(text * 40))
    shorten = Shorten(THINK, END, 0.0, len(rows.start), seed=0)
    batch = rows.batch(np.arange(40), shorten, np.zeros(40, dtype=np.int64))
    found = {tuple(t for t in row if t) for row in batch.tokens.tolist()}
    assert found == {(10, THINK, *text[2 : 2 + n], *text[5:-1]) for n in range(4)}


def runs(batch: Batch, lengths) -> list:
    """(tokens, targets) of every segment of every row, up to the rows' lengths."""
    found = []
    for tokens, targets, ids, n in zip(*batch, lengths, strict=True):
        for segment in ids[:n].unique():
            here = (ids[:n] == segment).nonzero().flatten()
            assert torch.equal(here, here[0] + torch.arange(len(here)))  # it is in one place
            found.append((tokens[here].tolist(), targets[here].tolist()))
    return sorted(found)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=80), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_rows_that_are_mostly_padding_share_a_row(lengths, segmented, seed):
    rows, width, draw = len(lengths), 24, np.random.default_rng(seed)
    last = torch.tensor(lengths)[:, None] - 1
    place = torch.arange(width)
    some = torch.from_numpy(draw.random((rows, width)) < 0.5)
    tokens = torch.arange(rows * width).view(rows, width)  # each can be found again
    targets = torch.where((place < last) & some | (place == last), tokens + 1, IGNORE)
    ids = torch.from_numpy(np.sort(draw.integers(0, 3, (rows, width)).astype(np.int32)) * segmented)
    batch = Batch(tokens, targets, ids if segmented else None)
    assert batch.lengths().tolist() == lengths
    small = compacted(batch)
    if small is not batch:
        assert len(small.tokens) % 8 == 0 and len(small.tokens) <= 0.8 * rows
        filled = (small.segment_ids >= 0).sum(1)
        assert (small.targets[small.segment_ids < 0] == IGNORE).all()
        assert runs(small, filled) == runs(batch._replace(segment_ids=ids), lengths)


def test_nothing_to_learn_and_full_rows_stay_as_they_are():
    tokens = torch.ones(16, 8, dtype=torch.int64)
    full = Batch(tokens, tokens)
    assert compacted(full) is full
    assert len(compacted(Batch(tokens, torch.full_like(tokens, IGNORE))).tokens) == 8


def test_a_task_is_learned_from_fewer_tokens():
    config = preset("tiny", data="task:last_digit", batch_size=64)
    data = load_data(config)
    batch = data.batch(0)
    small = compacted(batch)
    assert small.tokens.numel() < 0.75 * batch.tokens.numel()
    assert small.tokens.numel() < 1.25 * int(batch.lengths().sum())
    torch.manual_seed(0)
    model = GPT(model_config(config, data.vocabulary.size))
    for p in model.parameters():  # outputs start at zero
        torch.nn.init.normal_(p, std=0.2)
    gradients = []
    for x in (batch, small):
        loss = model(*x, reduction="sum")
        gradients.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))

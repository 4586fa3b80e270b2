"""Packing: every token of every document once, documents kept apart, chains of thought cut."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder.training.batch import IGNORE
from ponder.training.packing import PackedRows, Shorten, best_fit, cut, pack

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
    counts = np.bincount(lengths[0])
    assert len(counts) == 5
    # Half are whole, the other half is of any of the five lengths.
    assert 200 < counts[4] < 280 and (counts[:4] > 20).all()

"""Rows of a run on disk: whatever a model writes, and wherever a write was cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponder.training.journal import append_rows, forget_after, read_rows

HARD = "a\u2028b\u2029c\x85d\x1ce\x0bf\r\ng\x00"  # where str.splitlines would cut


def test_rows_come_back_whatever_a_model_wrote(tmp_path):
    file = tmp_path / "samples.jsonl"
    rows = [{"step": i, "text": HARD * i, "right": None} for i in range(4)]
    append_rows(file, rows[:1])
    append_rows(file, rows[1:])
    assert read_rows(file) == rows
    forget_after(file, 2)
    assert read_rows(file) == rows[:3]
    with open(file, "a", encoding="utf-8") as cut:
        cut.write(json.dumps(rows[3])[:20])
    assert read_rows(file) == rows[:3]
    with open(file, "ab") as cut:  # inside a character, as a full disk does
        cut.write("思".encode()[:2])
    assert read_rows(file) == rows[:3]
    assert read_rows(tmp_path / "none.jsonl") == []


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_one_row(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("rows") / "samples.jsonl"
    append_rows(file, [{"step": 1, "text": text}])
    assert read_rows(file) == [{"step": 1, "text": text}]


def test_a_damaged_row_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for wrong in (b"step 2\n", b'{"text": "\xe5\xa4"}\n'):
        file.write_bytes(b'{"step": 1}\n' + wrong)
        with pytest.raises(ValueError, match="metrics.jsonl line 2 is not JSON; mend or delete it"):
            read_rows(file)

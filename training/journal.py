"""Files of a run with one JSON object a line: train/metrics.jsonl and train/samples.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..provenance import write_aside


def append_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(text)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows; none where there is no file, and a last line that lacks its end is left out."""
    if not file.exists():
        return []
    # Bytes, as the last line may end inside a character; and splitlines would also cut at what a
    # model may write, as U+2028.
    whole = file.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{file} line {number} is not JSON; mend or delete it") from None
    return rows


def forget_after(file: Path, step: int) -> None:
    """Drop the rows of later steps, which a resumed run earns again."""
    if file.exists():
        kept = [row for row in read_rows(file) if row["step"] <= step]
        write_aside(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

"""Held-out rows must not have been trained on; whether they were is asked of what rows say, not of where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastserve.data.rows import read_rows
from fastserve.errors import DatasetInvalid

Overlap = tuple[str, int, str, int]
"""Training file and line, held-out file and line."""

_SHOWN = 3


def overlap(train_paths: Iterable[Path], heldout_paths: Iterable[Path]) -> list[Overlap]:
    """Every held-out row that also stands in the training rows, in the order of the held-out rows.

    Rows are the same when they say the same: file format, blanks, Unicode form and further fields do not matter.
    """
    trained: dict[str, tuple[str, int]] = {}
    for path in train_paths:
        for row in read_rows(Path(path)):
            trained.setdefault(row.digest, (row.file, row.line))
    found: list[Overlap] = []
    for path in heldout_paths:
        for row in read_rows(Path(path)):
            if row.digest in trained:
                found.append((*trained[row.digest], row.file, row.line))
    return found


def require_disjoint(train_paths: Iterable[Path], heldout_paths: Iterable[Path]) -> None:
    """Raise DatasetInvalid, with the first places, when held-out rows stand inside the training rows."""
    found = overlap(train_paths, heldout_paths)
    if found:
        places = "; ".join(f"{held}:{held_line} is {file}:{line}" for file, line, held, held_line in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise DatasetInvalid(
            f"held-out rows inside the training rows: {places}{more}; take them out of evaluate.data or train.dataset"
        )

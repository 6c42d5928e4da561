"""Held-out rows must not have been trained on; whether they were is asked of what rows say, not of where they lie.

What the held-out rows say is kept as digests, and the training rows pass by once: memory follows the smaller set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from fastserve.data.rows import Row, data_files, read_rows
from fastserve.data.running_text import is_running_text
from fastserve.errors import DatasetInvalid

Overlap = tuple[str, int, str, int]
"""Training file and line, held-out file and line."""

TELLING_WORDS = 8
"""Words that a line of a text file must have to count; shorter ones (headings, `THE END`) stand in many books."""

_SHOWN = 3
_DIGEST_BYTES = 16


def overlap(train_paths: Iterable[Path], heldout_paths: Iterable[Path]) -> list[Overlap]:
    """Every held-out row that also stands in the training rows, in the order of the held-out rows.

    Rows are the same when they say the same: file format, blanks, Unicode form and further fields do not matter. Text
    files are compared line by line; lines of fewer than TELLING_WORDS words do not count.
    """
    held: dict[bytes, list[tuple[int, tuple[str, int]]]] = {}
    for number, row in enumerate(_telling_rows(heldout_paths)):
        held.setdefault(_digest(row), []).append((number, (row.file, row.line)))
    trained: dict[bytes, tuple[str, int]] = {}
    for row in _telling_rows(train_paths):
        digest = _digest(row)
        if digest in held:
            trained.setdefault(digest, (row.file, row.line))
    places = [(number, place, digest) for digest, found in held.items() if digest in trained for number, place in found]
    return [(*trained[digest], *place) for _, place, digest in sorted(places)]


def _telling_rows(paths: Iterable[Path]) -> Iterator[Row]:
    for path in paths:
        for file in data_files(Path(path)):
            is_text = is_running_text(file)
            for row in read_rows(file):
                if not is_text or len(row.text.split()) >= TELLING_WORDS:
                    yield row


def _digest(row: Row) -> bytes:
    return bytes.fromhex(row.digest)[:_DIGEST_BYTES]


def require_disjoint(
    train_paths: Iterable[Path], heldout_paths: Iterable[Path], held_out_name: str = "evaluate.data"
) -> None:
    """Raise DatasetInvalid, with the first places, when held-out rows stand inside the training rows.

    held_out_name: what the manifest calls the held-out rows.
    """
    found = overlap(train_paths, heldout_paths)
    if found:
        places = "; ".join(f"{held}:{held_line} is {file}:{line}" for file, line, held, held_line in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise DatasetInvalid(
            f"held-out rows inside the training rows: {places}{more}; take them out of {held_out_name} or train.dataset"
        )

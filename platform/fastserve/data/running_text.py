"""Text files as running text: a book has no rows, and its lines end where a printer's did.

A file is read in blocks that a tokenizer takes at once, so memory stays flat however large it is. A block ends where a
line ends between two lines that are not blank: most tokenizers part words there, so the tokens are those of the whole.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from fastserve.errors import DatasetInvalid

SUFFIXES = (".txt", ".text")
BYTE_ORDER_MARK = "\ufeff"
BLOCK_CHARACTERS = 64 * 1024
"""Characters of a block, more or less; one without any blank is cut there all the same."""

_READ_BYTES = 64 * 1024
_LINE_END = re.compile(r"\S[^\S\n]*\n(?=\S)")


def is_running_text(file: Path) -> bool:
    """Whether the file holds text and no rows."""
    return file.suffix.lower() in SUFFIXES


def text_blocks(file: Path, characters: int = BLOCK_CHARACTERS) -> Iterator[str]:
    """The whole text of `file` in blocks of about `characters`; joined they are the file, with `\\n` for `\\r\\n`.

    Raises DatasetInvalid with file and line for what is not UTF-8, and for a byte-order mark inside the text.
    """
    held = ""
    for text in _decoded(file):
        held += text
        while len(held) >= characters:
            end = _cut(held, characters)
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _cut(text: str, characters: int) -> int:
    """Where a block of at most `characters` ends: behind a line, else before a blank, else anywhere."""
    line_ends = [found.end() for found in _LINE_END.finditer(text, characters // 2, characters)]
    if line_ends:
        return line_ends[-1]
    return max(text.rfind(" ", 1, characters), text.rfind("\n", 1, characters), 0) or characters


def _decoded(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, first, pending = 1, True, ""
    with file.open("rb") as stream:
        while True:
            raw = stream.read(_READ_BYTES)
            if first and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DatasetInvalid(f"{file.name}:1: the file is UTF-16; save it as UTF-8")
            try:
                text = pending + decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise DatasetInvalid(f"{file.name}:{line}: the text is not UTF-8; save the file as UTF-8") from error
            if first:
                text, first = text.removeprefix(BYTE_ORDER_MARK), False
            if BYTE_ORDER_MARK in text:
                line += text[: text.index(BYTE_ORDER_MARK)].count("\n")
                raise marked(f"{file.name}:{line}")
            # A carriage return at the end may be one half of a line end.
            pending = "\r" if raw and text.endswith("\r") else ""
            line += text.count("\n")
            yield text.removesuffix(pending).replace("\r\n", "\n")
            if not raw:
                return


def marked(place: str) -> DatasetInvalid:
    """The error for a byte-order mark at `place` (`file:line`) where none belongs."""
    return DatasetInvalid(
        f"{place}: a byte-order mark (U+FEFF) stands inside the file, where files were joined; remove it there"
    )

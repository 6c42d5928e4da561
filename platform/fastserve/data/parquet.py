"""Rows of a parquet file as plain values, equal to what the same rows are in JSON lines.

Arrow gives every row the union of all rows' fields, and its column types can name classes that are rebuilt by running
code of theirs. So nulls are taken out of structures, and a file whose types are not plain is refused from its footer,
before Arrow sees it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastserve.errors import DatasetInvalid

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 64 * 1024 * 1024

_ROWS_A_BATCH = 256
_READ_BYTES = 1 << 20
"""Bytes of a column read at once; without it the whole column of a row group is."""
_EXTENSION_KEY = b"ARROW:extension:name"


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries of lists, texts, numbers and booleans; what is null is absent.

    Raises DatasetInvalid, with the file's name, when it is torn or has types that are not plain.
    """
    _check_footer(file)
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, buffer_size=_READ_BYTES) as table:
            for batch in table.iter_batches(batch_size=_ROWS_A_BATCH):
                for row in batch.to_pylist():
                    yield _plain(row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetInvalid(f"{file.name}: the parquet file cannot be read: {detail}; write it again") from error


def _check_footer(file: Path) -> None:
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(len(MAGIC))
        stream.seek(max(0, size_bytes - 8))
        tail = stream.read(8)
        if head != MAGIC or tail[4:] != MAGIC or size_bytes < 12:
            raise DatasetInvalid(f"{file.name}: the parquet file is cut off or not parquet; write or copy it again")
        footer_bytes = int.from_bytes(tail[:4], "little")
        if footer_bytes > min(size_bytes - 12, MAX_FOOTER_BYTES):
            raise DatasetInvalid(f"{file.name}: the parquet file's footer is torn; write or copy it again")
        stream.seek(size_bytes - 8 - footer_bytes)
        footer = stream.read(footer_bytes)
    if any(form in footer for form in _base64_forms(_EXTENSION_KEY)):
        raise DatasetInvalid(
            f"{file.name}: a column has an Arrow extension type, which some library would rebuild by running code; "
            "write the column as lists, structs and text"
        )


def _base64_forms(text: bytes) -> list[bytes]:
    """What base64 makes of `text` inside something longer: one form for each of the three places it may begin at.

    The footer holds Arrow's schema in base64; looking for the key itself needs no parser that could be led astray.
    """
    forms = []
    for lead in range(3):
        whole = (len(text) + lead) // 3 * 3 - lead
        encoded = base64.b64encode(b"\0" * lead + text[:whole])
        forms.append(encoded[4 if lead else 0 :])
    return forms


def _plain(value: Any) -> Any:
    """Without the nulls that a structure has only because other rows have that field."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value

"""Parquet rows equal the rows of the same data in JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastserve.data.rows import read_rows
from fastserve.errors import DatasetInvalid


def test_a_parquet_file_and_its_jsonl_twin_give_the_same_rows(cases: Path) -> None:
    one, two = list(read_rows(cases / "05-tools.parquet")), list(read_rows(cases / "05-tools.jsonl"))
    assert [(row.messages, row.extra, row.digest) for row in one] == [
        (row.messages, row.extra, row.digest) for row in two
    ]
    assert list(one[0].messages[1]["tool_calls"][0]["function"]["arguments"]) == ["city"]
    assert list(one[1].messages[1]["tool_calls"][0]["function"]["arguments"]) == ["city", "unit"]
    assert one[2].extra == {"enable_thinking": True}


def test_messages_in_a_text_column_are_parsed(cases: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (cases / "05-tools.jsonl").read_text().splitlines()]
    path = tmp_path / "text.parquet"
    pq.write_table(pa.table({"messages": [json.dumps(row["messages"]) for row in rows]}), path)
    assert [row.messages for row in read_rows(path)] == [row.messages for row in read_rows(cases / "05-tools.jsonl")]


@pytest.mark.parametrize("size", [0, 3, 11, 1000, 3000])
def test_a_file_that_is_cut_off_is_named(cases: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.parquet"
    path.write_bytes((cases / "05-tools.parquet").read_bytes()[:size])
    with pytest.raises(DatasetInvalid, match=r"cut\.parquet"):
        list(read_rows(path))


def test_a_damaged_middle_is_named(cases: Path, tmp_path: Path) -> None:
    data = bytearray((cases / "05-tools.parquet").read_bytes())
    data[4:400] = b"\xff" * 396
    path = tmp_path / "damaged.parquet"
    path.write_bytes(data)
    with pytest.raises(DatasetInvalid, match=r"damaged\.parquet"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["u", "uu", "uuu", "a much longer name"])
def test_extension_types_are_refused_before_arrow_builds_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / "typed.parquet"
    typed = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"1" * 16], pa.binary(16)))
    pq.write_table(pa.table({"text": ["words"], name: typed}), path)
    with pytest.raises(DatasetInvalid, match="extension type"):
        list(read_rows(path))


def test_binary_text_is_refused_by_its_column(tmp_path: Path) -> None:
    path = tmp_path / "binary.parquet"
    pq.write_table(pa.table({"text": [b"words"]}), path)
    with pytest.raises(DatasetInvalid, match=r"binary\.parquet:1: text is binary data"):
        list(read_rows(path))

"""The table of plain scalars against what kubectl was measured to read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastserve.spec.scalars import is_octal_or_decimal, read_plain
from fastserve.spec.yaml_tree import parse, to_plain

MEASURED = json.loads((Path(__file__).parents[2] / "data" / "yaml-scalars.json").read_text())["rows"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["text"])
def test_a_plain_scalar_is_read_as_kubectl_reads_it(row: dict[str, Any]) -> None:
    value = read_plain(row["text"])
    if row.get("refused"):
        assert isinstance(value, float)
        assert not math.isfinite(value)
        return
    assert value == row["value"]
    assert isinstance(value, bool) == isinstance(row["value"], bool)
    assert isinstance(value, str) == isinstance(row["value"], str)


@pytest.mark.parametrize("text", ["2e-4", "no", "0123", "1:30", "2027-06-30"])
def test_in_quotes_it_is_always_text(text: str) -> None:
    assert to_plain(parse(f'a: "{text}"').trees[0]) == {"a": text}


@pytest.mark.parametrize("text", ["0123", "-0123", "08", "0_8", "00"])
def test_a_leading_zero_is_ambiguous(text: str) -> None:
    assert is_octal_or_decimal(text)


@pytest.mark.parametrize("text", ["0", "0.5", "0x1F", "0o17", "10", "1_000", "012.5"])
def test_other_numbers_are_not_ambiguous(text: str) -> None:
    assert not is_octal_or_decimal(text)


@given(st.text(alphabet="0123456789+-._eExXoObB:~yno", min_size=1, max_size=12))
def test_every_text_has_a_value(text: str) -> None:
    read_plain(text)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("text", ["1" * 200_000, "0" * 200_000, "0x" + "f" * 200_000, "1_" * 100_000])
def test_a_very_long_number_is_quick(text: str) -> None:
    read_plain(text)


@given(st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans())
def test_what_json_writes_is_read_back(value: float) -> None:
    read = to_plain(parse(json.dumps({"a": value})).trees[0])
    assert read == {"a": value}


def test_what_differs_from_pyyaml_is_known() -> None:
    differing = {row["text"] for row in MEASURED if not row.get("refused") and _pyyaml(row["text"]) != row["value"]}
    assert {"2e-4", "1e5", "1:30", "2027-06-30"} <= differing
    assert not {"0123", "on", "no", "1_000", "2.0e-4"} & differing


def _pyyaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return None

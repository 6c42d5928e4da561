"""Quantities: read, written back exactly, and refused with the right form."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("90s", 90), ("2m", 120), ("1h", 3600), ("30d", 2_592_000), ("1.5 h", 5400), ("0s", 0)],
)
def test_a_duration_is_seconds(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(("text", "form"), [("1:30", "90s"), ("1:00:05", "3605s"), ("0:05", "5s")])
def test_a_clock_time_is_refused_with_seconds(text: str, form: str) -> None:
    with pytest.raises(ValueError, match=f"write {form}"):
        units.parse_duration(text)


@pytest.mark.parametrize("text", ["", "90", "s", "1 week", "-5s", "1e3s", "٣s", "9" * 400 + "d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("32Gi", 2**35), ("500MB", 500 * 10**6), ("1.5KiB", 1536), ("7B", 7)]
)
def test_a_size_is_bytes(text: str, size: int) -> None:
    assert units.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24", "24G", "24gib", "-1GiB", "9" * 400 + "B", "9000000TiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a"):
        units.parse_bytes(text)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.1%", 0.001), ("150%", 1.5), ("7 %", 0.07)])
def test_a_percentage_is_a_share(text: str, share: float) -> None:
    assert units.parse_share(text) == share


@pytest.mark.parametrize("text", ["5", "0.05", "%", "-1%", "9" * 400 + "%"])
def test_what_is_no_percentage_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a"):
        units.parse_share(text)


@given(st.floats(0, 1e15))
def test_a_written_duration_is_read_as_the_same_number(seconds: float) -> None:
    assert units.parse_duration(units.write_duration(seconds)) == seconds


@given(st.integers(0, 2**63 - 1))
def test_a_written_size_is_read_as_the_same_number(size_bytes: int) -> None:
    assert units.parse_bytes(units.write_bytes(size_bytes)) == size_bytes


@given(st.floats(0, 1e6))
def test_a_written_percentage_is_read_as_the_same_number(share: float) -> None:
    assert units.parse_share(units.write_share(share)) == share


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "500ms"), (90, "90s"), (120, "2m"), (2_592_000, "30d"), (0, "0d"), (1e-5, "0.00001s")]
)
def test_a_duration_is_written_in_the_largest_unit(seconds: float, text: str) -> None:
    assert units.write_duration(seconds) == text or seconds == 0


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(24 * 2**30, "24GiB"), (500 * 10**6, "500MB"), (17, "17B"), (0, "0B"), (1536, "1536B")]
)
def test_a_size_is_written_in_a_unit_that_loses_nothing(size_bytes: int, text: str) -> None:
    assert units.write_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250ms"), (2.0, "2s"), (2.54, "2.5s"), (59.4, "59s"), (90, "1m30s"), (7260, "2h1m"), (math.inf, "unknown")],
)
def test_a_duration_is_shown_for_people(seconds: float, text: str) -> None:
    assert units.show_duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 B"), (269_060_552, "257 MiB"), (1536, "1.5 KiB"), (5 * 2**40, "5 TiB")]
)
def test_a_size_is_shown_for_people(size_bytes: int, text: str) -> None:
    assert units.show_bytes(size_bytes) == text


def test_a_share_is_shown_as_a_percentage() -> None:
    assert units.show_share(0.05) == "5%"

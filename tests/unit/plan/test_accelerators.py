from __future__ import annotations

import pytest

from fastserve.plan.accelerators import KNOWN, UNKNOWN_OPERATIONS_S, computes, known, operations_s


@pytest.mark.parametrize(
    ("written", "name"),
    [("L4", "L4"), ("nvidia-l4", "L4"), ("NVIDIA L40S", "L40S"), ("A100-SXM4-80GB", "A100"), ("H100 NVL", "H100")],
)
def test_a_type_is_found_by_its_words(written: str, name: str) -> None:
    assert known(written) is KNOWN[name]


@pytest.mark.parametrize("written", ["", "MI300X", "L400", "XL4"])
def test_a_type_that_is_not_listed_is_believed_and_taken_for_an_allowance(written: str) -> None:
    assert known(written) is None
    assert operations_s(written) == UNKNOWN_OPERATIONS_S
    assert all(computes(written, precision) for precision in ("fp32", "bf16", "fp16", "fp8"))


def test_a_faster_data_sheet_is_a_faster_guess() -> None:
    assert operations_s("H100") > operations_s("A100") > operations_s("L4")


def test_precisions_by_generation() -> None:
    assert [computes(kind, "fp8") for kind in ("H100", "L4", "A100", None)] == [True, True, False, False]
    assert [computes(kind, "bf16") for kind in ("A100", "V100", None)] == [True, False, True]
    assert computes("V100", "fp16")

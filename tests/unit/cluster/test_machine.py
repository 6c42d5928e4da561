"""What a machine is taken to have."""

import os

import pytest

from fastserve.cluster.machine import listed, local_hardware
from fastserve.plan.accelerators import known

TWO = "0, GPU-5ba3, NVIDIA H100 80GB HBM3, 81559\n1, GPU-77c1, NVIDIA L4, 23034\n"
MIB = 2**20


def test_this_machine_has_cores_and_memory() -> None:
    found = local_hardware()
    assert 1 <= found.cpus <= (os.cpu_count() or 1)
    assert found.memory_bytes > 100 * MIB


@pytest.mark.parametrize(
    ("visible", "kind", "memories"),
    [
        (None, "NVIDIA H100 80GB HBM3", (81559 * MIB, 23034 * MIB)),
        ("1", "NVIDIA L4", (23034 * MIB,)),
        ("1,0", "NVIDIA L4", (23034 * MIB, 81559 * MIB)),
        ("GPU-5b", "NVIDIA H100 80GB HBM3", (81559 * MIB,)),
        ("", "", ()),
        ("-1", "", ()),
        ("7", "", ()),
    ],
)
def test_accelerators_are_those_that_are_not_hidden(visible: str | None, kind: str, memories: tuple[int, ...]) -> None:
    assert listed(TWO, visible) == (kind, memories)


@pytest.mark.parametrize("told", ["", "No devices were found\n", "0, GPU-1, NVIDIA X, [N/A]\n", "a,b\n"])
def test_what_is_no_list_of_accelerators_names_none(told: str) -> None:
    assert listed(told, None) == ("", ())


def test_the_drivers_names_are_known_to_the_plan() -> None:
    assert known("NVIDIA H100 80GB HBM3") == known("H100")
    assert known("NVIDIA L4") == known("L4")

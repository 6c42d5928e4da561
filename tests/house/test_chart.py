"""The chart's page, schema and defaults are those that values.yaml makes."""

from __future__ import annotations

from pathlib import Path

import chart_files
import pytest

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/fastserve"


GENERATED = chart_files.generated()


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_file_of_the_chart_has_not_drifted(name: str) -> None:
    assert (CHART / name).read_text() == GENERATED[name], "run python helm/chart_files.py"


def test_every_integer_is_printed_as_one() -> None:
    """A values file makes floats of numbers, and a template prints a million as 1e+06."""
    bare = []
    for template in sorted((CHART / "templates").rglob("*.*")):
        for value in chart_files.values():
            if isinstance(value.default, int) and not isinstance(value.default, bool):
                key = value.path.rpartition(".")[2]
                lines = [line for line in template.read_text().splitlines() if line.rstrip(" }").endswith(f".{key}")]
                bare += [f"{template.name}: {line.strip()}" for line in lines]
    assert bare == []

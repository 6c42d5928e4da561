"""Generated files are those that the sections generate today."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.spec.generate import FOLDER, generated, write

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", generated())
def test_a_generated_file_has_not_drifted(name: str) -> None:
    committed = ROOT / FOLDER / name
    assert committed.is_file(), "run python -m fastserve.spec.generate"
    assert committed.read_text(encoding="utf-8") == generated()[name], "run python -m fastserve.spec.generate"


def test_generating_writes_those_files_and_no_others(tmp_path: Path) -> None:
    write(tmp_path / "reference")
    assert {path.name for path in (tmp_path / "reference").iterdir()} == set(generated())

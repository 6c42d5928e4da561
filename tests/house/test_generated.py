"""Generated files are those that the sections generate today."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.spec.generate import generated, write

ROOT = Path(__file__).parents[2]
WHAT_TO_DO = "run python -m fastserve.spec.generate"


@pytest.mark.parametrize("name", generated())
def test_a_generated_file_has_not_drifted(name: str) -> None:
    committed = ROOT / name
    assert committed.is_file(), WHAT_TO_DO
    assert committed.read_text(encoding="utf-8") == generated()[name], WHAT_TO_DO


@pytest.mark.parametrize("folder", sorted({str(Path(name).parent) for name in generated()}))
def test_a_folder_of_generated_files_holds_no_others(folder: str) -> None:
    assert {str(path.relative_to(ROOT)) for path in (ROOT / folder).iterdir()} <= set(generated())


def test_generating_writes_those_files_and_no_others(tmp_path: Path) -> None:
    write(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(generated())

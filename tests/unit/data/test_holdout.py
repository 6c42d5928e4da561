"""Held-out rows are held out, in general and in the quickstart."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.artifacts.tokenizer import TokenizerFiles
from fastserve.data.holdout import overlap, require_disjoint
from fastserve.data.rows import read_rows
from fastserve.data.samples import samples
from fastserve.errors import DatasetInvalid


def test_the_same_rows_are_found_in_another_format_and_encoding(cases: Path) -> None:
    assert overlap([cases / "05-tools.jsonl"], [cases / "05-tools.parquet"]) == [
        ("05-tools.jsonl", line, "05-tools.parquet", line) for line in (1, 2, 3)
    ]
    assert len(overlap([cases / "01-clean.jsonl"], [cases / "01-bom-crlf.jsonl"])) == 3


def test_the_refusal_names_the_places(cases: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"held-out rows inside the training rows: 01-clean\.jsonl:1 is 01-bom-"):
        require_disjoint([cases / "01-bom-crlf.jsonl"], [cases / "01-clean.jsonl"])
    require_disjoint([cases / "01-clean.jsonl"], [cases / "03-long-rows.jsonl"])


def test_the_quickstarts_held_out_questions_are_not_trained_on(quickstart_data: Path) -> None:
    train, held = quickstart_data / "quickstart-train.jsonl", quickstart_data / "quickstart-heldout.jsonl"
    require_disjoint([train], [held])
    asked = {row.messages[0]["content"].casefold() for row in read_rows(train)}
    assert not [row.place for row in read_rows(held) if row.messages[0]["content"].casefold() in asked]


@pytest.mark.parametrize(("name", "rows"), [("quickstart-train.jsonl", 438), ("quickstart-heldout.jsonl", 131)])
def test_the_quickstarts_rows_are_clean(smol: TokenizerFiles, quickstart_data: Path, name: str, rows: int) -> None:
    path = quickstart_data / name
    path.read_bytes().decode("ascii")
    found = list(read_rows(path))
    assert len({row.digest for row in found}) == len(found) == rows
    assert f"| `{name}` | {rows} |" in (quickstart_data / "PROVENANCE.md").read_text()
    facts = samples([path], smol.tokenizer(), smol.chat_template, 128).facts
    assert (facts.used, facts.truncated) == (rows, 0)

"""Held-out rows are held out, in general and in the quickstart."""

from __future__ import annotations

import tracemalloc
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
    with pytest.raises(DatasetInvalid, match=r"take them out of train\.validation\.data or train\.dataset"):
        require_disjoint([cases / "01-clean.jsonl"], [cases / "01-clean.jsonl"], "train.validation.data")


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


def test_copies_are_found_in_the_order_of_the_held_out_rows(tmp_path: Path) -> None:
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text("".join(f'{{"text": "row {number}"}}\n' for number in (3, 1, 3, 2)))
    held.write_text("".join(f'{{"text": "row {number}"}}\n' for number in (2, 9, 3, 2)))
    assert overlap([train], [held]) == [
        ("train.jsonl", 4, "held.jsonl", 1),
        ("train.jsonl", 1, "held.jsonl", 3),
        ("train.jsonl", 4, "held.jsonl", 4),
    ]


def test_a_line_of_a_text_file_counts_when_it_says_enough(tmp_path: Path) -> None:
    train, held = tmp_path / "train.txt", tmp_path / "held.txt"
    train.write_text("THE END\nIt was the best of times, it was the worst of times\n")
    held.write_text("THE END\n")
    assert overlap([train], [held]) == []
    held.write_text("THE END\n\nIt was  the best of times, it was the worst of times")
    assert overlap([train], [held]) == [("train.txt", 2, "held.txt", 3)]


def test_the_books_last_chapter_is_held_out(quickstart_data: Path) -> None:
    require_disjoint([quickstart_data / "alice-train.txt"], [quickstart_data / "alice-heldout.txt"])


def test_memory_follows_the_held_out_rows(tmp_path: Path) -> None:
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    with train.open("w") as stream:
        stream.writelines(f'{{"text": "row {number} {"x" * 400}"}}\n' for number in range(10_000))
    held.write_text('{"text": "another"}\n')
    tracemalloc.start()
    try:
        assert overlap([train], [held]) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 500_000

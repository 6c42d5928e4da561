"""A tokenizer trained on one's own rows: whole, the same each time, and read by everything that reads tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.artifacts.tokenizer import from_folder
from fastserve.data.vocabulary import END_OF_TEXT, FEWEST, train_tokenizer
from fastserve.errors import DatasetInvalid, ManifestInvalid


def test_it_has_the_size_that_was_asked_for_and_writes_any_text(quickstart_data: Path, tmp_path: Path) -> None:
    train_tokenizer(quickstart_data / "alice-train.txt", 512, tmp_path / "made")
    files = from_folder(tmp_path / "made")
    tokenizer = files.tokenizer()
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert files.stops == {"tokenizer": (0,)}
    assert files.special["eos_token"] == END_OF_TEXT
    for text in ("Alice was beginning", "  ü 漢字\n\n\t😀 ", "Don't!", ""):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode(END_OF_TEXT).ids == [0]
    book = (quickstart_data / "alice-heldout.txt").read_text()
    assert len(tokenizer.encode(book).ids) < len(book) / 2


def test_the_same_text_gives_the_same_bytes(quickstart_data: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_tokenizer(quickstart_data / "alice-train.txt", 700, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_is_said_is_learnt_whatever_the_form_of_the_row(tmp_path: Path) -> None:
    rows = [
        {"text": "zebra " * 40},
        {"messages": [{"role": "user", "content": "quokka " * 40}, {"role": "assistant", "content": "walrus " * 40}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer(tmp_path / "rows.jsonl", 400, tmp_path / "made")
    tokenizer = from_folder(tmp_path / "made").tokenizer()
    assert all(len(tokenizer.encode(f" {word}").ids) == 1 for word in ("zebra", "quokka", "walrus"))
    assert tokenizer.get_vocab_size() < 400, "a small text gives fewer"


def test_transformers_reads_it(quickstart_data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer(quickstart_data / "alice-heldout.txt", 300, tmp_path / "made")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "made", local_files_only=True)
    ours = from_folder(tmp_path / "made").tokenizer()
    assert loaded("said Alice\n").input_ids == ours.encode("said Alice\n").ids
    assert loaded.eos_token_id == loaded.pad_token_id == 0


def test_too_small_a_vocabulary_is_refused(quickstart_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match=r"scratch\.vocabulary: is 256; it needs 257"):
        train_tokenizer(quickstart_data / "alice-heldout.txt", FEWEST - 1, tmp_path / "made")
    train_tokenizer(quickstart_data / "alice-heldout.txt", FEWEST, tmp_path / "made")
    assert from_folder(tmp_path / "made").tokenizer().get_vocab_size() == FEWEST


@pytest.mark.parametrize(
    ("rows", "message"), [("", "is empty"), ('{"text": "one"}\n{"text": 2}\n', r"rows\.jsonl:2: text is a number")]
)
def test_rows_that_say_nothing_are_refused(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(DatasetInvalid, match=message):
        train_tokenizer(tmp_path / "rows.jsonl", 300, tmp_path / "made")
    assert not (tmp_path / "made").exists()

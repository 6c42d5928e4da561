"""A text file is one text: nothing of it is lost, wherever blocks and samples end."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.artifacts.tokenizer import TokenizerFiles
from fastserve.data import samples as sampling
from fastserve.data.running_text import text_blocks
from fastserve.data.samples import ONE_TOKEN, SampleStream, dataset_facts, samples
from fastserve.errors import DatasetInvalid

BOOK = "alice-train.txt"


@given(st.text(st.sampled_from("ab \n\r\té"), max_size=200), st.integers(1, 30))
def test_blocks_joined_are_the_file(text: str, characters: int) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        file = Path(folder) / "book.txt"
        file.write_bytes(text.encode())
        blocks = list(text_blocks(file, characters))
    assert "".join(blocks) == text.replace("\r\n", "\n")
    assert all(blocks)
    assert all(len(block) <= characters for block in blocks)


def test_characters_and_line_ends_across_reads_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.data.running_text._READ_BYTES", 3)
    (tmp_path / "book.txt").write_bytes("\ufeffä€😀\r\n\r\nx\ry\r".encode())
    assert "".join(text_blocks(tmp_path / "book.txt")) == "ä€😀\n\nx\ry\r"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"one\ntwo \xff\n", r"book\.txt:2: the text is not UTF-8"),
        (b"one\n\xe2\x82", r"book\.txt:2: the text is not UTF-8"),
        (b"\xff\xfeo\0n\0e\0", r"book\.txt:1: the file is UTF-16"),
        ("one\n\ufefftwo".encode(), r"book\.txt:2: a byte-order mark"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(
    tmp_path: Path, data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_bytes(data)
    for read_bytes in (1, 65536):
        monkeypatch.setattr("fastserve.data.running_text._READ_BYTES", read_bytes)
        if read_bytes == 1 and data.startswith(b"\xff\xfe"):
            continue  # a file of one byte at a time is not met; the mark stands in the first read
        with pytest.raises(DatasetInvalid, match=message):
            list(text_blocks(tmp_path / "book.txt"))


def test_a_book_is_cut_into_consecutive_samples(smol: TokenizerFiles, quickstart_data: Path) -> None:
    book = quickstart_data / BOOK
    found = samples([book], smol.tokenizer(), None, 256)
    ids = [token for sample in found.samples for token in sample.ids]
    assert smol.tokenizer().decode(ids, skip_special_tokens=False) == book.read_text()
    # Blocks end where the tokenizer parts words, so they leave no trace in the tokens.
    assert ids == smol.tokenizer().encode(book.read_text(), add_special_tokens=False).ids
    assert {len(sample.ids) for sample in found.samples[:-1]} == {256}
    assert all(sample.trained == [False, *[True] * (len(sample.ids) - 1)] for sample in found.samples)
    facts = found.facts
    assert (facts.rows, facts.used, facts.truncated, facts.left_out) == (len(found.samples), facts.rows, 0, {})
    assert (facts.tokens, facts.trained_tokens) == (len(ids), len(ids) - facts.used)
    assert [sample.place for sample in found.samples[:2]] == [f"{BOOK}:1", f"{BOOK}:2"]
    assert len({sample.digest for sample in found.samples}) == len(found.samples)


def test_small_blocks_give_the_same_samples(
    smol: TokenizerFiles, quickstart_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> list[list[int]]:
        stream = SampleStream([quickstart_data / BOOK], smol.tokenizer(), None, 100)
        return [list(sample.ids) for sample in stream]

    whole = read()
    monkeypatch.setattr(sampling, "text_blocks", lambda file: text_blocks(file, 2000))
    monkeypatch.setattr(sampling, "_BATCH_BLOCKS", 3)
    assert read() == whole


def test_overlength_says_nothing_about_text_files(smol: TokenizerFiles, quickstart_data: Path) -> None:
    cut, dropped = (
        dataset_facts([quickstart_data / BOOK], smol.tokenizer(), None, 64, over_length=kind)
        for kind in ("truncate", "drop")
    )
    assert cut == dropped
    assert not cut.left_out


def test_a_last_token_alone_is_left_out_and_counted(smol: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The sun is a star.")
    tokens = len(smol.tokenizer().encode("The sun is a star.").ids)
    facts = dataset_facts([tmp_path / "a.txt"], smol.tokenizer(), None, tokens - 1)
    assert (facts.rows, facts.used, facts.left_out) == (2, 1, {ONE_TOKEN: 1})


def test_each_file_is_a_text_of_its_own(smol: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Two.")
    (tmp_path / "a.text").write_text("One.")
    (tmp_path / "c.jsonl").write_text('{"text": "Three."}\n')
    found = samples([tmp_path], smol.tokenizer(), None, 64).samples
    assert [smol.tokenizer().decode(list(sample.ids)) for sample in found] == ["One.", "Two.", "Three."]
    assert [sample.place for sample in found] == ["a.text:1", "b.txt:1", "c.jsonl:1"]


def test_an_empty_text_file_is_refused(smol: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DatasetInvalid, match=r"a\.txt: the data set is empty"):
        samples([tmp_path / "a.txt"], smol.tokenizer(), None, 64)


def test_the_book_is_what_its_provenance_says(quickstart_data: Path) -> None:
    whole = b"".join((quickstart_data / name).read_bytes() for name in (BOOK, "alice-heldout.txt"))
    provenance = (quickstart_data / "PROVENANCE.md").read_text()
    assert hashlib.sha256(whole).hexdigest() in provenance
    assert whole.decode("ascii").isprintable() is False  # it has line ends
    assert {byte for byte in whole if byte < 32} == {10}
    for name in (BOOK, "alice-heldout.txt"):
        assert f"| `{name}` | {len((quickstart_data / name).read_bytes()):,} |" in provenance

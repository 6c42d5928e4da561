"""Rows are tokenised once, kept whole or not at all, and memory does not grow with them."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3_servers
from tiny_llama import write_rows, write_tokenizer

import fastserve
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.artifacts.tokenizer import load_tokenizer
from fastserve.data.samples import samples
from fastserve.errors import DatasetInvalid, DigestMismatch, StoreFailed
from fastserve.spec.train import Train
from fastserve.stages.train import tokens
from fastserve.stages.train.corpus import Corpus
from fastserve.stages.train.tokens import CorpusRef, open_corpus, tokenised
from fastserve.telemetry.progress import Reporter

DIGEST = "d" * 64
Tokenise = Callable[..., CorpusRef]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def moto() -> Iterator[s3_servers.S3Server]:
    with s3_servers.moto_server() as server:
        yield server


@pytest.fixture(params=["folder", "moto"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store, in a folder and in a bucket."""
    monkeypatch.setattr("fastserve.artifacts.transfer.DEFAULT_CACHE", tmp_path / "cache")
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server = request.getfixturevalue("moto")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return open_store(server.make_bucket(f"tokens-{secrets.token_hex(4)}"))


@pytest.fixture
def tokenise(shelf: Store, model: Path, tmp_path: Path) -> Tokenise:
    """`tokenise(data, digest=DIGEST, **section)` into the store."""

    def run(data: Path, digest: str = DIGEST, model_folder: Path = model, **section: Any) -> CorpusRef:
        train = Train.model_validate({"dataset": "x", **section})
        return tokenised(shelf, data, digest, model_folder, train, Reporter(lambda value: None), scratch=tmp_path)

    return run


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it tokenises again")

    monkeypatch.setattr(tokens, "SampleStream", refuse)


def test_the_corpus_holds_the_samples(shelf: Store, tokenise: Tokenise, model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 30)
    ref = tokenise(data, maxLength=60)
    files = load_tokenizer(model)
    expected = samples([data], files.tokenizer(), files.chat_template, 60, special=files.special)
    corpus, wanted = open_corpus(shelf, ref), Corpus.of(expected.samples)
    assert np.array_equal(corpus.ids, wanted.ids)
    assert np.array_equal(corpus.trained, wanted.trained)
    assert np.array_equal(corpus.starts, wanted.starts)
    assert not corpus.ids.flags.writeable
    facts = expected.facts
    assert (ref.rows, ref.used, ref.samples, ref.truncated) == (30, facts.used, len(corpus.lengths), facts.truncated)
    assert (ref.tokens, ref.trained_tokens, ref.longest) == (facts.tokens, facts.trained_tokens, max(wanted.lengths))
    assert ref.counts == {"read": 30, "used": facts.used, "truncated": facts.truncated, "leftOut": facts.left_out}
    assert facts.truncated > 0
    assert CorpusRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref


def test_rows_are_tokenised_once(
    shelf: Store, tokenise: Tokenise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 5)
    ref = tokenise(data)
    forbid_reading(monkeypatch)
    assert tokenise(data) == ref
    assert tokenise(tmp_path / "moved-elsewhere", learningRate=1e-5, batchTokens=99, epochs=3) == ref


def test_what_decides_about_the_tokens_is_in_their_digest(tokenise: Tokenise, model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 5)
    other = tmp_path / "other"
    write_tokenizer(other)
    (other / "chat_template.jinja").write_text((model / "chat_template.jinja").read_text().replace("\n", " "))
    refs = [
        tokenise(data),
        tokenise(data, digest="e" * 64),
        tokenise(data, model_folder=other),
        tokenise(data, maxLength=1000),
        tokenise(data, overLength="drop"),
    ]
    assert len({ref.digest for ref in refs}) == len(refs)


@pytest.mark.parametrize("name", ["ids.bin", "starts.bin"])
def test_a_torn_corpus_is_made_anew(shelf: Store, tokenise: Tokenise, tmp_path: Path, name: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 5)
    ref = tokenise(data)
    shelf.delete(ref.folder + name)
    again = tokenise(data)
    assert again.folder != ref.folder
    assert open_corpus(shelf, again).tokens(range(5)) == ref.tokens
    assert not shelf.names(ref.folder), "what is torn is removed"


def test_a_corpus_cut_short_is_made_anew(model: Path, tmp_path: Path) -> None:
    shelf = open_store(str(tmp_path / "store"))
    data = write_rows(tmp_path / "rows.jsonl", 5)
    train = Train.model_validate({"dataset": "x"})
    ref = tokenised(shelf, data, DIGEST, model, train, Reporter(lambda value: None))
    file = tmp_path / "store" / ref.folder / "ids.bin"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DigestMismatch, match=r"ids\.bin is damaged"):
        open_corpus(shelf, ref)
    again = tokenised(shelf, data, DIGEST, model, train, Reporter(lambda value: None))
    assert open_corpus(shelf, again, verify=True).tokens(range(5)) == ref.tokens


@pytest.mark.parametrize("marker", [b"{", b"[]", b'{"format": 99}', b'{"format": 1}'])
def test_a_damaged_marker_counts_as_none(shelf: Store, tokenise: Tokenise, tmp_path: Path, marker: bytes) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 5)
    ref = tokenise(data)
    shelf.write(f"tokens/{ref.digest}/corpus.json", marker)
    assert tokenise(data).tokens == ref.tokens


def test_a_writer_that_was_killed_leaves_nothing_that_is_read(
    shelf: Store, tokenise: Tokenise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 5)

    def die(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(shelf), "create", die)
        patch.setattr(type(shelf), "delete_under", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            tokenise(data)
    left = shelf.names("tokens/")
    assert len(left) == 3
    ref = tokenise(data)
    assert open_corpus(shelf, ref).tokens(range(5)) == ref.tokens
    assert not set(left) & set(shelf.names("tokens/"))


def test_two_writers_at_once_agree(
    shelf: Store, tokenise: Tokenise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 5)
    both = threading.Barrier(4)
    write = tokens._write

    def together(*arguments: Any) -> int:
        longest = write(*arguments)
        both.wait(30)
        return longest

    monkeypatch.setattr(tokens, "_write", together)
    found: list[CorpusRef] = []
    threads = [threading.Thread(target=lambda: found.append(tokenise(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({ref.folder for ref in found}) == 1
    assert open_corpus(shelf, found[0]).tokens(range(5)) == found[0].tokens
    assert {name.rpartition("/")[0] + "/" for name in shelf.names(found[0].folder)} == {found[0].folder}


def test_a_store_that_fails_is_said(
    shelf: Store, tokenise: Tokenise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise StoreFailed("the disk is gone; use another")

    monkeypatch.setattr(type(shelf), "put_file", fail)
    with pytest.raises(StoreFailed, match="the disk is gone"):
        tokenise(write_rows(tmp_path / "rows.jsonl", 5))


def test_rows_that_teach_nothing_are_refused_and_not_kept(shelf: Store, tokenise: Tokenise, tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match="maxLength: 8"):
        tokenise(write_rows(tmp_path / "rows.jsonl", 5), maxLength=8)
    assert shelf.names("tokens/") == []
    assert not list(tmp_path.glob("fastserve-tokens-*"))


def test_progress_is_told(model: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    data = write_rows(tmp_path / "rows.jsonl", 2000)
    train = Train.model_validate({"dataset": "x"})
    report = Reporter(told.append, min_interval_seconds=0)
    tokenised(open_store(str(tmp_path / "store")), data, DIGEST, model, train, report)
    assert any("tokenising: 1,7" in value["note"] for value in told)


PEAK = """
import gc, json, sys
from pathlib import Path
from fastserve.artifacts.stores import open_store
from fastserve.spec.train import Train
from fastserve.stages.train.tokens import open_corpus, tokenised
from fastserve.telemetry.progress import Reporter
store, model, *files = sys.argv[1:]
def run(data):
    train = Train.model_validate({"dataset": "x", "maxLength": 256})
    return tokenised(open_store(store), Path(data), data, Path(model), train, Reporter(lambda value: None))
def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what + ":"))
found = []
for small, large in zip(files[::2], files[1::2]):
    run(small)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    ref = run(large)
    found.append({"grown": resident("VmHWM") - before, "tokens": ref.tokens})
print(json.dumps(found))
"""


def test_memory_stays_flat(model: Path, tmp_path: Path) -> None:
    """What may be grown by is twice the size of the file; its samples in lists would take four times as much."""
    size, suffixes = 8_000_000, ("jsonl", "parquet", "txt")
    files = []
    for suffix in suffixes:
        for name, length in (("small", 1_000_000), ("large", size)):
            files.append(str(tmp_path / f"{name}.{suffix}"))
            write_text(Path(files[-1]), length)
    environment = {
        "PYTHONPATH": str(Path(fastserve.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": str(tmp_path),
    }
    words = [sys.executable, "-c", PEAK, str(tmp_path / "store"), str(model), *files]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    for suffix, found in zip(suffixes, json.loads(ran.stdout), strict=True):
        assert found["tokens"] > size / 8, suffix
        assert found["grown"] < 2 * size, suffix


def write_text(path: Path, size: int) -> None:
    """`size` bytes of long words, one token each but for the separators."""
    lines = [f"<|im_start|>{'a' * 9} {'<|im_end|>' * 20} {number}" for number in range(size // 240)]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": lines})
        pyarrow.parquet.write_table(table, path, row_group_size=2000, compression="none", use_dictionary=False)
        return
    with path.open("w") as stream:
        for line in lines:
            stream.write((line if path.suffix == ".txt" else json.dumps({"text": line})) + "\n")

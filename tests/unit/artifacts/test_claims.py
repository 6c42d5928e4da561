from __future__ import annotations

from pathlib import Path

import pytest
from model_files import write_model

from fastserve.artifacts.claims import FOLDER, mounted_claims
from fastserve.artifacts.sources import fetch, resolve
from fastserve.errors import SourceInvalid, SourceNotFound
from fastserve.spec.source import Source


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as pods have it, with a claim that holds a model and rows."""
    folder = tmp_path / "sources"
    write_model(folder / "weights/small")
    (folder / "weights/rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "secret.jsonl").write_text('{"text": "not yours"}\n')
    monkeypatch.setenv(FOLDER, str(folder))
    return folder


def test_a_model_on_a_claim_is_the_folder(claims: Path, tmp_path: Path) -> None:
    assert mounted_claims() == {"weights"}
    found = resolve(Source(uri="pvc://weights/small"))
    assert found.digest == resolve(Source(uri=f"file://{claims}/weights/small")).digest
    fetch(Source(uri="pvc://weights/small"), found.digest, tmp_path / "into", role="model")
    assert (tmp_path / "into/config.json").read_bytes() == (claims / "weights/small/config.json").read_bytes()


@pytest.mark.parametrize("path", ["rows.jsonl", "*.jsonl"])
def test_rows_may_be_a_file_or_a_pattern(claims: Path, path: str) -> None:
    assert [file.path for file in resolve(Source(uri=f"pvc://weights/{path}"), role="data").files] == ["rows.jsonl"]


def test_nothing_beside_the_claim_is_read(claims: Path) -> None:
    (claims / "weights/out").symlink_to(claims.parent)
    for path in ("../../secret.jsonl", "out/secret.jsonl"):
        with pytest.raises(SourceInvalid, match="leaves the claim"):
            resolve(Source(uri=f"pvc://weights/{path}"), role="data")
    for claim in ("other", "..", "."):
        with pytest.raises(SourceNotFound, match=r"not mounted here.*ray\.sourceClaims"):
            resolve(Source(uri=f"pvc://{claim}/secret.jsonl"), role="data")
    with pytest.raises((SourceInvalid, SourceNotFound)):
        resolve(Source(uri="pvc://weights/../../*.jsonl"), role="data")


def test_a_folder_that_is_not_there_holds_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "nothing"))
    assert mounted_claims() == set()
    monkeypatch.delenv(FOLDER)
    assert mounted_claims() is None

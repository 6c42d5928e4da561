"""The digest that was evaluated is the digest that is served."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.record import Record
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.errors import ArtifactNotFound, DigestMismatch
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage, StageRequest
from fastserve.stages.serve.settings import Settings

KEY = "a" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def record(store: Store, tmp_path: Path) -> Record:
    (tmp_path / "made" / "model").mkdir(parents=True)
    (tmp_path / "made" / "model" / "config.json").write_text("{}")
    request = StageRequest("chat", Stage.SOURCE, KEY, 1, {})
    attempts.claim(store, request)
    return attempts.commit(store, request, tmp_path / "made", {}, {})


def _settings(store: Store, digest: str) -> Settings:
    revision = Revision("chat", Stage.SOURCE, KEY, digest, {})
    return Settings.from_json({"revision": revision.to_json(), "store": store.uri, "argv": ["--dtype=auto"], "env": {}})


def test_the_evaluated_model_is_served(store: Store, record: Record) -> None:
    assert (_settings(store, record.digest).fetch_model() / "config.json").read_text() == "{}"


def test_another_model_under_the_same_key_is_not_served(store: Store, record: Record) -> None:
    with pytest.raises(DigestMismatch, match="revision"):
        _settings(store, "0" * 64).fetch_model()


def test_damaged_bytes_are_not_served(store: Store, record: Record, tmp_path: Path) -> None:
    (file,) = (tmp_path / "store").rglob("config.json")
    file.chmod(0o644)
    file.write_text("[]")
    with pytest.raises(DigestMismatch, match=r"config\.json"):
        _settings(store, record.digest).fetch_model()


def test_a_model_that_is_gone_says_what_to_do(store: Store) -> None:
    with pytest.raises(ArtifactNotFound, match="fastserve up"):
        _settings(store, "0" * 64).fetch_model()


@pytest.fixture
def adapter(store: Store, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "brought" / "adapter").mkdir(parents=True)
    (tmp_path / "brought" / "adapter" / "adapter_config.json").write_text("{}")
    request = StageRequest("chat", Stage.SOURCE, "b" * 64, 1, {})
    attempts.claim(store, request)
    record = attempts.commit(store, request, tmp_path / "brought", {"rank": 8}, {})
    return {"name": "de", "key": "b" * 64, "digest": record.digest}


def test_an_adapter_comes_from_the_store_with_its_bytes_checked(
    store: Store, record: Record, adapter: dict[str, str], tmp_path: Path
) -> None:
    settings = _settings(store, record.digest)
    assert (settings.fetch_adapter(adapter) / "adapter_config.json").read_text() == "{}"
    with pytest.raises(DigestMismatch, match="adapter de"):
        settings.fetch_adapter(adapter | {"digest": "0" * 64})
    with pytest.raises(ArtifactNotFound, match=r"adapter de .*fastserve up"):
        settings.fetch_adapter(adapter | {"key": "c" * 64})
    there = [{"name": "de", "path": str(settings.fetch_adapter(adapter))}]
    assert settings.fetch_adapters([adapter, adapter | {"name": "gone", "key": "c" * 64}]) == there
    (file,) = (tmp_path / "store").rglob("adapter_config.json")
    file.chmod(0o644)
    file.write_text("[]")
    with pytest.raises(DigestMismatch, match=r"adapter_config\.json"):
        settings.fetch_adapter(adapter)

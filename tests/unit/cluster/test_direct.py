"""What ready replicas say of where their engines answer."""

from __future__ import annotations

from pathlib import Path

from fastserve.cluster.direct import ENGINES, ENGINES_VARIABLE, engine_urls
from fastserve.stages.serve import warm
from fastserve.stages.serve.remote import publish


def test_what_a_replica_writes_is_read_and_damaged_files_are_passed_over(tmp_path: Path, monkeypatch) -> None:
    assert engine_urls(tmp_path) == {}
    monkeypatch.setenv(ENGINES_VARIABLE, str(tmp_path / ENGINES))
    publish("a1", "http://127.0.0.1:7", {})
    publish("b2", "http://127.0.0.1:8", {})()
    (tmp_path / ENGINES / "torn.json").write_text('{"url"')
    assert engine_urls(tmp_path) == {"a1": "http://127.0.0.1:7"}


def test_both_sides_name_the_folder_alike() -> None:
    assert ENGINES_VARIABLE == warm.FOLDER_VARIABLE

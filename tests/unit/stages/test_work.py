"""What a stage is handed: inputs by role, sources by digest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastserve.artifacts import attempts, sources
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.errors import ArtifactNotFound, DigestMismatch, SourceNotFound
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.source import Source
from fastserve.stages.work import Work
from fastserve.telemetry.progress import Reporter

KEY = "a" * 64
Make = Callable[..., Work]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def make(store: Store, tmp_path: Path) -> Make:
    def work(**fields: object) -> Work:
        request = StageRequest("chat", Stage.TRAIN, "b" * 64, 1, {}, **fields)  # type: ignore[arg-type]
        (tmp_path / "scratch").mkdir(exist_ok=True)
        return Work(request, store, tmp_path / "scratch", Reporter(lambda _: None))

    return work


def test_an_input_is_a_folder_with_the_artifacts_files(store: Store, make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    source = StageRequest("chat", Stage.SOURCE, KEY, 1, {})
    attempts.claim(store, source)
    attempts.commit(store, source, folder, {}, {})
    work = make(inputs={"model": KEY}, input_stages={"model": Stage.SOURCE})
    assert (work.input("model") / "model" / "config.json").read_text() == "{}"
    assert work.input_record("model").key == KEY


def test_an_input_that_is_gone_says_what_to_do(make: Make) -> None:
    work = make(inputs={"model": KEY}, input_stages={"model": Stage.SOURCE})
    with pytest.raises(ArtifactNotFound, match="fastserve up"):
        work.input("model")


def test_a_role_that_the_stage_does_not_have_is_named(make: Make) -> None:
    with pytest.raises(ArtifactNotFound, match="no input 'parent'"):
        make().input_record("parent")


def test_data_is_what_was_planned_with(make: Make, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    source = Source(uri=f"file://{rows}")
    digest = sources.resolve(source, role="data").digest
    work = make(data={source.uri: digest})
    assert work.data(source).read_text() == '{"text": "a"}\n'


def test_data_that_changed_since_is_refused(make: Make, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    source = Source(uri=f"file://{rows}")
    digest = sources.resolve(source, role="data").digest
    rows.write_text('{"text": "b"}\n')
    os.utime(rows, (1, 1))
    with pytest.raises(DigestMismatch, match="changed"):
        make(data={source.uri: digest}).data(source)


def test_a_source_that_was_not_planned_is_not_read(make: Make) -> None:
    with pytest.raises(SourceNotFound, match="not resolved"):
        make().data(Source(uri="file:///rows.jsonl"))

"""An adapter is brought in like a model: fetched, checked, and with nothing beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_adapters import write_adapter

from fastserve.artifacts import sources
from fastserve.artifacts.stores import open_store
from fastserve.errors import SourceInvalid, SourceNotFound
from fastserve.plan.keys import ident_of
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.source import Source
from fastserve.stages.source.importer import run
from fastserve.stages.work import Outcome, Work
from fastserve.telemetry.progress import Reporter

CASES = Path(__file__).parents[3] / "data" / "cases"


def _bring(tmp_path: Path, folder: Path, known: bool = True) -> Outcome:
    source = Source(uri=f"file://{folder}")
    data = {ident_of(source): sources.resolve(source, role="adapter").digest} if known else {}
    section = {"adapter": source.model_dump(mode="json", by_alias=True)}
    request = StageRequest("chat", Stage.SOURCE, "a" * 64, 1, section, data=data)
    (tmp_path / "scratch").mkdir()
    return run(Work(request, open_store(str(tmp_path / "store")), tmp_path / "scratch", Reporter(lambda _: None)))


def test_its_two_files_and_its_rank_come_in(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "made", rank=16)
    (folder / "README.md").write_text("about it")
    (folder / "tokenizer.json").write_text("{}")
    outcome = _bring(tmp_path, folder)
    assert sorted(str(path.relative_to(outcome.folder)) for path in outcome.folder.rglob("*")) == [
        "adapter",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ]
    assert outcome.metrics == {"format": "lora", "rank": 16, "modules": ["q_proj"], "bytes": 4 * 2 * 16 * 32}


def test_one_that_the_engine_cannot_apply_is_an_end_by_name(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"base_model\.model\.lm_head\.weight"):
        _bring(tmp_path, CASES / "15-extra-head")


def test_one_that_nobody_resolved_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        _bring(tmp_path, write_adapter(tmp_path / "made"), known=False)

"""A source without weights: brought in for a model from scratch, as it is."""

from __future__ import annotations

import json
from pathlib import Path

from fastserve.artifacts import sources
from fastserve.artifacts.stores import open_store
from fastserve.plan.keys import ident_of
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.source import Source
from fastserve.stages.source.importer import run
from fastserve.stages.work import Work
from fastserve.telemetry.progress import Reporter

ROOT = Path(__file__).parents[4]


def test_a_configuration_is_a_source(tmp_path: Path) -> None:
    folder = ROOT / "deployments" / "models" / "small-llama"
    source = Source(uri=f"file://{folder}")
    digest = sources.resolve(source, role="model").digest
    request = StageRequest(
        "m", Stage.SOURCE, "a" * 64, 1, source.model_dump(mode="json", by_alias=True), data={ident_of(source): digest}
    )
    (tmp_path / "scratch").mkdir()
    outcome = run(Work(request, open_store(str(tmp_path / "store")), tmp_path / "scratch", Reporter(lambda _: None)))
    assert [path.name for path in (outcome.folder / "model").iterdir()] == ["config.json"]
    assert json.loads((outcome.folder / "model" / "config.json").read_text())["model_type"] == "llama"
    assert outcome.metrics == {"format": "config", "architecture": "LlamaForCausalLM", "parameters": 0}

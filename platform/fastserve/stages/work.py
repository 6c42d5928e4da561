"""What a stage is handed and what it hands back, so that every stage is one function and knows nothing of attempts.

A stage gets a `Work`: its request, its inputs as local folders, and somewhere to write. It returns an `Outcome`.
Claiming, committing, failing and cleaning up happen around it (`stages.entry`), once for all stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.artifacts import attempts, sources
from fastserve.artifacts.record import Record
from fastserve.artifacts.store import Store
from fastserve.errors import ArtifactNotFound, SourceNotFound
from fastserve.plan.keys import Role, ident_of
from fastserve.plan.stages import StageRequest
from fastserve.spec.source import Source
from fastserve.telemetry.progress import Reporter


@dataclass(frozen=True, slots=True)
class Work:
    """One attempt of one stage, as the stage sees it."""

    request: StageRequest
    store: Store
    scratch: Path
    """An empty local folder of this attempt; it is deleted afterwards, whatever happens."""

    report: Reporter
    """Takes counts from any thread; what it makes of them is the progress that others see."""

    def input_record(self, role: str) -> Record:
        """The committed record of an input. Raises ArtifactNotFound when there is none."""
        if role not in self.request.inputs:
            raise ArtifactNotFound(
                f"stage {self.request.stage} has no input '{role}'; it has {sorted(self.request.inputs)}"
            )
        stage, key = self.request.input_stages[role], self.request.inputs[role]
        record = attempts.find(self.store, stage, key)
        if record is None:
            raise ArtifactNotFound(
                f"the {stage} artifact {key[:12]} is no longer in {self.store.uri}; "
                "run `fastserve up` again to make it anew"
            )
        return record

    def input(self, role: str) -> Path:
        """A local folder with the files of an input, their digests checked; not to be written to.

        A model lies in Hugging Face layout under `model/`.
        """
        return attempts.fetch(self.store, self.input_record(role))

    def data(self, source: Source, role: Role = "data") -> Path:
        """A local folder or file with what `source` names; its digest is the one that was planned with.

        role: `data`, `model` or `adapter`; it decides which types of file are allowed.
        Raises SourceNotFound when the source is not among those that were resolved.
        """
        ident = ident_of(source)
        if ident not in self.request.data:
            raise SourceNotFound(f"{ident} was not resolved before this stage; it knows {sorted(self.request.data)}")
        folder = self.scratch / "sources" / str(sorted(self.request.data).index(ident))
        return sources.fetch(source, expect_digest=self.request.data[ident], into=folder, role=role)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage made."""

    folder: Path
    """Everything below it becomes the artifact's files."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What it measured; plain JSON values."""

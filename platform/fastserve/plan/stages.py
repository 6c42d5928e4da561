"""The stages, and the request that carries one of them to a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self


class Stage(StrEnum):
    """The stages that run and end, in their order. `serve` never ends, so it is not among them."""

    SOURCE = "source"
    """Bring the weights into the store: fetched, checked, converted to Hugging Face layout."""

    TRAIN = "train"
    COMPRESS = "compress"
    EVALUATE = "evaluate"


FORMAT = {Stage.SOURCE: 1, Stage.TRAIN: 2, Stage.COMPRESS: 1, Stage.EVALUATE: 1}
"""Version of what each stage writes. Raised when its output changes for the same input; that re-runs the stage."""


@dataclass(frozen=True, slots=True)
class StageRequest:
    """All that a worker must know to run one attempt of one stage; written to the store as request.json."""

    model: str
    """Name of the Model."""

    stage: Stage
    key: str
    """64 hex digits: digest of the section, the inputs and the stage's format."""

    attempt: int
    """Counted from 1."""

    section: Mapping[str, Any]
    """The stage's own section of the manifest, as JSON with the manifest's keys. For source: {uri, revision,
    tokenSecret}; for compress: {steps: [...]}."""

    inputs: Mapping[str, str] = field(default_factory=dict)
    """Artifact keys by role. train: {model}. compress: {model}. evaluate: {candidate, parent, source}. Each names a
    committed artifact's key."""

    input_stages: Mapping[str, Stage] = field(default_factory=dict)
    """Stage of each input, by the same roles: where in the store the key lies."""

    data: Mapping[str, str] = field(default_factory=dict)
    """Digest of each outside source that the stage reads, by URI: what it finds must have this digest."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Back from plain values."""
        return cls(
            model=value["model"],
            stage=Stage(value["stage"]),
            key=value["key"],
            attempt=value["attempt"],
            section=value["section"],
            inputs=value["inputs"],
            input_stages={role: Stage(stage) for role, stage in value["input_stages"].items()},
            data=value["data"],
        )

"""What the builder of a serving application is told, and the weights that this leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fastserve.artifacts import attempts
from fastserve.artifacts.stores import open_store
from fastserve.errors import ArtifactNotFound, DigestMismatch
from fastserve.plan.revision import Revision


@dataclass(frozen=True, slots=True)
class Settings:
    """A revision, and how its engine is started. Any change of it replaces every replica."""

    revision: Revision
    store_uri: str
    argv: tuple[str, ...]
    """Arguments of vLLM's server, without `--model`."""

    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the engine's processes."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From the `args` of an application (`cluster.ray_serve.app_for`)."""
        return cls(Revision.from_json(value["revision"]), value["store"], tuple(value["argv"]), dict(value["env"]))

    def fetch_model(self) -> Path:
        """A local folder in Hugging Face layout with the very bytes that were evaluated.

        Raises ArtifactNotFound when the artifact is gone, DigestMismatch when it is another one or its bytes are
        damaged.
        """
        store = open_store(self.store_uri)
        stage, key = self.revision.artifact_stage, self.revision.artifact_key
        record = attempts.find(store, stage, key)
        if record is None:
            raise ArtifactNotFound(
                f"the {stage} artifact {key[:12]} of {self.revision.model} is no longer in {store.uri}; "
                "run `fastserve up` again to make it anew"
            )
        if record.digest != self.revision.artifact_digest:
            raise DigestMismatch(
                f"the {stage} artifact {key[:12]} in {store.uri} has digest {record.digest[:12]}, but revision "
                f"{self.revision.short} of {self.revision.model} was made of {self.revision.artifact_digest[:12]}; "
                "run `fastserve up` again to make a revision of what is there now"
            )
        return attempts.fetch(store, record, verify=True) / "model"

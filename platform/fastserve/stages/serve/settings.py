"""What the builder of a serving application is told, and the weights that this leads to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fastserve.artifacts import attempts
from fastserve.artifacts.stores import open_store
from fastserve.errors import ArtifactNotFound, DigestMismatch, FastServeError
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage

log = logging.getLogger("fastserve.serve")


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
        stage, key = self.revision.artifact_stage, self.revision.artifact_key
        store = open_store(self.store_uri)
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

    def fetch_adapters(self, adapters: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
        """`name` and `path` of each adapter.

        One that cannot be had is said in the log and left out: it takes neither the model nor the others with it.
        """
        found = []
        for adapter in adapters:
            try:
                found.append({"name": adapter["name"], "path": str(self.fetch_adapter(adapter))})
            except FastServeError as error:
                log.error("adapter %s is not served: %s", adapter["name"], error)
        return found

    def fetch_adapter(self, adapter: Mapping[str, str]) -> Path:
        """A local folder with the very bytes of an adapter that was planned with.

        adapter: `name`, `key` and `digest`, as `cluster.adapters.adapters_for` makes them. Raises as `fetch_model`.
        """
        store = open_store(self.store_uri)
        record = attempts.find(store, Stage.SOURCE, adapter["key"])
        if record is None:
            raise ArtifactNotFound(
                f"adapter {adapter['name']} is no longer in {store.uri}; run `fastserve up` again to bring it in anew"
            )
        if record.digest != adapter["digest"]:
            raise DigestMismatch(
                f"adapter {adapter['name']} in {store.uri} has digest {record.digest[:12]}, and "
                f"{adapter['digest'][:12]} was planned with; run `fastserve up` again"
            )
        return attempts.fetch(store, record, verify=True) / "adapter"

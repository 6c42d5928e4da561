"""A revision: the immutable sum of everything that decides what is served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from fastserve.plan.digest import digest_of
from fastserve.plan.lora import rank_limit
from fastserve.plan.stages import Stage
from fastserve.spec.serve import SchedulerOptions, Serve


@dataclass(frozen=True, slots=True)
class Revision:
    """What is served. Replica counts, targets and rollout are not part of it: they change how, not what."""

    model: str
    artifact_stage: Stage
    artifact_key: str
    artifact_digest: str
    serve: Mapping[str, Any] = field(default_factory=dict)
    """The part of the serve section that decides the answers, as `deciding` gives it; manifest keys."""

    @property
    def digest(self) -> str:
        """64 hex digits."""
        return digest_of(asdict(self))

    @property
    def short(self) -> str:
        """First 8 digits, for people."""
        return self.digest[:8]

    def section(self) -> Serve:
        """The serve section again, typed; what is not part of a revision has its default."""
        return Serve.model_validate(
            {key: value for key, value in self.serve.items() if key not in ("adapters", "lora")}
        )

    @property
    def lora_rank(self) -> int:
        """Largest rank of an adapter that the engine can be told of while it runs; 0: none can."""
        return int(self.serve.get("lora", {}).get("rank", 0))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Back from plain values."""
        return cls(
            model=value["model"],
            artifact_stage=Stage(value["artifact_stage"]),
            artifact_key=value["artifact_key"],
            artifact_digest=value["artifact_digest"],
            serve=value["serve"],
        )


def deciding(serve: Serve, ranks: Iterable[int] = ()) -> dict[str, Any]:
    """What in a serve section decides the answers: task, context, scheduler, engine, and the largest adapter.

    ranks: of the adapters that are to be served. Which adapters they are is no part of it: they come and go while the
    engine runs. Defaults are written out and sizes are in bytes, so that `1GiB` and `1024MiB` are one revision.
    """
    deciders = {"task", "context", "scheduler", "engine"}
    part: dict[str, Any] = serve.model_dump(mode="json", by_alias=True, include=deciders)
    kv_cache_bytes = serve.engine.kv_cache
    part["engine"]["kvCache"] = None if kv_cache_bytes is None else f"{kv_cache_bytes}B"
    if serve.scheduler == "mlfq":
        options = serve.scheduler_options or SchedulerOptions()
        part["schedulerOptions"] = options.model_dump(by_alias=True)
        part["schedulerOptions"]["starvation"] = f"{max(1, round(options.starvation * 1000))}ms"
    limit = rank_limit(ranks)
    if limit:
        part["lora"] = {"rank": limit}
    return part

"""Everything that `fastserve plan` shows, as one plain value: drawn as tables for people, written as JSON for
machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastserve.plan.facts import DatasetFacts
from fastserve.plan.keys import stage_keys, wanted_stages
from fastserve.plan.lora import AdapterFacts, rank_limit
from fastserve.plan.memory import ByteTable
from fastserve.plan.observed import AttemptState, Observed
from fastserve.plan.pipeline import missing_stages
from fastserve.plan.stages import Stage
from fastserve.plan.time import StageEstimate
from fastserve.plan.training import TrainingPlan
from fastserve.spec.model import Model

State = Literal["committed", "running", "will run", "not needed", "unresolved"]
"""How a stage stands. `not needed`: its artifact is gone, and nothing that is still to run reads it."""


@dataclass(frozen=True, slots=True)
class StageLine:
    """A stage in the plan."""

    stage: str
    state: State
    key: str | None
    seconds: float | None
    """Estimate; None when there is none."""

    because: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "stage": self.stage,
            "state": self.state,
            "key": self.key,
            "seconds": self.seconds,
            "because": self.because,
        }


@dataclass(frozen=True, slots=True)
class DatasetLine:
    """A data set in the plan."""

    role: str
    """Where the manifest names it, such as `train.dataset`."""

    facts: DatasetFacts

    def to_json(self) -> dict[str, Any]:
        """Plain values with the manifest's kind of keys."""
        return {
            "role": self.role,
            "rows": self.facts.rows,
            "used": self.facts.used,
            "leftOut": dict(self.facts.left_out),
            "truncated": self.facts.truncated,
            "tokens": self.facts.tokens,
            "trainedTokens": self.facts.trained_tokens,
        }


@dataclass(frozen=True, slots=True)
class AdapterLine:
    """An adapter in the plan."""

    name: str
    facts: AdapterFacts

    def to_json(self) -> dict[str, Any]:
        """Plain values with the manifest's kind of keys."""
        return {
            "name": self.name,
            "rank": self.facts.rank,
            "modules": list(self.facts.modules),
            "bytes": self.facts.size_bytes,
        }


@dataclass(frozen=True, slots=True)
class Sheet:
    """The plan of one Model."""

    model: str
    stages: tuple[StageLine, ...]
    """The wanted stages in order; `serve` last, where it is wanted."""

    datasets: tuple[DatasetLine, ...] = ()
    tables: tuple[ByteTable, ...] = ()
    adapters: tuple[AdapterLine, ...] = ()
    training: TrainingPlan | None = None
    """How the train stage is shared; None without one."""

    warnings: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    """Why this plan will not be carried out; empty when it will."""

    @property
    def seconds(self) -> float:
        """Estimate of everything that will run."""
        return sum(line.seconds or 0.0 for line in self.stages)

    @property
    def lora_rank(self) -> int:
        """Largest rank that the engine is started for; 0 without adapters."""
        return rank_limit(line.facts.rank for line in self.adapters)

    def to_json(self) -> dict[str, Any]:
        """Plain values with the manifest's kind of keys."""
        return {
            "model": self.model,
            "stages": [line.to_json() for line in self.stages],
            "seconds": self.seconds,
            "datasets": [line.to_json() for line in self.datasets],
            "memory": [table.to_json() for table in self.tables],
            "training": None if self.training is None else self.training.to_json(),
            "adapters": [line.to_json() for line in self.adapters],
            "loraRankLimit": self.lora_rank,
            "warnings": list(self.warnings),
            "refusals": list(self.refusals),
        }


def stage_lines(model: Model, observed: Observed, estimates: Sequence[StageEstimate] = ()) -> tuple[StageLine, ...]:
    """The stages of a plan, from what is observed now."""
    keys = stage_keys(model, observed.digests)
    wanted = wanted_stages(model)
    missing = set(missing_stages(model, observed, keys)) if set(wanted) == keys.keys() else set(wanted)
    seconds = {item.stage: item.seconds for item in estimates}
    lines = [_line(stage, keys.get(stage), observed, stage in missing, seconds.get(stage)) for stage in wanted]
    if model.spec.serve is not None:
        because = "The engine starts once the stages are done." if missing else "The engine starts."
        if observed.weights:
            because = "What serves now keeps its traffic until the new revision is ready."
        lines.append(StageLine("serve", "will run", None, seconds.get("serve"), because))
    return tuple(lines)


def _line(stage: Stage, key: str | None, observed: Observed, missing: bool, seconds: float | None) -> StageLine:
    if key is None:
        return StageLine(stage.value, "unresolved", None, seconds, "A source of it has no digest yet.")
    if key in observed.committed:
        return StageLine(stage.value, "committed", key, 0.0, "Its artifact is there and fits the manifest.")
    if not missing:
        return StageLine(
            stage.value, "not needed", key, 0.0, "Its artifact is gone, and nothing that is left to do reads it."
        )
    attempt = observed.attempts.get(key)
    if attempt is not None and attempt.state is AttemptState.RUNNING:
        return StageLine(stage.value, "running", key, seconds, f"Attempt {attempt.number} is under way.")
    return StageLine(stage.value, "will run", key, seconds, "There is no artifact yet for what the manifest says now.")

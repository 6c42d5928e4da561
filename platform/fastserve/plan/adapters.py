"""How LoRA adapters come into the store, and when.

An adapter is brought in like a model, under a key of its own. The revision holds only that adapters are on and the
largest rank there may be, because the engine sets memory aside for that when it starts; which adapters there are is a
light setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastserve.plan.digest import digest_of
from fastserve.plan.keys import ident_of
from fastserve.plan.moves import Move, RunStage, Wait
from fastserve.plan.observed import AttemptState, Observed
from fastserve.plan.stages import Stage, StageRequest
from fastserve.plan.tries import next_try
from fastserve.spec.model import Model
from fastserve.spec.serve import Adapter

ADAPTER_FORMAT = 1
"""Version of what the import of an adapter writes."""


def adapter_key(digest: str) -> str:
    """Key of an adapter's artifact in stage `source`; digest: of its source."""
    return digest_of({"adapter": digest, "format": ADAPTER_FORMAT})


def adapter_keys(model: Model, digests: Mapping[str, str]) -> dict[str, str]:
    """Artifact key of every adapter by its name, as far as its source is resolved."""
    return {
        adapter.name: adapter_key(digests[ident_of(adapter.source)])
        for adapter in _adapters(model)
        if ident_of(adapter.source) in digests
    }


def committed_ranks(model: Model, observed: Observed) -> list[int]:
    """Ranks of the adapters that are in the store."""
    keys = adapter_keys(model, observed.digests).values()
    return [int(observed.committed[key].metrics["rank"]) for key in keys if key in observed.committed]


def adapter_moves(model: Model, observed: Observed, now: float) -> list[Move]:
    """What is to be done for the first adapter that is not in the store, and the refusals of all that never will be.

    now: Unix seconds.
    """
    keys = adapter_keys(model, observed.digests)
    due: list[Move] = []
    refused: list[Move] = []
    for adapter in _adapters(model):
        key = keys[adapter.name]
        if key in observed.committed:
            continue
        what = f"Adapter {adapter.name}"
        attempt = observed.attempts.get(key)
        if attempt is not None and attempt.state is AttemptState.RUNNING:
            due.append(Wait(because=f"{what} is being brought in (attempt {attempt.number}).", stage="serve"))
            continue
        run = _Import(model, adapter, key, observed.digests)
        (move,) = next_try(what, observed, key, run, now, (model.name, Stage.SOURCE.value))
        (due if isinstance(move, RunStage | Wait) else refused).append(move)
    return [*due[:1], *refused]


@dataclass(frozen=True, slots=True)
class _Import:
    """Makes the move that brings one adapter in."""

    model: Model
    adapter: Adapter
    key: str
    digests: Mapping[str, str]

    def __call__(self, number: int, because: str) -> RunStage:
        source = self.adapter.source
        request = StageRequest(
            model=self.model.name,
            stage=Stage.SOURCE,
            key=self.key,
            attempt=number,
            section={"adapter": source.model_dump(mode="json", by_alias=True)},
            data={ident_of(source): self.digests[ident_of(source)]},
        )
        return RunStage(because=because, request=request)


def _adapters(model: Model) -> list[Adapter]:
    return model.spec.serve.adapters if model.spec.serve is not None else []

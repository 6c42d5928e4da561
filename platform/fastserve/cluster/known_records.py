"""Records of artifacts that were seen a moment ago, of models that have nothing left to do.

A record is written once. It can only be deleted, and a model that is done need not hear of that at every look: of many
served models each look would ask the store for all their records, one after another. Whatever is not done asks anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from fastserve.artifacts import attempts
from fastserve.artifacts.record import Record
from fastserve.artifacts.store import Store
from fastserve.plan.moves import Done, Move
from fastserve.plan.stages import Stage

KNOWN_SECONDS = 60.0
"""A record that was seen is asked for again after so long."""


@dataclass(slots=True)
class _Known:
    since: float
    records: dict[tuple[Stage, str], Record] = field(default_factory=dict)


class KnownRecords:
    """The records of one store's models that are done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds that never go back."""
        self._clock = clock
        self._of: dict[str, _Known] = {}
        self._now = _Known(0.0)

    def forget(self, model: str) -> None:
        """Somebody asked anew: believe nothing of this model."""
        self._of.pop(model, None)

    def keep_only(self, models: Collection[str]) -> None:
        """Forget every other model: it is gone."""
        for model in self._of.keys() - set(models):
            del self._of[model]

    def begin(self, model: str) -> None:
        """A look at a model begins."""
        known = self._of.pop(model, None)
        fresh = known is None or self._clock() > known.since + KNOWN_SECONDS
        self._now = _Known(self._clock()) if known is None or fresh else known

    def find(self, store: Store, stage: Stage, key: str) -> Record | None:
        """The record of an artifact; None when there is none. Raises as `attempts.find`."""
        record = self._now.records.get((stage, key)) or attempts.find(store, stage, key)
        if record is not None:
            self._now.records[stage, key] = record
        return record

    def end(self, model: str, moves: Sequence[Move]) -> None:
        """The look is over, and this is due: only where that is nothing, the next look may go by what this one saw."""
        if moves and all(isinstance(move, Done) for move in moves):
            self._of[model] = self._now

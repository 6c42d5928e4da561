"""What a worker is told before it begins, and what it says in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.plan.shares import TrainingFacts
from fastserve.plan.stages import StageRequest
from fastserve.spec.train import Train


@dataclass(frozen=True, slots=True)
class Task:
    """All that a worker is told. Samples are no part of it: they lie in the store."""

    store_uri: str
    request: StageRequest
    train: Train
    total_steps: int
    threads: int
    """Threads that a worker computes with."""

    tokenizer: str
    """Digest of the tokenizer that the samples were made with."""

    longest: int
    """Tokens of the longest sample, of those for validation too."""

    facts: TrainingFacts
    """What the model needs, by its shape."""

    config: Mapping[str, Any] | None = None
    """config.json of a model from scratch; None: the model has a folder with weights."""

    part: int = 1
    """Which part of the run this is: each change of its size begins another one."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a worker's run ended."""

    step: int
    """Optimizer steps done; -1 when an error ended it."""

    reason: str = ""
    """Class of the error that ended it; empty when all steps were done, or all that were of use."""

    message: str = ""
    early: bool = False
    """Whether it ended before its last step because validation no longer improved."""


class NotFinite(Exception):
    """A loss or gradient that is no finite number; the optimizer has not seen it."""

    def __init__(self, step: int, message: str) -> None:
        """step: of the optimizer, counted from 1."""
        super().__init__(message)
        self.step = step

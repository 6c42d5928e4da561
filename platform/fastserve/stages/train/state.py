"""Training state at rest: what a run needs to go on at the next step, saved through torch's distributed checkpoint.

Every worker holds the same state, so the first one saves it alone; any number of workers can load it. The sample order
is a function of the step, and random numbers are drawn from seeds made of the step, so the step is all there is to keep
of either.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastserve.artifacts.checkpoints import fetch_checkpoint, newest_checkpoint, prune_checkpoints, put_checkpoint
from fastserve.artifacts.store import Store
from fastserve.errors import StageFailed
from fastserve.plan.stages import StageRequest

FORMAT = 1
FACTS = "run.json"
TENSORS = "state"


@dataclass(slots=True)
class RunState:
    """What is kept beside the tensors."""

    step: int = 0
    """Optimizer steps done."""

    curve: list[dict[str, Any]] = field(default_factory=list)
    """One row a step: step, loss, tokens, trainedTokens, learningRate."""

    export: Mapping[str, Any] = field(default_factory=dict)
    """What the export must know: see `network.Network.export`."""


def save(store: Store, request: StageRequest, tensors: Mapping[str, torch.Tensor], run: RunState, keep: int) -> None:
    """Keep the state after `run.step` steps in the store, and only the newest `keep` of its kind.

    Raises AttemptFenced when a newer attempt is claimed, StoreFull or StoreFailed when the store cannot take it.
    """
    with tempfile.TemporaryDirectory(prefix="fastserve-checkpoint-") as temporary:
        folder = Path(temporary)
        with _alone():
            dcp.save(dict(tensors), checkpoint_id=folder / TENSORS, no_dist=True)
        facts = {"format": FORMAT, "step": run.step, "curve": run.curve, "export": dict(run.export)}
        (folder / FACTS).write_text(json.dumps(facts))
        put_checkpoint(store, request.stage, request.key, run.step, folder, attempt=request.attempt)
    prune_checkpoints(store, request.stage, request.key, keep)


def newest(store: Store, request: StageRequest) -> int:
    """Steps done in the newest whole checkpoint of this key, from any attempt; 0 when there is none."""
    return newest_checkpoint(store, request.stage, request.key) or 0


def load(store: Store, request: StageRequest, step: int, tensors: Mapping[str, torch.Tensor]) -> RunState:
    """Load the checkpoint of `step` into `tensors`, in place.

    Raises ArtifactNotFound when it is gone, DigestMismatch when it is damaged, StageFailed when it is of another
    format.
    """
    with tempfile.TemporaryDirectory(prefix="fastserve-checkpoint-") as temporary:
        folder = fetch_checkpoint(store, request.stage, request.key, step, Path(temporary) / "checkpoint")
        run = read_facts(folder)
        _load(folder, dict(tensors))
    return run


def read_facts(folder: Path) -> RunState:
    """What a fetched checkpoint says beside its tensors."""
    facts = json.loads((folder / FACTS).read_text())
    if facts.get("format") != FORMAT:
        raise StageFailed(
            f"the checkpoint has format {facts.get('format')}, this version reads {FORMAT}; "
            "change anything under spec.train to begin afresh"
        )
    return RunState(step=facts["step"], curve=facts["curve"], export=facts["export"])


def read_parameters(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a fetched checkpoint by their names in the model, fp32; moments stay on disk."""
    prefix = "parameters."
    stored = dcp.FileSystemReader(folder / TENSORS).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=torch.float32)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    _load(folder, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    with _alone():
        dcp.load(tensors, checkpoint_id=folder / TENSORS, no_dist=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that one process alone saves or loads: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield

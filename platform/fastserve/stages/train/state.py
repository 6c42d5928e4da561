"""Training state at rest: what a run needs to go on at the next step, kept through torch's distributed checkpoint.

Every tensor lies in a checkpoint flattened to one dimension, in as many parts as there were workers that had one, so
any number of workers with any shares can load it. The sample order is a function of the step, and random numbers are
drawn from seeds made of the step, so the step is all there is to keep of either.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fastserve.artifacts.checkpoints import fetch_checkpoint, newest_checkpoint, pass_over_checkpoint
from fastserve.artifacts.store import Store
from fastserve.artifacts.temporary import temporary_folder
from fastserve.errors import DigestMismatch, StageFailed
from fastserve.plan.stages import StageRequest
from fastserve.stages.train.chunk import Chunk

FORMAT = 2
FACTS = "run.json"
TENSORS = "state"
PURPOSE = "checkpoint"
"""Of the temporary folders through which checkpoints travel."""

ALONE = "torch.distributed is disabled, unavailable or uninitialized"
"""Begin of torch's warning that one process alone saves or loads, where that is meant."""

_METADATA = f"{TENSORS}/.metadata"


@dataclass(slots=True)
class RunState:
    """What is kept beside the tensors."""

    step: int = 0
    """Optimizer steps done."""

    curve: list[dict[str, Any]] = field(default_factory=list)
    """One row a step: step, loss, tokens, trainedTokens, learningRate."""

    export: Mapping[str, Any] = field(default_factory=dict)
    """What the export must know: see `network.Network.export`."""

    best_step: int | None = None
    """Step with the least validation loss so far; its checkpoint is not pruned."""

    best_loss: float | None = None
    """Validation loss at `best_step`, in nats a token."""

    loss_scale: float = 1.0
    """What the loss is multiplied with in fp16, so that small gradients do not vanish."""

    extra: dict[str, Any] = field(default_factory=dict)
    """What else the run wants to find again; plain JSON values."""

    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """What the state is a state of: see `fingerprint`."""


def tokenizer_digest(folder: Path) -> str:
    """sha256 of the tokenizer in the model folder `folder`."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def fingerprint(tokenizer: str, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a state is a state of: {tokenizer, trained: {name: shape}}; plain JSON values.

    tokenizer: its digest. trained: whole parameters by name, or anything else that has a `shape`.
    """
    return {"tokenizer": tokenizer, "trained": {name: list(tensor.shape) for name, tensor in trained.items()}}


def newest(store: Store, request: StageRequest, below: int | None = None) -> int:
    """Steps done in the newest whole checkpoint of this key, from any attempt; 0 when there is none.

    below: only those before this step, for a run that must go back further.
    """
    return newest_checkpoint(store, request.stage, request.key, below) or 0


def load(
    store: Store,
    request: StageRequest,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    fingerprint: Mapping[str, Any] | None = None,
) -> RunState:
    """Load the checkpoint of `step` into `tensors`, in place.

    tensors: slices (Chunk) or whole tensors by name; only the files that hold a part of them are fetched.
    fingerprint: what this run is about to train; None compares nothing.

    Raises ArtifactNotFound when it is gone, DigestMismatch when it is damaged, which is then no longer the newest;
    StageFailed when it is of another format, or of another tokenizer or model than `fingerprint`.
    """
    try:
        return _fetch_and_load(store, request, step, tensors, fingerprint)
    except DigestMismatch:
        # Else every restart would meet it again.
        pass_over_checkpoint(store, request.stage, request.key, step)
        raise


def _fetch_and_load(
    store: Store,
    request: StageRequest,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    fingerprint: Mapping[str, Any] | None,
) -> RunState:
    stage, key = request.stage, request.key
    with temporary_folder(PURPOSE) as temporary:
        facts = fetch_checkpoint(store, stage, key, step, temporary / "facts", only=[FACTS, _METADATA])
        run = read_facts(facts)
        if fingerprint is not None:
            _require_same(step, run.fingerprint, fingerprint)
        wanted = flattened(tensors)
        files = {f"{TENSORS}/{name}" for name in _files_of(_metadata(facts), wanted)}
        folder = fetch_checkpoint(store, stage, key, step, temporary / "checkpoint", only=[_METADATA, *files])
        _load(folder, wanted)
    return run


def flattened(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same memory as a checkpoint holds it: slices as they are, whole tensors in one dimension."""
    return {name: tensor if isinstance(tensor, Chunk) else tensor.detach().view(-1) for name, tensor in tensors.items()}


def write_facts(folder: Path, run: RunState) -> None:
    """Write what `run` says beside its tensors into the folder of a checkpoint."""
    facts = {
        "format": FORMAT,
        "step": run.step,
        "export": dict(run.export),
        "bestStep": run.best_step,
        "bestLoss": run.best_loss,
        "lossScale": run.loss_scale,
        "extra": run.extra,
        "fingerprint": dict(run.fingerprint),
    }
    with (folder / FACTS).open("w") as file:
        # Row by row: one call for a long curve would hold up the interpreter, and with it the step under way.
        file.write(json.dumps(facts)[:-1] + ', "curve": [')
        for number, row in enumerate(run.curve):
            file.write((",\n" if number else "\n") + json.dumps(row))
        file.write("]}\n")


def read_facts(folder: Path) -> RunState:
    """What a fetched checkpoint says beside its tensors.

    Raises StageFailed when it is of another format.
    """
    facts = json.loads((folder / FACTS).read_text())
    if facts.get("format") != FORMAT:
        raise StageFailed(
            f"the checkpoint has format {facts.get('format')}, this version reads {FORMAT}; "
            "change anything under spec.train to begin afresh"
        )
    return RunState(
        step=facts["step"],
        curve=facts["curve"],
        export=facts["export"],
        best_step=facts["bestStep"],
        best_loss=facts["bestLoss"],
        loss_scale=facts["lossScale"],
        extra=facts["extra"],
        fingerprint=facts["fingerprint"],
    )


def read_parameters(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a fetched checkpoint by their names in the model, whole and fp32.

    Moments stay on disk.
    """
    prefix = "parameters."
    shapes: Mapping[str, list[int]] = read_facts(folder).fingerprint.get("trained", {})
    tensors = {
        name: torch.empty(entry.size, dtype=torch.float32)
        for name, entry in _metadata(folder).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    _load(folder, tensors)
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {name: tensor.view(shapes.get(name, tensor.shape)) for name, tensor in named.items()}


def _require_same(step: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise StageFailed, naming what differs, when a checkpoint is not of what is trained now."""
    afresh = "; change anything under spec.train, such as seed, to begin afresh"
    if theirs.get("tokenizer") != ours.get("tokenizer"):
        then, now = str(theirs.get("tokenizer"))[:12], str(ours.get("tokenizer"))[:12]
        raise StageFailed(
            f"resuming with another tokenizer: the checkpoint of step {step} was trained with tokenizer.json {then}…, "
            f"the model now has {now}…{afresh}, or bring the old tokenizer back"
        )
    then_shapes, now_shapes = theirs.get("trained", {}), ours.get("trained", {})
    differing = sorted(name for name in {*then_shapes, *now_shapes} if then_shapes.get(name) != now_shapes.get(name))
    if differing:
        name = differing[0]
        raise StageFailed(
            f"resuming another model: {len(differing)} trained tensors differ from the checkpoint of step {step}; "
            f"{name} has shape {then_shapes.get(name, 'none')} there and {now_shapes.get(name, 'none')} now{afresh}"
        )


def _metadata(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder / TENSORS).read_metadata()


def _files_of(metadata: Metadata, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the files that hold a part of `tensors`, all in one dimension."""
    lengths = {
        (name, part.offsets[0]): part.sizes[0]
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        for part in entry.chunks
    }
    found: set[str] = set()
    for index, place in metadata.storage_data.items():
        tensor = tensors.get(index.fqn)
        if tensor is None or index.offset is None:
            continue
        begin = tensor.offset if isinstance(tensor, Chunk) else 0
        first = index.offset[0]
        if first < begin + tensor.numel() and begin < first + lengths[index.fqn, first]:
            found.add(place.relative_path)
    return found


def _load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    if not tensors:
        return  # a worker without a share of the state
    with _alone():
        dcp.load(tensors, checkpoint_id=folder / TENSORS, no_dist=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that one process alone saves or loads: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ALONE)
        yield

"""Checkpoints of a running stage: what a killed attempt leaves to the next one.

A checkpoint is whole when its marker is there: checkpoint.json, written last and once, with the sha256 of every file.

    artifacts/<stage>/<key>/checkpoints/<step>/checkpoint.json
    artifacts/<stage>/<key>/checkpoints/<step>/<attempt>-<random>/...

Every upload has a folder of its own, so two attempts that reach the same step never mix files. Whose marker is first,
that one counts: attempts at one key see the same data in the same order, so either is right.
"""

from __future__ import annotations

import logging
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from fastserve.artifacts.attempts import check_fence, dump, key_folder, load
from fastserve.artifacts.record import FileEntry
from fastserve.artifacts.store import Store, check_name
from fastserve.artifacts.transfer import download_into, upload
from fastserve.errors import ArtifactNotFound, DigestMismatch, StoreFailed
from fastserve.plan.stages import Stage

_STEP = re.compile(r"([0-9]{1,12})/(.+)")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint."""

    step: int
    attempt: int
    folder: str
    """Part of the name below the step: `<attempt>-<random>`."""

    files: tuple[FileEntry, ...]


def put_checkpoint(store: Store, stage: Stage, key: str, step: int, folder: Path, attempt: int) -> None:
    """Keep `folder` as the checkpoint of `step` (optimizer steps done, from 0). A whole one that is there stays.

    Raises AttemptFenced when a newer attempt is claimed, StoreFull or StoreFailed when the store cannot take it; what
    was uploaded in vain is removed.
    """
    marker = _marker(stage, key, step)
    check_fence(store, stage, key, attempt)
    listed = _steps(store, stage, key).get(step, set())
    if _is_whole(store, stage, key, step, listed):
        return
    if "checkpoint.json" in listed:
        store.delete(marker)
    own = f"{attempt}-{secrets.token_hex(4)}"
    base = f"{_base(stage, key)}{step}/{own}/"
    created = False
    try:
        files = upload(store, base, folder)
        check_fence(store, stage, key, attempt)
        value = {"step": step, "attempt": attempt, "folder": own, "files": [asdict(entry) for entry in files]}
        created = store.create(marker, dump(value, marker))
    finally:
        if not created:
            _remove(store, base)


def newest_checkpoint(store: Store, stage: Stage, key: str) -> int | None:
    """Step of the newest whole checkpoint; None when there is none.

    One whose marker is missing or damaged, or whose files are not all there, is passed over with a warning in the log.
    """
    steps = _whole(store, stage, key)
    return max(steps, default=None)


def fetch_checkpoint(store: Store, stage: Stage, key: str, step: int, into: Path) -> Path:
    """Copy the checkpoint of `step` into the folder `into`, which must not exist and appears only when whole.

    Raises ArtifactNotFound when it is not there and DigestMismatch, naming the file, when it is damaged.
    """
    found = _read(store, stage, key, step)
    if found is None:
        raise ArtifactNotFound(
            f"{store.uri} has no checkpoint of step {step} under {_base(stage, key)}; ask newest_checkpoint first"
        )
    return download_into(store, f"{_base(stage, key)}{step}/{found.folder}/", found.files, into)


def prune_checkpoints(store: Store, stage: Stage, key: str, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what is torn or older. keep=0 removes everything.

    The marker goes first, so that a half removed checkpoint is not chosen.
    """
    whole = sorted(_whole(store, stage, key), reverse=True)
    kept = set(whole[:keep])
    oldest = min(kept, default=None)
    for step in _steps(store, stage, key):
        if step in kept or (oldest is not None and step > oldest):
            continue
        store.delete(_marker(stage, key, step))
        store.delete_under(f"{_base(stage, key)}{step}/")


def _whole(store: Store, stage: Stage, key: str) -> list[int]:
    """Steps that can be resumed from."""
    return [step for step, names in _steps(store, stage, key).items() if _is_whole(store, stage, key, step, names)]


def _is_whole(store: Store, stage: Stage, key: str, step: int, names: set[str]) -> bool:
    """Whether the marker can be read and all its files are listed. names: what is listed below the step."""
    if "checkpoint.json" not in names:
        return False
    try:
        found = _read(store, stage, key, step)
    except DigestMismatch as error:
        _LOG.warning("checkpoint of step %d passed over: %s", step, error)
        return False
    if found is None:
        return False
    missing = [entry.path for entry in found.files if f"{found.folder}/{entry.path}" not in names]
    if missing:
        _LOG.warning("checkpoint of step %d passed over: %s is missing in the store", step, missing[0])
    return not missing


def _steps(store: Store, stage: Stage, key: str) -> dict[int, set[str]]:
    """Names below each step."""
    base = _base(stage, key)
    found: dict[int, set[str]] = {}
    for name in store.names(base):
        match = _STEP.fullmatch(name.removeprefix(base))
        if match:
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def _read(store: Store, stage: Stage, key: str, step: int) -> Checkpoint | None:
    marker = _marker(stage, key, step)
    try:
        value = load(store.read(marker), store, marker)
    except ArtifactNotFound:
        return None
    try:
        files = tuple(FileEntry(**entry) for entry in value["files"])
        for entry in files:
            check_name(entry.path)
        return Checkpoint(value["step"], value["attempt"], check_name(value["folder"]), files)
    except (KeyError, TypeError, AttributeError, StoreFailed) as error:
        raise DigestMismatch(
            f"{store.uri}: {marker} is damaged; delete it so that an older checkpoint is used"
        ) from error


def _remove(store: Store, base: str) -> None:
    try:
        store.delete_under(base)
    except StoreFailed as error:
        _LOG.warning("files of a checkpoint that does not count stay behind: %s", error)


def _base(stage: Stage, key: str) -> str:
    return f"{key_folder(stage, key)}checkpoints/"


def _marker(stage: Stage, key: str, step: int) -> str:
    return f"{_base(stage, key)}{step}/checkpoint.json"

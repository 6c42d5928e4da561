"""Checkpoints of a running stage: what a killed attempt leaves to the next one.

A checkpoint is whole when its marker is there: checkpoint.json, written last and once, with the sha256 of every file.

    artifacts/<stage>/<key>/checkpoints/<step>/checkpoint.json
    artifacts/<stage>/<key>/checkpoints/<step>/<attempt>-<random>/...

Every upload has a folder of its own, so two attempts that reach the same step never mix files. Whose marker is first,
that one counts: attempts at one key see the same data in the same order, so either is right.

Several workers may write one checkpoint: the first one begins it, each puts its own files, and the first one commits
it with the entries of all. Nobody reads an upload that has no marker, and the next pruning removes it.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from fastserve.artifacts.attempts import check_fence, dump, key_folder, load
from fastserve.artifacts.record import FileEntry
from fastserve.artifacts.store import Store, check_name
from fastserve.artifacts.transfer import download_into, upload
from fastserve.errors import ArtifactNotFound, DigestMismatch, StoreFailed, StoreFull
from fastserve.plan.stages import Stage

_MARKER = "checkpoint.json"
_STEP = re.compile(r"([0-9]{1,12})/(.+)")
_UNFINISHED_SECONDS = 3600.0
"""Age at which an unfinished upload has no writer any more: whoever prunes has none under way."""

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
    own = begin_checkpoint(store, stage, key, step, attempt)
    if own is None:
        return
    try:
        files = put_files(store, stage, key, step, own, folder)
    except BaseException:
        withdraw_checkpoint(store, stage, key, step, own)
        raise
    commit_checkpoint(store, stage, key, step, attempt, own, files)


def begin_checkpoint(store: Store, stage: Stage, key: str, step: int, attempt: int) -> str | None:
    """A new name for the files of this upload, `<attempt>-<random>`; None when a whole checkpoint of `step` is there.

    Raises AttemptFenced when a newer attempt is claimed.
    """
    check_fence(store, stage, key, attempt)
    listed = _steps(store, stage, key, only=step).get(step, set())
    if _is_whole(store, stage, key, step, listed):
        return None
    if _MARKER in listed:
        store.delete(_marker(stage, key, step))
    return f"{attempt}-{secrets.token_hex(4)}"


def put_files(store: Store, stage: Stage, key: str, step: int, own: str, folder: Path) -> tuple[FileEntry, ...]:
    """Upload one worker's few files; `own` is what begin_checkpoint gave. The entries belong into commit_checkpoint.

    Raises StoreFull or StoreFailed when the store cannot take them.
    """
    return upload(store, f"{_base(stage, key)}{step}/{check_name(own)}/", folder, parallel=1)


def commit_checkpoint(
    store: Store, stage: Stage, key: str, step: int, attempt: int, own: str, files: Iterable[FileEntry]
) -> bool:
    """Make the files of all workers the checkpoint of `step`; False when another upload's marker was first.

    Raises AttemptFenced when a newer attempt is claimed, StoreFull or StoreFailed when the store cannot take the
    marker, or when two workers put the same name. What was uploaded in vain is removed, unless the store does not tell
    whether the marker is there.
    """
    marker = _marker(stage, key, step)
    entries = sorted(files, key=lambda entry: entry.path)
    try:
        twice = [entry.path for entry, other in pairwise(entries) if entry.path == other.path]
        if twice:
            raise StoreFailed(
                f"two workers put {twice[0]} into the checkpoint of step {step}; run `fastserve up` again"
            )
        check_fence(store, stage, key, attempt)
        value = {"step": step, "attempt": attempt, "folder": own, "files": [asdict(entry) for entry in entries]}
        data = dump(value, marker)
    except BaseException:
        withdraw_checkpoint(store, stage, key, step, own)
        raise
    try:
        created = store.create(marker, data)
    except StoreFull:
        # Only this failure says for sure that there is no marker; after any other the files must stay.
        withdraw_checkpoint(store, stage, key, step, own)
        raise
    if not created:
        withdraw_checkpoint(store, stage, key, step, own)
    return created


def withdraw_checkpoint(store: Store, stage: Stage, key: str, step: int, own: str) -> None:
    """Remove an upload that will not be committed; what cannot be removed is left to the next pruning."""
    try:
        store.delete_under(f"{_base(stage, key)}{step}/{check_name(own)}/")
    except StoreFailed as error:
        _LOG.warning("files of a checkpoint that does not count stay behind: %s", error)


def newest_checkpoint(store: Store, stage: Stage, key: str, below: int | None = None) -> int | None:
    """Step of the newest whole checkpoint, of those under the step `below` if given; None when there is none.

    One whose marker is missing or damaged, or whose files are not all there, is passed over with a warning in the log.
    """
    steps = _whole(store, stage, key)
    return max((step for step in steps if below is None or step < below), default=None)


def fetch_checkpoint(
    store: Store, stage: Stage, key: str, step: int, into: Path, only: Collection[str] | None = None
) -> Path:
    """Copy the checkpoint of `step` into the folder `into`, which must not exist and appears only when whole.

    only: paths of the files that are wanted; a worker needs those alone that hold its share of the state.

    Raises ArtifactNotFound when the checkpoint, or a wanted file, is not there, and DigestMismatch, naming the file,
    when it is damaged.
    """
    found = _read(store, stage, key, step)
    if found is None:
        raise ArtifactNotFound(
            f"{store.uri} has no checkpoint of step {step} under {_base(stage, key)}; ask newest_checkpoint first"
        )
    missing = sorted(set(only or ()) - {entry.path for entry in found.files})
    if missing:
        raise ArtifactNotFound(
            f"{store.uri}: the checkpoint of step {step} has no {missing[0]}; "
            "delete it so that an older checkpoint is used"
        )
    files = [entry for entry in found.files if only is None or entry.path in only]
    return download_into(store, f"{_base(stage, key)}{step}/{found.folder}/", files, into)


def pass_over_checkpoint(store: Store, stage: Stage, key: str, step: int) -> None:
    """Take the marker from a checkpoint whose files turned out to be damaged, so that an older one is the newest."""
    _LOG.warning("checkpoint of step %d is damaged and no longer used", step)
    store.delete(_marker(stage, key, step))


def prune_checkpoints(
    store: Store, stage: Stage, key: str, keep: int, kept_besides: Collection[int | None] = ()
) -> None:
    """Remove all but the newest `keep` whole checkpoints, and uploads of no marker. keep=0 removes everything.

    kept_besides: steps that stay whatever their age, such as the best one; None among them means nothing. With keep=0
    they go too.

    The marker goes first, so that a half removed checkpoint is not chosen. What lies above the newest whole checkpoint
    stays: it may be on its way.
    """
    steps = _steps(store, stage, key)
    whole = sorted((step for step, names in steps.items() if _is_whole(store, stage, key, step, names)), reverse=True)
    kept = set(whole[:keep]) | ({step for step in whole if step in kept_besides} if keep else set())
    for step, names in steps.items():
        if step in kept:
            _remove_vain(store, stage, key, step, names)
        elif not keep or step < max(kept, default=0):
            store.delete(_marker(stage, key, step))
            store.delete_under(f"{_base(stage, key)}{step}/")
    # What killed writers left unfinished is not listed.
    if keep:
        store.sweep(_base(stage, key), _UNFINISHED_SECONDS)
    else:
        store.delete_under(_base(stage, key))


def _remove_vain(store: Store, stage: Stage, key: str, step: int, names: set[str]) -> None:
    """Remove the uploads beside the one that a kept checkpoint's marker names."""
    folders = {name.partition("/")[0] for name in names if "/" in name}
    if len(folders) < 2:
        return
    found = _read(store, stage, key, step)
    if found is not None:
        for own in sorted(folders - {found.folder}):
            withdraw_checkpoint(store, stage, key, step, own)


def _whole(store: Store, stage: Stage, key: str) -> list[int]:
    """Steps that can be resumed from."""
    return [step for step, names in _steps(store, stage, key).items() if _is_whole(store, stage, key, step, names)]


def _is_whole(store: Store, stage: Stage, key: str, step: int, names: set[str]) -> bool:
    """Whether the marker can be read and all its files are listed. names: what is listed below the step."""
    if _MARKER not in names:
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


def _steps(store: Store, stage: Stage, key: str, only: int | None = None) -> dict[int, set[str]]:
    """Names below each step, or below the step `only`."""
    base = _base(stage, key)
    found: dict[int, set[str]] = {}
    for name in store.names(base if only is None else f"{base}{only}/"):
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


def _base(stage: Stage, key: str) -> str:
    return f"{key_folder(stage, key)}checkpoints/"


def _marker(stage: Stage, key: str, step: int) -> str:
    return f"{_base(stage, key)}{step}/{_MARKER}"

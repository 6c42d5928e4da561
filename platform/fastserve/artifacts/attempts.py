"""Attempts at a key, and the one commit that counts.

An attempt is claimed by creating its request.json, writes only under its own number, and becomes the artifact by
creating record.json, last and once. Whatever dies half-way leaves files that no record names; nobody reads them.

    artifacts/<stage>/<key>/record.json
    artifacts/<stage>/<key>/attempts/<n>/{request,progress,failure,seal}.json
    artifacts/<stage>/<key>/attempts/<n>/{wish.json,curve.jsonl} of a train stage
    artifacts/<stage>/<key>/attempts/<n>/files/...

`seal.json` settles the one race that record.json cannot: a commit that pauses before its last step, and a discard that
takes the files meanwhile. Both must create the seal first, so only one of them goes on.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.artifacts.record import RECORD_FORMAT, Record
from fastserve.artifacts.store import Store, check_name
from fastserve.artifacts.transfer import download, upload
from fastserve.errors import ArtifactNotFound, AttemptFenced, DigestMismatch, StoreFailed, StoreFull
from fastserve.plan.stages import Stage, StageRequest

_PROCESS = secrets.token_hex(8)
"""Lets a process try its own commit again, and no other process commit under the same attempt."""

CURVE = "curve.jsonl"
"""The loss of a training run, beside an attempt's progress and among an artifact's files."""

_CLAIM = re.compile(r"([1-9][0-9]{0,8})/request\.json")


def claim(store: Store, request: StageRequest) -> bool:
    """Take the attempt's number by creating its request.json; False when taken: submitting twice is as once."""
    name = attempt_folder(request.stage, request.key, request.attempt) + "request.json"
    return store.create(name, dump(request.to_json(), name))


def take(store: Store, request: StageRequest) -> bool:
    """Claim the attempt's number for the request's model. True also when that model has it already; False when another
    one has, which asks for the same thing. Raises StoreFailed."""
    if claim(store, request):
        return True
    return request_of(store, request.stage, request.key, request.attempt).model == request.model


def request_of(store: Store, stage: Stage, key: str, attempt: int) -> StageRequest:
    """What a claimed attempt was asked to do. Raises ArtifactNotFound when nobody claimed it."""
    name = attempt_folder(stage, key, attempt) + "request.json"
    value = load(store.read(name), store, name)
    try:
        return StageRequest.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(store, name) from error


def newest_attempt(store: Store, stage: Stage, key: str) -> int:
    """Highest claimed attempt number; 0 when there is none."""
    base = key_folder(stage, key) + "attempts/"
    claims = (_CLAIM.fullmatch(name.removeprefix(base)) for name in store.names(base))
    return max((int(match[1]) for match in claims if match), default=0)


def find(store: Store, stage: Stage, key: str) -> Record | None:
    """The committed artifact; None when there is none.

    Raises DigestMismatch (a StoreFailed), naming the file, when a record is there and cannot be trusted: damage is
    never silence.
    """
    name = key_folder(stage, key) + "record.json"
    try:
        data = store.read(name)
    except ArtifactNotFound:
        return None
    value = load(data, store, name)
    if value.get("format") != RECORD_FORMAT:
        raise StoreFailed(
            f"{store.uri}: {name} has format {value.get('format')!r}, this version reads {RECORD_FORMAT}; "
            "use the FastServe version that wrote it, or another store"
        )
    try:
        record = Record.from_json(value)
        for entry in record.files:
            check_name(entry.path)
    except (KeyError, TypeError, ValueError, AttributeError, StoreFailed) as error:
        raise _damaged(store, name) from error
    if (record.stage, record.key, record.digest) != (stage, key, value.get("digest")):
        raise _damaged(store, name)
    return record


def commit(
    store: Store, request: StageRequest, folder: Path, metrics: Mapping[str, Any], parents: Mapping[str, str]
) -> Record:
    """Make `folder` the artifact of the request's key: upload its files, then create record.json.

    Committing again after it worked returns the same record. Raises AttemptFenced when a newer attempt is claimed,
    another attempt committed, or this one was discarded; StoreFull or StoreFailed when the store cannot take it. What
    was uploaded in vain is removed.
    """
    record_name = key_folder(request.stage, request.key) + "record.json"
    dump({"metrics": metrics, "parents": parents}, record_name)
    existing = find(store, request.stage, request.key)
    if existing is not None and existing.attempt == request.attempt:
        return existing
    base = attempt_folder(request.stage, request.key, request.attempt)
    try:
        _check_fence(store, request)
        files = upload(store, base + "files/", folder)
        record = Record(request.stage, request.key, request.attempt, files, dict(parents), dict(metrics), time.time())
        _check_fence(store, request)
        if not _seal(store, base, "commit"):
            raise AttemptFenced(_fence_text(request, "it was discarded, or another process commits it"))
    except BaseException as error:
        _clean_up(store, request, error)
        raise
    try:
        created = store.create(record_name, dump(record.to_json(), record_name))
    except StoreFull as error:
        # Only this failure says for sure that no record was made; after any other the files must stay.
        _clean_up(store, request, error)
        raise
    if created:
        return record
    lost = AttemptFenced(_fence_text(request, "another attempt has committed"))
    _clean_up(store, request, lost)
    raise lost


def fetch(store: Store, record: Record, into: Path | None = None, verify: bool = True) -> Path:
    """A local, read-only folder with the artifact's files.

    A FolderStore gives its own folder in place. S3 downloads into the cache folder `into` (default
    `~/.cache/fastserve/artifacts`) under the artifact's digest, once for all processes of the machine.
    verify: compare every file's sha256 with the record. Raises DigestMismatch, which names the file.
    """
    prefix = attempt_folder(record.stage, record.key, record.attempt) + "files/"
    return download(store, prefix, record.files, record.digest, into, verify)


def fail(store: Store, request: StageRequest, reason: str, message: str, final: bool) -> None:
    """Write down why the attempt ended. final: trying again cannot help."""
    name = attempt_folder(request.stage, request.key, request.attempt) + "failure.json"
    value = {"reason": reason, "message": message, "final": final, "at": time.time()}
    store.write(name, dump(value, name))


def failure(store: Store, stage: Stage, key: str, attempt: int) -> dict[str, Any] | None:
    """`{reason, message, final, at}` of an attempt that ended and said why; None otherwise. `at` is in Unix seconds."""
    return _read_json(store, attempt_folder(stage, key, attempt) + "failure.json")


def write_progress(store: Store, request: StageRequest, progress: Mapping[str, Any]) -> None:
    """Replace the attempt's progress.json."""
    name = attempt_folder(request.stage, request.key, request.attempt) + "progress.json"
    store.write(name, dump(progress, name))


def read_progress(store: Store, stage: Stage, key: str, attempt: int) -> dict[str, Any] | None:
    """What the attempt last reported; None when it has not."""
    return _read_json(store, attempt_folder(stage, key, attempt) + "progress.json")


def write_wish(store: Store, stage: Stage, key: str, attempt: int, wish: Mapping[str, Any]) -> None:
    """Replace the attempt's wish.json: what those who tend the cluster ask of a running attempt."""
    name = attempt_folder(stage, key, attempt) + "wish.json"
    store.write(name, dump(wish, name))


def read_wish(store: Store, stage: Stage, key: str, attempt: int) -> dict[str, Any] | None:
    """What the attempt is asked for; None when nobody has asked."""
    return _read_json(store, attempt_folder(stage, key, attempt) + "wish.json")


def write_curve(store: Store, request: StageRequest, rows: bytes) -> None:
    """Replace the attempt's curve.jsonl: the loss so far, for those who watch. rows: JSON, one a line."""
    store.write(attempt_folder(request.stage, request.key, request.attempt) + CURVE, rows)


def read_curve(store: Store, stage: Stage, key: str, attempt: int | None = None) -> bytes:
    """The curve.jsonl of a committed artifact; of an attempt at it when there is none yet. Empty when there is none."""
    record = find(store, stage, key)
    if record is not None:
        name = attempt_folder(stage, key, record.attempt) + "files/" + CURVE
    else:
        number = newest_attempt(store, stage, key) if attempt is None else attempt
        name = attempt_folder(stage, key, number) + CURVE
    try:
        return store.read(name)
    except ArtifactNotFound:
        return b""


def discard(store: Store, stage: Stage, key: str, attempt: int) -> bool:
    """Remove the files of an attempt that will not commit; from then on it cannot. True when they are gone.

    False, with nothing removed, when the attempt is the committed one or stands right before its commit.
    Claim, failure and progress stay: they tell what happened. A PUT that a killed writer had under way may reach a
    bucket afterwards; nobody reads it, and discarding again removes it.
    """
    base = attempt_folder(stage, key, attempt)
    record = find(store, stage, key)
    if record is not None and record.attempt == attempt:
        return False
    if not _seal(store, base, "discard"):
        # It sealed itself to commit. If no record is there yet, it may be about to create one, so its files must stay.
        record = find(store, stage, key)
        if record is None or record.attempt == attempt:
            return False
    store.delete_under(base + "files/")
    return True


def key_folder(stage: Stage, key: str) -> str:
    """`artifacts/<stage>/<key>/`. Raises StoreFailed when the key is no single part of a name."""
    if "/" in check_name(key):
        raise StoreFailed(f"the key {key!r} must not hold a '/'; use the key that the plan gave")
    return f"artifacts/{stage.value}/{key}/"


def attempt_folder(stage: Stage, key: str, attempt: int) -> str:
    """`artifacts/<stage>/<key>/attempts/<n>/`."""
    return f"{key_folder(stage, key)}attempts/{attempt}/"


def dump(value: Any, name: str) -> bytes:
    """JSON text for the store. Raises StoreFailed when a value is no JSON, NaN and infinity included."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise StoreFailed(
            f"{name} cannot be written: {error}; report only finite numbers, text, lists and mappings"
        ) from error


def load(data: bytes, store: Store, name: str) -> dict[str, Any]:
    """The mapping in a JSON object of the store. Raises DigestMismatch, naming it, when it is damaged."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise _damaged(store, name) from error
    if not isinstance(value, dict):
        raise _damaged(store, name)
    return value


def _read_json(store: Store, name: str) -> dict[str, Any] | None:
    try:
        data = store.read(name)
    except ArtifactNotFound:
        return None
    return load(data, store, name)


def _seal(store: Store, base: str, by: str) -> bool:
    """Settle whether the attempt commits or is discarded: True when it is settled for `by`, now or before."""
    name = base + "seal.json"
    seal = {"by": by, "process": _PROCESS if by == "commit" else ""}
    return store.create(name, dump(seal, name)) or load(store.read(name), store, name) == seal


def check_fence(store: Store, stage: Stage, key: str, attempt: int) -> None:
    """Raise AttemptFenced when a newer attempt at the key is claimed."""
    newest = newest_attempt(store, stage, key)
    if newest > attempt:
        raise AttemptFenced(
            f"{stage} {key[:12]}: attempt {attempt} came too late, since attempt {newest} is claimed; "
            "its work is dropped and the newer attempt goes on"
        )


def _check_fence(store: Store, request: StageRequest) -> None:
    check_fence(store, request.stage, request.key, request.attempt)
    record = find(store, request.stage, request.key)
    if record is not None and record.attempt != request.attempt:
        raise AttemptFenced(_fence_text(request, "another attempt has committed"))


def _fence_text(request: StageRequest, cause: str) -> str:
    return (
        f"{request.stage} {request.key[:12]}: attempt {request.attempt} came too late, since {cause}; "
        "its work is dropped and the committed artifact stands"
    )


def _clean_up(store: Store, request: StageRequest, error: BaseException) -> None:
    """Remove what an attempt uploaded in vain; a second failure while doing so must not hide the first."""
    try:
        record = find(store, request.stage, request.key)
        if record is None or record.attempt != request.attempt:
            store.delete_under(attempt_folder(request.stage, request.key, request.attempt) + "files/")
    except StoreFailed as second:
        error.add_note(f"its files could not be removed either: {second}")


def _damaged(store: Store, name: str) -> DigestMismatch:
    return DigestMismatch(
        f"{store.uri}: {name} is damaged; restore it from a backup, "
        "or delete the folder that holds it so that the stage runs again"
    )

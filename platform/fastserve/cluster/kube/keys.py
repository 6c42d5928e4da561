"""Access keys on a cluster, by hand: an AccessKey object for each, the key itself in a Secret of the operator."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from typing import Any

from fastserve.cluster.kube.api import ACCESS_KEYS, SECRETS, Object
from fastserve.cluster.kube.config import nearest
from fastserve.cluster.kube.door import Door
from fastserve.errors import ClusterFailed, StateChanged, UsageInvalid
from fastserve.spec.section import is_name

MADE_SECONDS = 120.0
"""How long the operator may take to make a key."""


def list_keys(door: Door) -> list[dict[str, Any]]:
    """What each key may do, and its Secret; no key, no digest. Raises UsageInvalid when there is no such namespace."""
    found = door.api.list(ACCESS_KEYS, door.namespace)
    if not found:
        door.models.require_namespace()
    return [
        {
            "name": item["metadata"]["name"],
            "models": item["spec"].get("models") or [],
            "expires": item["spec"].get("expires"),
            "secret": (item.get("status") or {}).get("secret"),
        }
        for item in found
    ]


def create_key(door: Door, name: str, models: Sequence[str], expires: date | None) -> str:
    """Ask for a key and wait until it is made. Returns the key.

    Raises UsageInvalid for a name that is taken or is not a name, ClusterFailed when it is not made or may not be read.
    """
    if not is_name(name):
        raise UsageInvalid(f"'{name}' is not a key's name; write lower-case letters, digits and '-'")
    spec = {"models": list(models), **({"expires": expires.isoformat()} if expires else {})}
    try:
        door.api.create(ACCESS_KEYS, {"metadata": {"name": name, "namespace": door.namespace}, "spec": spec})
    except StateChanged:
        raise UsageInvalid(
            f"there is an AccessKey named {name} in namespace {door.namespace}; revoke it first with "
            f"`fastserve keys revoke {name}`, or take another name"
        ) from None
    except ClusterFailed:
        door.models.require_namespace()
        raise
    end = time.monotonic() + MADE_SECONDS
    while True:
        found = door.api.get(ACCESS_KEYS, door.namespace, name) or {}
        ready = _ready(found)
        if ready.get("status") == "True":
            return key_of(door, found)
        if ready.get("status") == "False":
            raise UsageInvalid(f"the AccessKey {name} opens nothing: {ready['message']}")
        if time.monotonic() > end:
            raise ClusterFailed(
                f"no operator has made the key {name} in {MADE_SECONDS:.0f}s; it is asked for, and will stand in the "
                f"Secret {name}-key"
            )
        time.sleep(0.3)


def key_of(door: Door, found: Object) -> str:
    """The key of an AccessKey object that is ready."""
    secret = str(found["status"]["secret"])
    held = door.api.get(SECRETS, door.namespace, secret)
    text = ((held or {}).get("data") or {}).get("key")
    if text is None:
        raise ClusterFailed(f"the Secret {secret} holds no key; look at `{door.kubectl} describe accesskey`")
    return base64.b64decode(text).decode()


@contextmanager
def key_for(door: Door, model: str) -> Iterator[str]:
    """A key that opens a model: one that is there and may be read, else one that is made and goes with the block.

    Raises ClusterFailed when neither may be; a key of its own that is left behind by a crash opens nothing from the day
    after tomorrow.
    """
    found = _readable(door, model)
    if found is not None:
        yield found
        return
    name = f"chat-{secrets.token_hex(4)}"
    try:
        yield create_key(door, name, [model], datetime.now(UTC).date() + timedelta(days=1))
    finally:
        door.api.delete(ACCESS_KEYS, door.namespace, name)


def _readable(door: Door, model: str) -> str | None:
    for item in door.api.list(ACCESS_KEYS, door.namespace):
        if model in (item["spec"].get("models") or []) and _ready(item).get("status") == "True":
            with suppress(ClusterFailed):  # a Secret that this person may not read
                return key_of(door, item)
    return None


def revoke_key(door: Door, name: str) -> None:
    """Take a key away. Raises UsageInvalid when there is none of that name."""
    if not door.api.delete(ACCESS_KEYS, door.namespace, name):
        names = [item["name"] for item in list_keys(door)]
        raise UsageInvalid(f"there is no AccessKey named {name} in namespace {door.namespace}; {nearest(name, names)}")


def _ready(found: Object) -> dict[str, Any]:
    conditions = (found.get("status") or {}).get("conditions") or ()
    return next((dict(item) for item in conditions if item["type"] == "Ready"), {})

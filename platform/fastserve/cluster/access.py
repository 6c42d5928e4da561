"""Access keys of a home: the key itself is shown once, its SHA-256 is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

from fastserve.cluster.home import Home
from fastserve.errors import UsageInvalid
from fastserve.gateway.config import ANY_MODEL, Key
from fastserve.gateway.keys import digest, new_key
from fastserve.spec.model import AccessKey
from fastserve.spec.section import is_name

LOCAL = "local"
"""Name of the key that this laptop's own commands use."""


def local_key(home: Home) -> str:
    """The key of this laptop's own commands; made on first use."""
    return home.local_key(new_key)


def gateway_keys(home: Home) -> tuple[Key, ...]:
    """All keys as the gateway needs them."""
    own = Key(name=LOCAL, sha256=digest(local_key(home)), models=(ANY_MODEL,))
    return (own, *(key_of(entry) for entry in _entries(home)))


def create_key(home: Home, name: str, models: Sequence[str], expires: date | None = None) -> str:
    """Make a key; what is returned is shown once and kept nowhere.

    Raises UsageInvalid for a name that is taken or is not a name, for no model, and for a day that has passed.
    """
    if not is_name(name):
        raise UsageInvalid(f"'{name}' is not a key's name; write lower-case letters, digits and '-'")
    if not models:
        raise UsageInvalid("a key opens at least one model; add --model NAME")
    if expires is not None and expires < datetime.now(UTC).date():
        raise UsageInvalid(f"--expires {expires} has passed; give a day that is still to come")
    if name == LOCAL or any(entry["name"] == name for entry in _entries(home)):
        raise UsageInvalid(
            f"there is a key named {name}; revoke it first with `fastserve keys revoke {name}`, or take another name"
        )
    key = new_key()
    _keep(home, [*_entries(home), _entry(name, digest(key), models, expires)])
    return key


def apply_access_key(home: Home, wanted: AccessKey) -> str | None:
    """Make a manifest's key, or change what it may do. Returns the key when it was made now, to be shown once."""
    name, spec = wanted.metadata.name, wanted.spec
    for entry in _entries(home):
        if entry["name"] == name:
            others = [other for other in _entries(home) if other["name"] != name]
            _keep(home, [*others, _entry(name, entry["sha256"], spec.models, spec.expires)])
            return None
    return create_key(home, name, spec.models, spec.expires)


def revoke_key(home: Home, name: str) -> None:
    """Take a key away. Raises UsageInvalid when there is none of that name."""
    kept = [entry for entry in _entries(home) if entry["name"] != name]
    if len(kept) == len(_entries(home)):
        known = ", ".join(entry["name"] for entry in _entries(home)) or "none"
        raise UsageInvalid(f"there is no key named {name}; the keys are: {known}")
    _keep(home, kept)


def list_keys(home: Home) -> list[dict[str, Any]]:
    """What each key may do; no key, no digest."""
    return [{"name": entry["name"], "models": entry["models"], "expires": entry["expires"]} for entry in _entries(home)]


def _entries(home: Home) -> list[dict[str, Any]]:
    return list(home.read_json("keys.json") or [])


def _keep(home: Home, entries: list[dict[str, Any]]) -> None:
    home.write_json("keys.json", sorted(entries, key=lambda entry: str(entry["name"])))


def _entry(name: str, sha256: str, models: Sequence[str], expires: date | None) -> dict[str, Any]:
    return {
        "name": name,
        "sha256": sha256,
        "models": sorted(set(models)),
        "expires": expires.isoformat() if expires else None,
    }


def key_of(entry: Mapping[str, Any]) -> Key:
    """A key as the gateway needs it, from what is kept of it: name, sha256, models, expires."""
    expires = date.fromisoformat(entry["expires"]) if entry["expires"] else None
    return Key(name=entry["name"], sha256=entry["sha256"], models=tuple(entry["models"]), expires=expires)

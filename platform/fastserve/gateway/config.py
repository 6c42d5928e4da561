"""What the gateway is told: one JSON file, written by the cluster room, read again whenever it changes.

The gateway starts before any model is ready and outlives every engine, so it takes orders from a file instead of
asking anybody: a crash of whoever writes it leaves the last good orders in force. The file holds no secret: keys are
there as SHA-256 only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastserve.errors import UsageInvalid

ANY_MODEL = "*"
TASKS = ("generate", "embed", "score", "transcribe")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision of a model and where it answers."""

    digest: str
    """The revision's digest: 64 hex digits."""

    weight: float
    """Share of the model's traffic, relative to its other revisions; 0 gets nothing."""

    targets: tuple[str, ...]
    """Base URLs without a slash at the end; the OpenAI path is appended."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model that clients may ask for."""

    task: str
    """generate, embed, score or transcribe: decides which routes the model has."""

    created: int
    """Unix seconds, shown by /v1/models."""

    revisions: tuple[Revision, ...] = ()
    """Empty while nothing is ready yet."""


@dataclass(frozen=True, slots=True)
class Key:
    """Who may ask. The key itself is nowhere in the file."""

    name: str
    """Name of the AccessKey; stands in the log."""

    sha256: str
    """SHA-256 of the key: 64 hex digits."""

    models: tuple[str, ...]
    """Models the key may ask for; `*` is all of them."""

    expires: date | None = None
    """Last day (UTC) on which the key works."""

    def allows(self, model: str) -> bool:
        """Whether the key may ask for `model`."""
        return ANY_MODEL in self.models or model in self.models


@dataclass(frozen=True, slots=True)
class Config:
    """All that the gateway needs to know."""

    host: str = "127.0.0.1"
    port: int = 8100
    models: Mapping[str, Served] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    read_timeout_seconds: float = 600.0
    """Longest time from a request's arrival to its last byte."""

    max_body_bytes: int = 4 * 2**20
    """Longest request body."""

    drain_seconds: float = 30.0
    """How long running streams may go on after SIGTERM."""


def read(path: Path) -> Config:
    """The config in the file `path`. Raises UsageInvalid, which names file and key, when it cannot be understood."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageInvalid(f"{path}: no such file; give the gateway's config with --config FILE") from None
    except (OSError, ValueError) as error:
        raise UsageInvalid(f"{path}: cannot be read as JSON ({error}); write it with fastserve up") from error
    try:
        return parse(raw)
    except UsageInvalid as error:
        raise UsageInvalid(f"{path}: {error}") from None


def write(path: Path, config: Config) -> None:
    """Replace the file `path` in one step: a reader sees the old config or the new one, never half of one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(to_json(config), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise


def to_json(config: Config) -> dict[str, Any]:
    """The config as plain JSON values; `parse` turns it back."""
    return {
        "host": config.host,
        "port": config.port,
        "models": {
            name: {
                "task": served.task,
                "created": served.created,
                "revisions": [
                    {"digest": revision.digest, "weight": revision.weight, "targets": list(revision.targets)}
                    for revision in served.revisions
                ],
            }
            for name, served in config.models.items()
        },
        "keys": [
            {
                "name": key.name,
                "sha256": key.sha256,
                "models": list(key.models),
                "expires": key.expires.isoformat() if key.expires else None,
            }
            for key in config.keys
        ],
        "readTimeoutSeconds": config.read_timeout_seconds,
        "maxBodyBytes": config.max_body_bytes,
        "drainSeconds": config.drain_seconds,
    }


def parse(raw: object) -> Config:
    """A Config from plain JSON values. Raises UsageInvalid that names the key."""
    top = _mapping(raw, "the file")
    _only(top, "the file", "host", "port", "models", "keys", "readTimeoutSeconds", "maxBodyBytes", "drainSeconds")
    usual = Config()
    models = {name: _served(value, name) for name, value in _mapping(top.get("models", {}), "models").items()}
    keys = tuple(_key(value, f"keys[{at}]") for at, value in enumerate(_listing(top.get("keys", []), "keys")))
    return Config(
        host=_text(top.get("host", usual.host), "host"),
        port=_whole(top.get("port", usual.port), "port", 0, 65535),
        models=models,
        keys=keys,
        read_timeout_seconds=_number(
            top.get("readTimeoutSeconds", usual.read_timeout_seconds), "readTimeoutSeconds", 0.001
        ),
        max_body_bytes=_whole(top.get("maxBodyBytes", usual.max_body_bytes), "maxBodyBytes", 1, 2**30),
        drain_seconds=_number(top.get("drainSeconds", usual.drain_seconds), "drainSeconds", 0.0),
    )


def _served(raw: object, name: str) -> Served:
    at = f"models.{name}"
    if not _NAME.fullmatch(name):
        raise UsageInvalid(f"{at}: a model's name is letters, digits, '.', '_' and '-'")
    value = _mapping(raw, at)
    _only(value, at, "task", "created", "revisions")
    task = _text(value.get("task", "generate"), f"{at}.task")
    if task not in TASKS:
        raise UsageInvalid(f"{at}.task: '{task}' is not one of {', '.join(TASKS)}")
    revisions = _listing(value.get("revisions", []), f"{at}.revisions")
    return Served(
        task=task,
        created=_whole(value.get("created", 0), f"{at}.created", 0, 2**53),
        revisions=tuple(_revision(item, f"{at}.revisions[{place}]") for place, item in enumerate(revisions)),
    )


def _revision(raw: object, at: str) -> Revision:
    value = _mapping(raw, at)
    _only(value, at, "digest", "weight", "targets")
    targets = tuple(_target(item, f"{at}.targets") for item in _listing(value.get("targets", []), f"{at}.targets"))
    return Revision(
        digest=_text(value.get("digest"), f"{at}.digest"),
        weight=_number(value.get("weight", 100), f"{at}.weight", 0.0),
        targets=tuple(dict.fromkeys(targets)),
    )


def _key(raw: object, at: str) -> Key:
    value = _mapping(raw, at)
    _only(value, at, "name", "sha256", "models", "expires")
    digest = _text(value.get("sha256"), f"{at}.sha256").strip().lower()
    if not _SHA256.fullmatch(digest):
        raise UsageInvalid(f"{at}.sha256: is not a SHA-256 of 64 hex digits; make keys with fastserve keys create")
    expires = value.get("expires")
    if expires is not None:
        try:
            expires = date.fromisoformat(_text(expires, f"{at}.expires"))
        except ValueError:
            raise UsageInvalid(f"{at}.expires: '{expires}' is not a day; write YYYY-MM-DD") from None
    models = _listing(value.get("models", []), f"{at}.models")
    return Key(
        name=_text(value.get("name"), f"{at}.name"),
        sha256=digest,
        models=tuple(_text(item, f"{at}.models") for item in models),
        expires=expires,
    )


def _target(raw: object, at: str) -> str:
    url = _text(raw, at)
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise UsageInvalid(f"{at}: '{url}' is not a base URL; write http://HOST:PORT/PATH")
    return url.rstrip("/")


def _only(value: Mapping[str, object], at: str, *allowed: str) -> None:
    for name in value:
        if name not in allowed:
            raise UsageInvalid(f"{at}: unknown key '{name}'; the keys are {', '.join(allowed)}")


def _mapping(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageInvalid(f"{at}: is not a mapping; write {{...}}")
    return value


def _listing(value: object, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageInvalid(f"{at}: is not a list; write [...]")
    return value


def _text(value: object, at: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageInvalid(f"{at}: is not a text; write it in quotes")
    return value


def _whole(value: object, at: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageInvalid(f"{at}: is not a whole number from {low} to {high}")
    return value


def _number(value: object, at: str, low: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 1e12:
        raise UsageInvalid(f"{at}: is not a number of at least {low:g}")
    return float(value)

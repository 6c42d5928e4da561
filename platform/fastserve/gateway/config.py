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

from fastserve.errors import UsageInvalid
from fastserve.gateway import json_values as j

ANY_MODEL = "*"
TASKS = ("generate", "embed", "score", "transcribe")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Target:
    """One place where a revision answers: its replicas on one hardware profile, behind one URL."""

    url: str
    """Base URL without a slash at the end; the OpenAI path is appended."""

    slots: int = 0
    """Requests that it may have at once: replicas that answer x requests of one replica. 0: not known, no bound."""

    profile: str = ""
    """Name of the hardware profile."""

    rank: int = 0
    """Place of the profile in serve.profiles; 0 is preferred."""

    last: bool = False
    """Behind it requests are held over a replica's death. It gets a request only when the revision has no other target,
    or when a try on another failed."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision of a model and where it answers."""

    digest: str
    """The revision's digest: 64 hex digits."""

    weight: float
    """Share of the model's traffic, relative to its other revisions; 0 gets nothing."""

    targets: tuple[Target, ...]
    """Where it answers, each URL once."""


@dataclass(frozen=True, slots=True)
class Hold:
    """How requests wait that nothing can take yet."""

    requests: int = 256
    """Most requests that wait at once; one more is refused. 0: nothing waits."""

    seconds: float = 300.0
    """Longest time that a request waits."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model that clients may ask for, or an adapter of one under a name of its own."""

    task: str
    """generate, embed, score or transcribe: decides which routes the model has."""

    created: int
    """Unix seconds, shown by /v1/models."""

    revisions: tuple[Revision, ...] = ()
    """Empty while nothing is ready yet."""

    parent: str | None = None
    """An adapter's base model. A key that allows the parent allows the adapter."""

    hold: Hold = Hold()
    """How requests wait while nothing can take them."""


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

    def allows(self, model: str, parent: str | None = None) -> bool:
        """Whether the key may ask for `model`, which is an adapter of `parent` or a model of its own (None)."""
        return ANY_MODEL in self.models or model in self.models or (parent is not None and parent in self.models)


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

    max_upload_bytes: int = 25 * 2**20
    """Longest form with a file of sound."""

    drain_seconds: float = 30.0
    """How long running streams may go on after SIGTERM."""

    admin_port: int = 0
    """Port on the same host that tells statistics; 0: there is none."""

    admin_sha256: str = ""
    """SHA-256 of the token that the admin port asks for: 64 hex digits."""

    orders_sha256: str = ""
    """SHA-256 of the token with which new orders may be sent to the admin port: 64 hex digits. Empty: they come by the
    file alone. It is another one than the token above, so that who reads figures cannot route."""

    serial: int = 0
    """Number of these orders. They come on two ways, and a file that comes late has a lower one: it is not taken."""


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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}-")
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
        "adminPort": config.admin_port,
        "adminSha256": config.admin_sha256,
        "ordersSha256": config.orders_sha256,
        "serial": config.serial,
        "models": {name: _served_to_json(served) for name, served in config.models.items()},
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
        "maxUploadBytes": config.max_upload_bytes,
        "drainSeconds": config.drain_seconds,
    }


def _served_to_json(served: Served) -> dict[str, Any]:
    return {
        "task": served.task,
        "created": served.created,
        "parent": served.parent,
        "hold": {"requests": served.hold.requests, "seconds": served.hold.seconds},
        "revisions": [
            {
                "digest": revision.digest,
                "weight": revision.weight,
                "targets": [
                    {
                        "url": target.url,
                        "slots": target.slots,
                        "profile": target.profile,
                        "rank": target.rank,
                        "last": target.last,
                    }
                    for target in revision.targets
                ],
            }
            for revision in served.revisions
        ],
    }


def parse(raw: object) -> Config:
    """A Config from plain JSON values. Raises UsageInvalid that names the key."""
    top = j.mapping(raw, "the file")
    j.only(top, "the file", *to_json(Config()))
    usual = Config()
    models = {name: _served(value, name) for name, value in j.mapping(top.get("models", {}), "models").items()}
    for name, served in models.items():
        _adapter(name, served, models)
    keys = tuple(_key(value, f"keys[{at}]") for at, value in enumerate(j.listing(top.get("keys", []), "keys")))
    port, admin_port, admin_sha256 = _doors(top, usual)
    return Config(
        host=j.text(top.get("host", usual.host), "host"),
        port=port,
        models=models,
        keys=keys,
        read_timeout_seconds=j.number(
            top.get("readTimeoutSeconds", usual.read_timeout_seconds), "readTimeoutSeconds", 0.001
        ),
        max_body_bytes=j.whole(top.get("maxBodyBytes", usual.max_body_bytes), "maxBodyBytes", 1, 2**30),
        max_upload_bytes=j.whole(top.get("maxUploadBytes", usual.max_upload_bytes), "maxUploadBytes", 1, 2**30),
        drain_seconds=j.number(top.get("drainSeconds", usual.drain_seconds), "drainSeconds", 0.0),
        admin_port=admin_port,
        admin_sha256=admin_sha256,
        orders_sha256=_orders(top, admin_port),
        serial=j.whole(top.get("serial", usual.serial), "serial", 0, 2**53),
    )


def _doors(top: Mapping[str, Any], usual: Config) -> tuple[int, int, str]:
    """port, adminPort, adminSha256: an admin port without a token would be open to everybody."""
    port = j.whole(top.get("port", usual.port), "port", 0, 65535)
    admin_port = j.whole(top.get("adminPort", usual.admin_port), "adminPort", 0, 65535)
    if admin_port and admin_port == port:
        raise UsageInvalid(f"adminPort: is {admin_port}, which is 'port' too; give another")
    if not admin_port and not top.get("adminSha256"):
        return port, 0, ""
    return port, admin_port, j.sha256(top.get("adminSha256"), "adminSha256", "the admin port's token")


def _orders(top: Mapping[str, Any], admin_port: int) -> str:
    """ordersSha256; it stands beside an admin port."""
    if not top.get("ordersSha256"):
        return ""
    if not admin_port:
        raise UsageInvalid("ordersSha256: there is no adminPort that orders could be sent to; give one, or remove it")
    return j.sha256(top["ordersSha256"], "ordersSha256", "the token for orders")


def _adapter(name: str, served: Served, models: Mapping[str, Served]) -> None:
    """An adapter stands beside a model of the same task that is no adapter itself."""
    if served.parent is None:
        return
    at = f"models.{name}.parent"
    parent = models.get(served.parent)
    if parent is None or parent.parent is not None:
        raise UsageInvalid(f"{at}: '{served.parent}' is not a model of this file that is no adapter itself")
    if parent.task != served.task:
        raise UsageInvalid(f"models.{name}.task: is {served.task}, and its parent '{served.parent}' does {parent.task}")


def _served(raw: object, name: str) -> Served:
    at = f"models.{name}"
    if not _NAME.fullmatch(name):
        raise UsageInvalid(f"{at}: a model's name is letters, digits, '.', '_' and '-'")
    value = j.mapping(raw, at)
    j.only(value, at, "task", "created", "parent", "hold", "revisions")
    task = j.text(value.get("task", "generate"), f"{at}.task")
    if task not in TASKS:
        raise UsageInvalid(f"{at}.task: '{task}' is not one of {', '.join(TASKS)}")
    listed = j.listing(value.get("revisions", []), f"{at}.revisions")
    revisions = tuple(_revision(item, f"{at}.revisions[{place}]") for place, item in enumerate(listed))
    for place, revision in enumerate(revisions):
        if revision.digest in (before.digest for before in revisions[:place]):
            raise UsageInvalid(f"{at}.revisions[{place}].digest: stands there twice; name a revision once")
    parent = value.get("parent")
    return Served(
        task=task,
        created=j.whole(value.get("created", 0), f"{at}.created", 0, 2**53),
        revisions=revisions,
        parent=None if parent is None else j.text(parent, f"{at}.parent"),
        hold=_hold(value.get("hold", {}), f"{at}.hold"),
    )


def _hold(raw: object, at: str) -> Hold:
    value = j.mapping(raw, at)
    j.only(value, at, "requests", "seconds")
    usual = Hold()
    return Hold(
        requests=j.whole(value.get("requests", usual.requests), f"{at}.requests", 0, 2**20),
        seconds=j.number(value.get("seconds", usual.seconds), f"{at}.seconds", 0.0),
    )


def _revision(raw: object, at: str) -> Revision:
    value = j.mapping(raw, at)
    j.only(value, at, "digest", "weight", "targets")
    listed = j.listing(value.get("targets", []), f"{at}.targets")
    targets = tuple(_target(item, f"{at}.targets[{place}]") for place, item in enumerate(listed))
    for place, target in enumerate(targets):
        if target.url in (before.url for before in targets[:place]):
            raise UsageInvalid(f"{at}.targets[{place}].url: '{target.url}' stands there twice; name it once")
    return Revision(
        digest=j.text(value.get("digest"), f"{at}.digest"),
        weight=j.number(value.get("weight", 100), f"{at}.weight", 0.0),
        targets=targets,
    )


def _key(raw: object, at: str) -> Key:
    value = j.mapping(raw, at)
    j.only(value, at, "name", "sha256", "models", "expires")
    digest = j.sha256(value.get("sha256"), f"{at}.sha256", "a key of fastserve keys create")
    expires = value.get("expires")
    if expires is not None:
        try:
            expires = date.fromisoformat(j.text(expires, f"{at}.expires"))
        except ValueError:
            raise UsageInvalid(f"{at}.expires: '{expires}' is not a day; write YYYY-MM-DD") from None
    models = j.listing(value.get("models", []), f"{at}.models")
    return Key(
        name=j.text(value.get("name"), f"{at}.name"),
        sha256=digest,
        models=tuple(j.text(item, f"{at}.models") for item in models),
        expires=expires,
    )


def _target(raw: object, at: str) -> Target:
    if isinstance(raw, str):
        return Target(j.url(raw, at))
    value = j.mapping(raw, at)
    j.only(value, at, "url", "slots", "profile", "rank", "last")
    profile = value.get("profile", "")
    return Target(
        url=j.url(value.get("url"), f"{at}.url"),
        slots=j.whole(value.get("slots", 0), f"{at}.slots", 0, 2**20),
        profile="" if profile == "" else j.text(profile, f"{at}.profile"),
        rank=j.whole(value.get("rank", 0), f"{at}.rank", 0, 2**20),
        last=j.flag(value.get("last", False), f"{at}.last"),
    )

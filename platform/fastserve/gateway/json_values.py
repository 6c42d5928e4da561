"""Checks for values of a config file: each takes a value and its place, and gives it back or names the place.

Every check raises UsageInvalid that begins with the place (`models.chat.hold.seconds`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from fastserve.errors import UsageInvalid

_SHA256 = re.compile(r"[0-9a-f]{64}")


def url(raw: object, at: str) -> str:
    """A base URL, without a slash at the end."""
    found = text(raw, at)
    parts = urlsplit(found)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise UsageInvalid(f"{at}: '{found}' is not a base URL; write http://HOST:PORT/PATH")
    return found.rstrip("/")


def sha256(raw: object, at: str, what: str) -> str:
    """64 hex digits in lower case.

    what: what it is the SHA-256 of, for the error.
    """
    digest = text(raw, at).strip().lower()
    if not _SHA256.fullmatch(digest):
        raise UsageInvalid(f"{at}: is not a SHA-256 of 64 hex digits; write that of {what}")
    return digest


def only(value: Mapping[str, object], at: str, *allowed: str) -> None:
    """Raise for a key that nobody knows."""
    for name in value:
        if name not in allowed:
            raise UsageInvalid(f"{at}: unknown key '{name}'; the keys are {', '.join(allowed)}")


def mapping(value: object, at: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise UsageInvalid(f"{at}: is not a mapping; write {{...}}")
    return value


def listing(value: object, at: str) -> list[Any]:
    """A JSON array."""
    if not isinstance(value, list):
        raise UsageInvalid(f"{at}: is not a list; write [...]")
    return value


def text(value: object, at: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise UsageInvalid(f"{at}: is not a text; write it in quotes")
    return value


def whole(value: object, at: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageInvalid(f"{at}: is not a whole number from {low} to {high}")
    return value


def number(value: object, at: str, low: float) -> float:
    """A finite number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 1e12:
        raise UsageInvalid(f"{at}: is not a number of at least {low:g}")
    return float(value)


def flag(value: object, at: str) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise UsageInvalid(f"{at}: is not true or false")
    return value

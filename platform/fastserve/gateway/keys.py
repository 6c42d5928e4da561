"""Keys: made once, kept as SHA-256, looked up without telling anything to whoever guesses.

A key is matched against a closed alphabet before any look-up, so nothing that a client invents reaches a table. Then
its digest is looked up and compared in constant time. Unknown, expired, revoked and malformed keys get the same bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from datetime import date

from fastserve.gateway.answers import Refusal
from fastserve.gateway.config import Key

PREFIX = "fs-"
KEY = re.compile(r"[A-Za-z0-9_-]{20,128}")
_HEADER = re.compile(r"bearer[ \t]+([^ \t]+)[ \t]*", re.IGNORECASE)
_NOBODY = "0" * 64


def new_key() -> str:
    """A fresh key of 256 random bits: `fs-` and 43 letters, digits, '_' and '-'."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """SHA-256 of `key` (blanks and a line's end around it removed) as 64 hex digits."""
    return hashlib.sha256(key.strip().encode()).hexdigest()


class Keyring:
    """All keys of one config, by digest."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._by_digest = {key.sha256: key for key in keys}

    def find(self, headers: Sequence[str], today: date) -> Key:
        """The key in the `Authorization` headers of a request.

        headers: every Authorization header of the request, as received; two of them are refused.
        today: the day in UTC; a key works through its last day.

        Raises Refusal (401): `missing_api_key` without a header, else `invalid_api_key`.
        """
        if not headers:
            raise Refusal(
                401,
                "No API key was given; send the header 'Authorization: Bearer KEY'.",
                code="missing_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        match = _HEADER.fullmatch(headers[0]) if len(headers) == 1 else None
        if match is None or not KEY.fullmatch(match[1]):
            raise invalid_key()
        sought = digest(match[1])
        key = self._by_digest.get(sought)
        known = hmac.compare_digest(key.sha256 if key else _NOBODY, sought)
        if key is None or not known or (key.expires is not None and today > key.expires):
            raise invalid_key()
        return key


def invalid_key() -> Refusal:
    """The one answer to every key that does not open anything."""
    return Refusal(
        401,
        "The API key is not valid; make one with 'fastserve keys create'.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )

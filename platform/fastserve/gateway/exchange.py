"""One request and what happened to it: what the client may see in headers, and the one line that the log keeps.

The line names who asked for what, how it ended and how long it took. It never holds a prompt, an answer or a key.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MOST_IGNORED = 16
LONGEST_FIELD_NAME = 64
CLIENT_GONE = 499
"""Status in the log when the client went away before the end (as nginx writes it)."""

_CLIENT_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class Exchange:
    """A request on its way through the gateway."""

    request: web.BaseRequest
    id: str = field(default_factory=lambda: f"req-{secrets.token_hex(12)}")
    """Fresh for every request: engines key caches by it, so a client's own never goes inwards."""

    started: float = field(default_factory=time.perf_counter)
    key: str | None = None
    """Name of the key."""

    model: str | None = None
    """Only models that exist: a client's invention does not get into the log."""

    revision: str | None = None
    status: int = CLIENT_GONE
    code: str | None = None
    first_byte: float | None = None
    tokens: int | None = None
    tries: int = 0
    held_seconds: float = 0.0
    """Time spent in the hold."""

    ignored: tuple[str, ...] = ()
    response: web.StreamResponse | None = None
    """Set as soon as something may have been sent."""

    def headers(self, answered: bool = True) -> dict[str, str]:
        """Headers of the answer that do not depend on its outcome.

        answered: False while nobody has answered; then there is no revision to name, for another may be asked yet.
        """
        found = {"X-Request-Id": self.id}
        theirs = self.request.headers.get("X-Request-Id", "")
        if _CLIENT_ID.fullmatch(theirs):
            found["X-Client-Request-Id"] = theirs
        if answered and self.revision is not None:
            found["X-FastServe-Revision"] = self.revision
        if self.ignored:
            names = (name[:LONGEST_FIELD_NAME] for name in self.ignored[:MOST_IGNORED])
            found["X-FastServe-Ignored"] = ", ".join(re.sub(r"[^A-Za-z0-9_.-]", "?", name) for name in names)
        return found

    def begin(self, response: web.StreamResponse) -> None:
        """Note that the first byte of `response` goes out now."""
        self.response = response
        self.status = response.status
        self.first_byte = time.perf_counter()

    def line(self) -> dict[str, Any]:
        """The log's line as plain values; times in milliseconds."""
        now = time.perf_counter()
        first = None if self.first_byte is None else round((self.first_byte - self.started) * 1000, 2)
        return {
            "id": self.id,
            "key": self.key,
            "model": self.model,
            "revision": self.revision,
            "status": self.status,
            "code": self.code,
            "firstByteMs": first,
            "heldMs": round(self.held_seconds * 1000, 2),
            "totalMs": round((now - self.started) * 1000, 2),
            "tokensOut": self.tokens,
            "tries": self.tries,
        }

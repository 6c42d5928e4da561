"""Server-sent events, cut between events and counted, otherwise untouched.

A replica can die in the middle of an event. Only whole events are passed on, so that the error event which then
follows is never glued to half a line. Whole events are passed on at once and byte for byte.
"""

from __future__ import annotations

import re

LONGEST_EVENT_BYTES = 8 * 2**20
_USAGE = re.compile(rb'"completion_tokens"\s*:\s*([0-9]{1,12})')


class EventCutter:
    """Cuts a stream of bytes into whole events and counts what they carry."""

    __slots__ = ("_events", "_rest", "_usage", "done")

    def __init__(self) -> None:
        self._rest = b""
        self._events = 0
        self._usage: int | None = None
        self.done = False
        """Whether `data: [DONE]` has passed."""

    @property
    def overfull(self) -> bool:
        """Whether an event is longer than any engine makes."""
        return len(self._rest) > LONGEST_EVENT_BYTES

    @property
    def tokens(self) -> int:
        """Tokens of the answer: the engine's own count where it gave one, else the events that carried a piece."""
        return self._events if self._usage is None else self._usage

    def feed(self, chunk: bytes) -> bytes:
        """Whole events out of all bytes so far; b'' while the first one is not complete."""
        if self._rest:
            chunk = self._rest + chunk
            self._rest = b""
        if not chunk.endswith(b"\n\n"):
            end = _end_of_events(chunk)
            if end < len(chunk):
                self._rest = chunk[end:]
                chunk = chunk[:end]
        if chunk:
            self._count(chunk)
        return chunk

    def finish(self) -> bytes:
        """What is left at a clean end: a last event whose blank line is missing is whole all the same."""
        rest, self._rest = self._rest, b""
        if rest.strip() != b"data: [DONE]":
            return b""
        self.done = True
        return b"data: [DONE]\n\n"

    def _count(self, events: bytes) -> None:
        # JSON has no raw line ends, so a line that begins with "data:" is always an event of its own.
        count = events.count(b"\ndata:") + events.startswith(b"data:")
        if b"[DONE]" in events and re.search(rb"(?:^|\n)data: ?\[DONE\]", events):
            self.done = True
            count -= 1
        if b'"usage"' in events:
            found = _USAGE.findall(events)
            if found:
                self._usage = int(found[-1])
        # The opening event of each choice of a chat names the role and carries no token.
        self._events += count - events.count(b'"delta":{"role"')


def usage_tokens(body: bytes) -> int | None:
    """Tokens of a whole JSON answer as the engine counted them; inside texts quotes are escaped and do not match."""
    found = _USAGE.findall(body)
    return int(found[-1]) if found else None


def _end_of_events(chunk: bytes) -> int:
    """Where the last whole event ends."""
    line_feed = chunk.rfind(b"\n\n") + 2
    carriage = chunk.rfind(b"\r\n\r\n") + 4
    return max(line_feed if line_feed > 1 else 0, carriage if carriage > 3 else 0)

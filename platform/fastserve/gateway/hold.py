"""The hold: where requests wait for a free slot, or for a revision to become ready.

One line for each model, so no model waits for another. A request draws its revision when it arrives and waits for that
one, first come first served: otherwise a busy revision's share would run over to the others, and weights would mean
nothing under load. Only a request whose replica was lost takes any free slot, before those that have not had one yet.
A line is bounded in number and time. Who leaves frees its place.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fastserve.gateway import answers
from fastserve.gateway.config import Served
from fastserve.gateway.routes import REST_SECONDS, Choice, Router

LONGEST_LINE_BYTES = 128 * 2**20
"""Bodies of all requests of one line together: they are in memory while they wait."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """One request that waits."""

    number: int
    size_bytes: int
    tried: Collection[str]
    slot: asyncio.Future[Choice]


@dataclass(slots=True)
class _Line:
    """All requests to one model that wait."""

    again: deque[_Waiter] = field(default_factory=deque)
    """Lost their replica; they take any slot."""

    drawn: dict[str | None, deque[_Waiter]] = field(default_factory=dict)
    """By revision; None: there was none when they came."""

    def __len__(self) -> int:
        return len(self.again) + sum(map(len, self.drawn.values()))

    @property
    def size_bytes(self) -> int:
        return sum(waiter.size_bytes for waiter in self.everybody())

    def everybody(self) -> list[_Waiter]:
        return [*self.again, *(waiter for waiters in self.drawn.values() for waiter in waiters)]


class Hold:
    """Gives out the slots of the router's targets, and lets wait who finds none."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._lines: dict[str, _Line] = {}
        self._arrivals = 0
        self._closed = False

    def waiting(self, model: str) -> int:
        """Requests to `model` that wait now."""
        return len(self._lines.get(model, ()))

    async def take(self, model: str, seconds: float, tried: Collection[str] = (), size_bytes: int = 0) -> Choice:
        """A slot for a request to `model`; give it back with `give_back`.

        seconds: how long to wait at most.
        tried: targets that have failed this request already. With any, it takes whatever is free, and finds a place in
        the line even when that is full, for it has been let in before.
        size_bytes: length of the request's body.

        Raises Refusal: `overloaded` when the line is full, `model_loading` when the time is up, `gateway_stopping`,
        `model_not_found` when the model is taken away meanwhile.
        """
        line = self._lines.get(model)
        digest = None if tried else self._router.draw(model)
        choice = None
        if tried:
            if line is None or not line.again:
                choice = self._router.take_any(model, tried)
        elif digest is not None and (line is None or not (line.again or line.drawn.get(digest))):
            choice = self._router.take(model, digest)
        return choice or await self._wait(model, digest, seconds, tried, size_bytes)

    def give_back(self, choice: Choice) -> None:
        """Free a slot; the next in line takes it."""
        self._router.give_back(choice)
        self._serve()

    def rest(self, choice: Choice) -> None:
        """Leave a target out for a moment that did not take a request; look again when the moment is over."""
        self._router.rest(choice.target)
        asyncio.get_running_loop().call_later(REST_SECONDS + 0.01, self._serve)

    def replace(self, models: Mapping[str, Served]) -> None:
        """Take new orders. Who waits for a revision that is ready no longer draws again; others keep their place."""
        self._router.models = models
        for model, line in self._lines.items():
            if model not in models:
                for waiter in line.everybody():
                    _tell(waiter, answers.model_not_found(model))
                continue
            moved: list[_Waiter] = []
            for digest in [digest for digest in line.drawn if not self._router.is_ready(model, digest)]:
                moved.extend(line.drawn.pop(digest))
            for waiter in sorted(moved, key=lambda waiter: waiter.number):
                line.drawn.setdefault(self._router.draw(model), deque()).append(waiter)
            for digest, waiters in line.drawn.items():
                line.drawn[digest] = deque(sorted(waiters, key=lambda waiter: waiter.number))
        self._serve()

    def close(self) -> None:
        """Send everybody away who waits, and who comes to wait."""
        self._closed = True
        for line in self._lines.values():
            for waiter in line.everybody():
                _tell(waiter, answers.stopping())

    async def _wait(
        self, model: str, digest: str | None, seconds: float, tried: Collection[str], size_bytes: int
    ) -> Choice:
        if self._closed:
            raise answers.stopping()
        served = self._router.models.get(model)
        if served is None:
            raise answers.model_not_found(model)
        line = self._lines.get(model) or _Line()
        if not tried and (len(line) >= served.hold.requests or line.size_bytes + size_bytes > LONGEST_LINE_BYTES):
            raise answers.overloaded(model)
        self._arrivals += 1
        waiter = _Waiter(self._arrivals, size_bytes, tried, asyncio.get_running_loop().create_future())
        self._lines[model] = line
        (line.again if tried else line.drawn.setdefault(digest, deque())).append(waiter)
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                return await waiter.slot
        except TimeoutError:
            self._leave(model, waiter)
            raise answers.model_loading(model) from None
        except BaseException:
            self._leave(model, waiter)
            raise

    def _leave(self, model: str, waiter: _Waiter) -> None:
        """Take a waiter out of its line; a slot that it was given in the same moment goes to the next."""
        slot = waiter.slot
        if slot.done() and not slot.cancelled() and slot.exception() is None:
            self.give_back(slot.result())
            return
        line = self._lines.get(model)
        for waiters in () if line is None else (line.again, *line.drawn.values()):
            if waiter in waiters:
                waiters.remove(waiter)
        self._tidy(model)

    def _serve(self) -> None:
        """Give free slots to whom they are due. Models that share targets take turns."""
        for model in list(self._lines):
            line = self._lines[model]
            before = len(line)
            while (waiter := _first(line.again)) and (choice := self._router.take_any(model, waiter.tried)):
                line.again.popleft().slot.set_result(choice)
            for digest, waiters in line.drawn.items() if not line.again else ():
                while digest is not None and _first(waiters) and (choice := self._router.take(model, digest)):
                    waiters.popleft().slot.set_result(choice)
            if len(line) != before:
                self._lines[model] = self._lines.pop(model)
                self._tidy(model)

    def _tidy(self, model: str) -> None:
        line = self._lines.get(model)
        if line is None:
            return
        line.drawn = {digest: waiters for digest, waiters in line.drawn.items() if waiters}
        if not len(line):
            del self._lines[model]


def _first(waiters: deque[_Waiter]) -> _Waiter | None:
    """Who is next; those who have gone already, or were sent away, are dropped."""
    while waiters and waiters[0].slot.done():
        waiters.popleft()
    return waiters[0] if waiters else None


def _tell(waiter: _Waiter, refusal: answers.Refusal) -> None:
    if not waiter.slot.done():
        waiter.slot.set_exception(refusal)

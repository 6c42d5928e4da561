"""The pods of a namespace's gateway, each asked by its own address: orders to all of them, figures from all of them.

The Service of the admin port has no address of its own, so its name leads to the address of every pod that is ready.
That takes no right at the API server. A pod that is not among them yet has read the newest orders from its volume when
it started.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from fastserve.gateway.together import together

ANSWER_SECONDS = 3.0
SILENT_SECONDS = 15.0
"""A gateway that did not answer is left alone for so long."""

SLOW_SECONDS = 1.0
"""A name that leads nowhere is said to do so at once; when it takes longer, nobody answered."""

AGAIN_SECONDS = 20.0
"""Orders are sent again after so long, though a pod has them: its process may have begun anew, with an old volume."""

log = logging.getLogger("fastserve.operator")


def addresses_of(host: str) -> list[str]:
    """Every address that a name leads to, of one family, so that no pod is there twice; empty when it leads nowhere."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    families = sorted({family for family, *_ in found if family in (socket.AF_INET, socket.AF_INET6)})
    return sorted({str(place[0]) for family, _, _, _, place in found if family == families[0]}) if families else []


class GatewayPods:
    """Calls to every gateway behind one name."""

    def __init__(
        self, url: str, addresses: Callable[[str], list[str]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """url: of the admin port. addresses: that a name leads to."""
        self._url = url
        self._addresses = addresses
        self._clock = clock
        self._silent: dict[str, float] = {}
        self._has: dict[str, tuple[str, float]] = {}
        self._nowhere_until = 0.0

    def send(self, orders: str, token: str) -> None:
        """Send orders to every gateway that has not got them."""
        mark = hashlib.sha256(orders.encode()).hexdigest()
        urls = self._urls()
        self._has = {url: known for url, known in self._has.items() if url in urls}
        for url in urls:
            known = self._has.get(url)
            if known is not None and known[0] == mark and self._clock() < known[1] + AGAIN_SECONDS:
                continue
            answer = self._call("PUT", f"{url}/orders", token, content=orders.encode())
            if answer is None:
                self._silent[url] = self._clock()
            elif answer.is_success:
                self._has[url] = (mark, self._clock())
            else:  # one of another version, or one that has newer orders: the volume decides
                self._has[url] = (mark, self._clock())
                log.warning("the gateway at %s took no orders: %s %s", url, answer.status_code, answer.text[:200])

    def stats(self, since: float, token: str) -> dict[str, Any] | None:
        """What all of them have counted since that Unix second; None while none answers."""
        told = []
        for url in self._urls():
            answer = self._call("GET", f"{url}/stats", token, params={"since": str(since), "steps": "1"})
            if answer is None:
                self._silent[url] = self._clock()
            elif answer.is_success:
                told.append(answer)
        try:
            return together([answer.json() for answer in told]) if told else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("the figures of a gateway of %s are not understood: %r", self._url, error)
            return None

    def _urls(self) -> list[str]:
        """Of every gateway that is not known to be silent."""
        parts = urlsplit(self._url)
        if parts.scheme == "https" or parts.hostname is None:
            found = [self._url]  # a certificate is for the name
        else:
            port = parts.port or 80
            hosts = [f"[{host}]" if ":" in host else host for host in self._found(parts.hostname)]
            found = [f"http://{host}:{port}{parts.path}" for host in hosts]
        self._silent = {url: at for url, at in self._silent.items() if self._clock() < at + SILENT_SECONDS}
        return [url for url in found if url not in self._silent]

    def _found(self, host: str) -> list[str]:
        """The addresses; none for a while when nobody answers who knows names, so that no look waits for it again."""
        if self._clock() < self._nowhere_until:
            return []
        asked_at = self._clock()
        found = self._addresses(host)
        if not found and self._clock() > asked_at + SLOW_SECONDS:
            self._nowhere_until = self._clock() + SILENT_SECONDS
        return found

    def _call(self, method: str, url: str, token: str, **more: Any) -> httpx.Response | None:
        """The answer; None when there is none."""
        try:
            # trust_env: a proxy that the environment names must never see the token.
            with httpx.Client(trust_env=False, timeout=ANSWER_SECONDS) as client:
                return client.request(method, url, headers={"Authorization": f"Bearer {token}"}, **more)
        except (httpx.HTTPError, httpx.InvalidURL):
            return None

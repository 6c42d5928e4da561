"""What unit tests of several rooms need: no network, an API server in memory, and a client of it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kube_objects import KubeObjects

    from fastserve.cluster.kube.api import KubeApi


@pytest.fixture(scope="session", autouse=True)
def no_names_of_elsewhere() -> Iterator[None]:
    """Whoever asks for another machine's name is told at once that nobody knows it: a resolver that loses a packet
    would be waited for, and a name that leads somewhere would take a test out into the network."""
    asked = socket.getaddrinfo

    def look(host: Any, *words: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name in (None, "", "localhost", socket.gethostname()) or _is_address(name):
            return asked(host, *words, **more)
        raise socket.gaierror(socket.EAI_NONAME, "no unit test knows another machine")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look)
        yield


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


@pytest.fixture
def objects() -> KubeObjects:
    """The objects of an API server in memory; a test that wants some to begin with has its own."""
    from kube_objects import KubeObjects  # here, so that tests of other rooms do not wait for Kubernetes' client

    return KubeObjects()


@pytest.fixture
def api(objects: KubeObjects) -> Iterator[KubeApi]:
    """A client of it, over HTTP."""
    from kube_objects import served

    with served(objects) as found:
        yield found

"""What unit tests of several rooms need: an API server in memory, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kube_objects import KubeObjects

    from fastserve.cluster.kube.api import KubeApi


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

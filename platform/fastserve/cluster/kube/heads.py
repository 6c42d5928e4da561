"""Which Ray heads a namespace has, and at which of them a model's work belongs.

Either there is one, which somebody else runs (`OneHead`); or the operator makes RayClusters itself, for all models
together and for each Model that asks for one of its own (`cluster.kube.ray_clusters`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastserve.cluster.kube.api import Object
from fastserve.cluster.kube.ray import KubeEndpoint
from fastserve.cluster.parts import Endpoint, Head
from fastserve.errors import ClusterFailed, NotExecutable, Problem
from fastserve.spec.model import Model

DEDICATED = "dedicated"
SHARED = "shared"
"""Pool of all models that ask for no RayCluster of their own; such a Model's pool has its name in it."""


def pool_of(model: Model | None) -> str:
    """The pool that a model's work belongs to."""
    return SHARED if model is None or model.spec.cluster == SHARED else own_pool(model.name)


def own_pool(name: str) -> str:
    """The pool of one Model alone."""
    return f"model.{name}"


@dataclass(frozen=True, slots=True)
class NamedHead:
    """One head of a namespace."""

    name: str
    pool: str
    head: Head
    is_up: bool = True
    """Whether it is worth starting anything there."""

    was_up: bool = True
    """Whether anything can ever have run there."""


class MissingHead:
    """A head that is not there, and why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def load(self) -> Endpoint | None:
        """None: nothing runs."""
        return None

    def start(self) -> KubeEndpoint:
        """Raises ClusterFailed that says what is missing."""
        raise ClusterFailed(self._why)

    def stop(self) -> None:
        """Nothing is there to stop."""


class Heads(ABC):
    """The heads of one namespace."""

    @abstractmethod
    def look(self, dedicated: Mapping[str, Object]) -> None:
        """See which heads there are, and bring about those that shall be. dedicated: Model objects, by name, that ask
        for a RayCluster of their own."""

    @abstractmethod
    def all(self) -> Sequence[NamedHead]:
        """Those that the last look saw, and for a pool without any one that says what is missing."""

    @abstractmethod
    def of(self, pool: str) -> NamedHead:
        """The head that a pool's work shall go to."""

    @abstractmethod
    def wanted(self) -> frozenset[str]:
        """Names of the heads that shall be there, whether anything runs at them or not."""

    @abstractmethod
    def end(self, head: NamedHead) -> None:
        """Give up a head that nothing runs at."""

    def next_of(self, pool: str) -> tuple[str, str] | None:
        """Name of the head that a pool's work shall be at in the end, up or not; empty where it cannot be made, and
        then why. None where nothing is known of it."""
        return self.of(pool).name, ""

    def rolling(self) -> Mapping[str, str]:
        """A sentence for each head that works on while its successor is not up yet, by name."""
        return {}

    @abstractmethod
    def require(self, model: Model) -> None:
        """Raises NotExecutable when a model asks for a head that cannot be had here."""


class OneHead(Heads):
    """The only head there is; it is not ours to start or stop."""

    def __init__(self, head: Head) -> None:
        self._head = NamedHead(SHARED, SHARED, head)

    def look(self, dedicated: Mapping[str, Object]) -> None:
        """There is nothing to bring about."""

    def all(self) -> Sequence[NamedHead]:
        """The one."""
        return (self._head,)

    def of(self, pool: str) -> NamedHead:
        """The one."""
        return self._head

    def wanted(self) -> frozenset[str]:
        """The one."""
        return frozenset({self._head.name})

    def end(self, head: NamedHead) -> None:
        """It stays."""

    def require(self, model: Model) -> None:
        """Raises NotExecutable for a model that asks for a RayCluster of its own."""
        if model.spec.cluster != SHARED:
            message = (
                "this operator was given its Ray cluster and makes none; write shared, "
                "or start it with --ray-template as the chart does"
            )
            raise NotExecutable([Problem("spec.cluster", message, suggestion=SHARED)])

"""What the beat needs of the two things that differ between a laptop and a cluster: the Ray head and the gateway.

The third, the state, is `cluster.home.Home`: a laptop keeps its small files in a folder, a cluster in Kubernetes
objects (`cluster.kube.home`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fastserve.cluster.nodes import Machine
from fastserve.gateway import config as gateway_config


class Endpoint(Protocol):
    """A Ray head that can be talked to."""

    @property
    def dashboard_url(self) -> str:
        """Base of the Jobs and Serve REST APIs."""

    @property
    def token(self) -> str:
        """Bearer token of every call; empty when the head asks for none."""

    @property
    def serve_port(self) -> int:
        """Port of Serve's proxy."""

    @property
    def serve_host(self) -> str:
        """Address that Serve's proxy listens on."""

    @property
    def serve_url(self) -> str:
        """Base URL at which the gateway reaches Serve's proxy."""

    @property
    def python(self) -> str:
        """The interpreter that runs a stage, on the machine where it runs."""

    @property
    def promised(self) -> tuple[Machine, ...]:
        """Machines that there may be of each profile, where an autoscaler adds them when they are asked for."""

    @property
    def temp_dir(self) -> Path:
        """Folder of the head's logs; on a cluster there is none at hand."""


class Head(Protocol):
    """Finds a Ray head, and brings one up where that is ours to do."""

    def load(self) -> Endpoint | None:
        """The head that is there; None when none is."""

    def start(self) -> Endpoint:
        """The head that is there, else a new one. Raises ClusterFailed when there is none to be had."""

    def stop(self) -> None:
        """End what was started."""


class Gateway(Protocol):
    """Tells the gateway what to route, and runs it where that is ours to do."""

    @property
    def url(self) -> str | None:
        """Base URL for OpenAI clients; None when it is not known yet."""

    def alive(self) -> bool:
        """Whether it takes orders."""

    def choose_port(self, wanted: int | None) -> int:
        """The port to listen on."""

    def configure(self, models: Mapping[str, Any], keys: tuple[gateway_config.Key, ...], port: int) -> bool:
        """Give it its orders when they differ from what it has. True when given."""

    def start(self, port: int) -> None:
        """Run it, where that is ours to do."""

    def stats(self, since: float) -> dict[str, Any] | None:
        """What it has counted since that Unix second; None while it does not answer."""

    def stop(self) -> None:
        """End it, where that is ours to do."""

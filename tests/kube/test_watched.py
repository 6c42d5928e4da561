"""What is kept of a real API server's objects, with the rights of the chart: it ends as the server has it, whatever
becomes of the watch."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from control_plane import Cluster, ControlPlane
from followed import followed
from kubernetes import client, config

from fastserve.cluster.kube import api as kube_api
from fastserve.cluster.kube.api import CONFIG_MAPS, MANAGED_BY, MANAGER, KubeApi, Resource
from fastserve.cluster.kube.home import STATES
from fastserve.cluster.kube.watched import WatchedApi
from fastserve.errors import ClusterFailed, StateChanged

pytestmark = pytest.mark.kube

LABELS = {MANAGED_BY: MANAGER, "fastserve.dev/model": "m"}
NAMES = ("a", "b", "c")


class Counted(WatchedApi):
    """Counts the pages that it asks for."""

    pages_asked = 0

    def pages(
        self, resource: Resource, namespace: str | None, labels: str = "", fields: str = ""
    ) -> Iterator[tuple[Sequence[dict[str, Any]], str]]:
        Counted.pages_asked += 1
        return super().pages(resource, namespace, labels, fields)


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.1)


class World:
    """Another writer, and writes of our own that follow from what is kept."""

    def __init__(self, cluster: Cluster, api: WatchedApi, namespace: str) -> None:
        self.cluster, self.api, self.namespace = cluster, api, namespace
        self.path = f"/api/v1/namespaces/{namespace}/configmaps"

    def kept(self) -> list[dict[str, Any]]:
        return self.api.list(CONFIG_MAPS, self.namespace, STATES)

    def is_true(self) -> bool:
        """Whether what is read without asking is what the server answers who asks."""
        before = Counted.pages_asked
        try:
            kept = self.kept()
            if Counted.pages_asked > before:
                return False
            truth = KubeApi.list(self.api, CONFIG_MAPS, self.namespace, STATES)
        except ClusterFailed:  # it has just come back
            return False
        for item in truth:
            item["metadata"].pop("managedFields", None)
        return kept == truth

    def foreign(self, name: str, number: int) -> None:
        labels = LABELS if number % 4 else {"fastserve.dev/model": None}
        body = {"metadata": {"name": name, "labels": labels}, "data": {"n": str(number)}}
        patch = {"Content-Type": "application/merge-patch+json"}
        changed = self.cluster.api.patch(f"{self.path}/{name}", content=json.dumps(body), headers=patch)
        if changed.status_code == 404:
            body["metadata"]["labels"] = LABELS
            self.cluster.api.post(self.path, json=body)

    def sees_without_a_list(self, number: int) -> bool:
        before = Counted.pages_asked
        self.foreign("a", number)
        until(lambda: str(number) in self.numbers("a"), "a change is not seen")
        return Counted.pages_asked == before

    def numbers(self, name: str) -> list[str]:
        return [item["data"].get("n", "") for item in self.kept() if item["metadata"]["name"] == name]

    def removed(self, name: str, number: int) -> None:
        self.cluster.api.delete(f"{self.path}/{name}")

    def own(self, name: str, number: int) -> None:
        data = {"data": {"own": str(number)}}
        with suppress(StateChanged, ClusterFailed):  # who was first; a server that has just come back
            found = next((item for item in self.kept() if item["metadata"]["name"] == name), None)
            if found is None:
                metadata = {"name": name, "namespace": self.namespace, "labels": LABELS}
                made = self.api.create(CONFIG_MAPS, {"metadata": metadata, **data})
            else:
                made = self.api.merge(CONFIG_MAPS, self.namespace, name, data, found["metadata"]["resourceVersion"])
            # Others write into it, too: what is read is this write, or what came after it.
            read = next(item for item in self.kept() if item["metadata"]["name"] == name)
            assert int(read["metadata"]["resourceVersion"]) >= int(made["metadata"]["resourceVersion"])


def test_it_ends_as_the_server_has_it(
    definitions: Cluster, own_cluster: ControlPlane, namespace: str, operator_kubeconfig: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kube_api, "WATCH_SECONDS", 3)  # it is taken up anew again and again
    configuration = client.Configuration()
    config.load_kube_config(config_file=str(operator_kubeconfig), client_configuration=configuration)
    configuration.retries = False
    api_client = client.ApiClient(configuration)
    api = Counted(api_client)
    world = World(definitions, api, namespace)
    watched = api.keep(CONFIG_MAPS, namespace, STATES)
    assert world.kept() == []
    chance = random.Random(7)
    with followed(watched):
        for deed in range(60):
            getattr(world, chance.choice(("foreign", "removed", "own")))(chance.choice(NAMES), chance.randrange(100))
            if deed == 30:
                own_cluster.stop_api()
                own_cluster.start_api()
            if deed % 20 == 19:
                until(world.is_true, f"after {deed} writes it is not what the server has")
        numbers = iter(range(1, 10_000, 4))
        until(lambda: world.sees_without_a_list(next(numbers)), "to see a change, it has to list")
    api_client.rest_client.pool_manager.clear()

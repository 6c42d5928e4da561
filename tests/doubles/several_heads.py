"""A small cluster (`small_cluster`) in which the operator makes its RayClusters itself, and a KubeRay that brings up
their heads: each a Ray of its own, at its own address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_cluster import Api, CountedStore, Ray, SmallCluster

from fastserve.cluster.kube.cluster import KubeCluster
from fastserve.cluster.kube.gateway import KubeGateway
from fastserve.cluster.kube.home import KubeHome
from fastserve.cluster.kube.ray_clusters import TEMPLATE_KEY, RayClusters
from fastserve.cluster.ray_rest import RayRest
from fastserve_operator.model import Namespace

CLUSTERS = "/apis/ray.io/v1/namespaces/demo/rayclusters"
TEMPLATE = "/api/v1/namespaces/demo/configmaps/fastserve-ray"
ORDERS = "/api/v1/namespaces/demo/configmaps/fastserve-gateway"
SECRETS = "/api/v1/namespaces/demo/secrets"


def template(image: str = "one", most: int = 2, profiles: tuple[str, ...] = ("local",)) -> dict[str, Any]:
    """A RayCluster as the chart's template has it, as far as the operator reads it."""
    ref = {"secretKeyRef": {"name": "fastserve-ray-token", "key": "auth_token"}}
    env = [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": ref}]

    def pod() -> dict[str, Any]:
        return {"spec": {"containers": [{"image": image, "env": json.loads(json.dumps(env))}]}}

    groups = [
        {
            "groupName": profile,
            "minReplicas": 0,
            "maxReplicas": most,
            "labels": {"fastserve.dev/profile": profile},
            "template": pod(),
        }
        for profile in profiles
    ]
    options = {"version": "v2", "env": json.loads(json.dumps(env))}
    spec = {"autoscalerOptions": options, "headGroupSpec": {"template": pod()}, "workerGroupSpecs": groups}
    return {"metadata": {"labels": {"app.kubernetes.io/component": "ray"}}, "spec": spec}


class SeveralHeads(SmallCluster):
    """The objects, the store, and a Ray for each RayCluster."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rays: dict[str, Ray] = {}
        """By the RayCluster's name."""

        self.seconds = 0.0
        """What the operator takes for the time."""

        self.held: set[str] = set()
        """RayClusters whose head does not come up, for want of a machine."""

        self.crowded: set[str] = set()
        """RayClusters with a head, and without a machine for anything that is to start."""

        self.chart()
        data = {"auth_token": "czNjcmV0"}
        self.objects.put(f"{SECRETS}/fastserve-ray-token", {"metadata": {"name": "fastserve-ray-token"}, "data": data})

    def chart(self, **more: Any) -> None:
        """Install the chart, or upgrade it."""
        value = {"metadata": {"name": "fastserve-ray"}, "data": {TEMPLATE_KEY: json.dumps(template(**more))}}
        self.objects.put(TEMPLATE, value)

    def operator(self) -> Namespace:
        """A process that has just started; what one before it had in mind is lost."""
        api = Api(self.objects, self.moments).acting_only_while(self.acts)
        home = KubeHome(api, "demo", self.folder / "scratch", str(self.folder / "store"))
        home.create()
        gateway = KubeGateway(api, "demo", None, addresses=lambda _: [])
        heads = RayClusters(api, "demo", "fastserve-ray", "python", lambda _, service: (f"http://{service}",) * 2)
        cluster = KubeCluster(api, home, heads, gateway, clock=lambda: self.seconds)
        cluster.store = CountedStore(self.folder / "store", self.moments)
        return Namespace(api, "demo", cluster, self.acts)

    def clusters(self, pool: str = "") -> list[str]:
        """Names of the RayClusters there are; of one pool where one is named: `shared`, or a Model's name."""
        found = {path.rpartition("/")[2]: item for path, item in self.objects.objects.items() if CLUSTERS in path}
        return sorted(
            name
            for name, item in found.items()
            if pool in ("", item["metadata"]["labels"].get("fastserve.dev/model", "shared"))
        )

    def kube_ray(self) -> None:
        """Bring up the heads that are asked for, and end those whose RayCluster is gone."""
        names = self.clusters()
        self.rays = {name: ray for name, ray in self.rays.items() if name in names}
        for name in names:
            if name in self.held or name in self.rays:
                continue
            self.rays[name] = Ray()
            found = self.objects.objects[f"{CLUSTERS}/{name}"]
            status = {"state": "ready", "head": {"serviceName": name}}
            self.objects.put(f"{CLUSTERS}/{name}", {**found, "status": status})

    def go_on(self) -> None:
        """What is under way gets done."""
        self.kube_ray()
        for name, ray in self.rays.items():
            if name not in self.crowded:
                ray.go_on()

    def call(self, rest: RayRest, *words: Any, **more: Any) -> Any:
        """In the place of `RayRest.call`."""
        ray = self.rays.get(rest._url.removeprefix("http://"), Ray())
        ray.moments = self.moments
        ray.down += int(rest._url.removeprefix("http://") not in self.rays)
        return ray.call(rest, *words, **more)

    def targets(self, model: str) -> list[str]:
        """URLs at which the gateway was told that a model answers."""
        orders = json.loads(self.objects.objects[ORDERS]["data"]["config.json"])["models"]
        revisions = orders.get(model, {}).get("revisions", [])
        return [target["url"] for revision in revisions for target in revision["targets"] if revision["weight"] > 0]

    def answers(self, url: str) -> bool:
        """Whether a request to that URL would be answered."""
        name, _, path = url.removeprefix("http://").partition("/m/")
        model, digest, profile = path.split("/")
        ray = self.rays.get(name)
        app = None if ray is None else ray.apps.get(f"{model}-{digest}-{profile}")
        return app is not None and app["status"] == "RUNNING"


@contextmanager
def several_heads(folder: Path) -> Iterator[SeveralHeads]:
    """A cluster in a folder; while the block runs, every Ray head that is called is one of its own."""
    found = SeveralHeads(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayRest, "call", lambda rest, *words, **more: found.call(rest, *words, **more))
        yield found

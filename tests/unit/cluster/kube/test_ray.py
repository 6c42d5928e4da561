from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from kube_objects import KubeObjects

from fastserve.cluster.kube.api import KubeApi
from fastserve.cluster.kube.ray import GivenRay, RayClusterHead
from fastserve.cluster.nodes import Machine, with_promised
from fastserve.errors import ClusterFailed

CLUSTER = "/apis/ray.io/v1/namespaces/demo/rayclusters/fastserve"
SECRETS = "/api/v1/namespaces/demo/secrets"


def ray(objects: KubeObjects, service: str | None = "fastserve-head-svc", **spec: Any) -> None:
    status = {"head": {"serviceName": service}} if service else {}
    objects.put(CLUSTER, {"metadata": {"name": "fastserve"}, "spec": spec, "status": status})


def secret(objects: KubeObjects, name: str, key: str) -> None:
    data = {key: base64.b64encode(b"s3cret\n").decode()}
    objects.put(f"{SECRETS}/{name}", {"metadata": {"name": name}, "data": data})


def test_the_head_is_found_by_its_service_and_the_token_by_its_secret(api: KubeApi, objects: KubeObjects) -> None:
    ray(objects, authOptions={"mode": "token"})
    secret(objects, "fastserve", "auth_token")
    endpoint = RayClusterHead(api, "demo", "fastserve", "python").load()
    assert endpoint is not None
    assert endpoint.dashboard_url == "http://fastserve-head-svc.demo.svc:8265"
    assert endpoint.serve_url == "http://fastserve-head-svc.demo.svc:8000"
    assert (endpoint.serve_port, endpoint.token, endpoint.python) == (8000, "s3cret", "python")


def test_a_token_may_come_from_a_secret_of_any_name(api: KubeApi, objects: KubeObjects) -> None:
    ray(objects, authOptions={"mode": "token", "secretName": "mine"})
    secret(objects, "mine", "auth_token")
    found = RayClusterHead(api, "demo", "fastserve", "python").load()
    assert found is not None
    assert found.token == "s3cret"


def test_a_token_may_come_from_the_containers_environment(api: KubeApi, objects: KubeObjects) -> None:
    env = [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "old", "key": "t"}}},
    ]
    ray(objects, headGroupSpec={"template": {"spec": {"containers": [{"env": env}]}}})
    secret(objects, "old", "t")
    found = RayClusterHead(api, "demo", "fastserve", "python").load()
    assert found is not None
    assert found.token == "s3cret"


def test_an_open_cluster_is_refused(api: KubeApi, objects: KubeObjects) -> None:
    ray(objects)
    with pytest.raises(ClusterFailed, match="asks for no token"):
        RayClusterHead(api, "demo", "fastserve", "python").load()


def test_no_cluster_is_not_one_that_does_not_answer(api: KubeApi, objects: KubeObjects) -> None:
    head = RayClusterHead(api, "demo", "fastserve", "python")
    assert head.load() is None
    with pytest.raises(ClusterFailed, match="no RayCluster named fastserve in namespace demo"):
        head.start()
    ray(objects, service=None, authOptions={"mode": "token"})
    with pytest.raises(ClusterFailed, match="no head service yet"):
        head.load()
    objects.down = True
    with pytest.raises(ClusterFailed, match="503"):
        head.load()


def test_a_missing_secret_is_named(api: KubeApi, objects: KubeObjects) -> None:
    ray(objects, authOptions={"mode": "token"})
    with pytest.raises(ClusterFailed, match="Secret fastserve with the key auth_token"):
        RayClusterHead(api, "demo", "fastserve", "python").load()


def test_a_given_head_reads_its_token_anew(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("one\n")
    head = GivenRay("http://ray:8265/", token, None, "python")
    assert (head.load().token, head.load().serve_url) == ("one", "http://ray:8000")
    token.write_text("two\n")
    assert head.start().token == "two"
    token.unlink()
    with pytest.raises(ClusterFailed, match="--ray-token-file"):
        head.load()


@pytest.mark.parametrize("address", ["ray:8265", "ftp://ray", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ClusterFailed, match="--ray-address"):
        GivenRay(address, None, None, "python")


def test_a_group_that_may_grow_promises_machines(api: KubeApi, objects: KubeObjects) -> None:
    def group(profile: str, most: int, **limits: str) -> dict[str, Any]:
        pod = {"containers": [{"resources": {"limits": limits}}]}
        labels = {"fastserve.dev/profile": profile} if profile else {}
        return {"groupName": "g", "maxReplicas": most, "labels": labels, "template": {"spec": pod}}

    groups = [group("l4", 2, cpu="8", **{"nvidia.com/gpu": "1"}), group("small", 1, cpu="500m"), group("", 3, cpu="4")]
    ray(objects, authOptions={"mode": "token"}, workerGroupSpecs=groups)
    secret(objects, "fastserve", "auth_token")
    endpoint = RayClusterHead(api, "demo", "fastserve", "python").load()
    assert endpoint is not None
    l4, small = Machine("l4", 8.0, 1.0), Machine("small", 0.5, 0.0)
    assert endpoint.promised == (l4, l4, small)
    alive = Machine("l4", 7.5, 1.0)
    assert with_promised([alive, Machine("", 2.0, 0.0)], endpoint.promised) == [alive, Machine("", 2.0, 0.0), l4, small]
    assert with_promised([alive, alive, alive], endpoint.promised[:2]) == [alive, alive, alive]


@pytest.mark.parametrize(("said", "cpus"), [("8", 8), (8, 8), ("500m", 0.5), ("1k", 1000), ("2.5", 2.5), ("1e1", 10)])
def test_amounts_are_read_as_kubernetes_writes_them(
    api: KubeApi, objects: KubeObjects, said: object, cpus: float
) -> None:
    pod = {"spec": {"containers": [{"resources": {"limits": {"cpu": said, "nvidia.com/gpu": said}}}]}}
    group = {"groupName": "l4", "labels": {"fastserve.dev/profile": "l4"}, "maxReplicas": 1, "template": pod}
    ray(objects, authOptions={"mode": "token"}, workerGroupSpecs=[group])
    secret(objects, "fastserve", "auth_token")
    found = RayClusterHead(api, "demo", "fastserve", "python").load()
    assert found is not None
    assert found.promised == (Machine("l4", cpus, cpus),)


def test_an_amount_that_is_none_is_said(api: KubeApi, objects: KubeObjects) -> None:
    pod = {"spec": {"containers": [{"resources": {"limits": {"cpu": "many"}}}]}}
    ray(objects, authOptions={"mode": "token"}, workerGroupSpecs=[{"groupName": "l4", "template": pod}])
    secret(objects, "fastserve", "auth_token")
    with pytest.raises(ClusterFailed, match="asks for 'many'"):
        RayClusterHead(api, "demo", "fastserve", "python").load()

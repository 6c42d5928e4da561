"""Machines, nodes and heads that are lost, and pods and RayClusters that are replaced, while somebody asks; nobody is
told so.

One story on one cluster of its own, in this order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from images import VERSION, Image
from installation import CHART, NAMESPACE, Crowd, Installation, installed
from whole_cluster import WholeCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

MANIFEST = """apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: tiny}
spec: {source: "file:///store/inputs/model", serve: {}}
"""

LEARNS = """apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: learns}
spec:
  source: file:///store/inputs/model
  train:
    method: full
    dataset: file:///store/inputs/train.jsonl
    steps: 200
    batchTokens: 2048
    maxLength: 64
    checkpoint: {everySteps: 10}
"""
KEPT_STEP = 20
"""The head of a run is lost once a checkpoint of this step is there."""


@pytest.fixture(scope="module")
def there(cluster: WholeCluster, pod_images: list[Image]) -> Iterator[Installation]:
    """A model that is served, on two nodes of which the second has nothing to do yet."""
    with installed(cluster, pod_images, "tiny") as made:
        made.kubectl("apply", "-f", "-", text=MANIFEST)
        made.until_ready("tiny")
        cluster.add_node(1)
        yield made


def test_an_upgrade_of_the_chart_and_its_rollback_lose_nothing(there: Installation) -> None:
    """Every pod of operator and gateway is replaced, and Ray's pods stay."""
    ours = ("operator", "gateway")
    before, machines = {part: set(there.running(part)) for part in ours}, set(there.running("ray-worker"))
    helm = (there.cluster.binaries["helm"],)
    more = [word for part in ours for word in ("--set", f"{part}.resources.requests.memory=65Mi")]
    steps = (
        ("upgrade", "fastserve", str(CHART), "-n", NAMESPACE, "--reuse-values", *more, "--wait"),
        ("rollback", "fastserve", "-n", NAMESPACE, "--wait"),
    )
    with Crowd().asking(there, "tiny") as crowd:
        for step in steps:
            crowd.until_answered(there)
            done = there.cluster.run(*helm, *step)
            assert done.returncode == 0, done.stderr
            for part in ours:
                there.kubectl("rollout", "status", f"deployment/fastserve-{part}", "--timeout=300s")
            crowd.until_answered(there)
    assert crowd.lost == []
    for part in ours:
        assert not before[part] & set(there.running(part)), f"pods of the {part} from before"
    assert machines <= set(there.running("ray-worker"))


def test_a_lost_head_comes_back_with_what_it_served(there: Installation) -> None:
    (head,) = there.running("ray-head")
    with Crowd().asking(there, "tiny") as crowd:
        crowd.until_answered(there)
        there.kubectl("delete", "pod", head, "--grace-period=0", "--force")
        there.cluster.until(lambda: there.running("ray-head") not in ([head], []), "another head")
        there.until_ready("tiny")
        crowd.until_answered(there)
    assert crowd.lost == []


def test_a_lost_machine_and_a_lost_node_are_replaced(there: Installation) -> None:
    """What serves goes to the second node when its pod is deleted, and comes back when that node dies."""
    cluster = there.cluster
    cluster.kubectl("cordon", "node0")
    with Crowd().asking(there, "tiny") as crowd:
        crowd.until_answered(there)
        for name in machines_on(there, "node0"):
            there.kubectl("delete", "pod", name, "--grace-period=0", "--force")
        cluster.until(lambda: not machines_on(there, "node0"), "the machine on node0 is gone")
        cluster.until(lambda: bool(machines_on(there, "node1")), "a machine on node1")
        there.until_ready("tiny")
        crowd.until_answered(there)
        cluster.kubectl("uncordon", "node0")
        cluster.lose_node(1)
        cluster.until(lambda: not cluster.is_ready("node1"), "the loss of node1 is seen")
        cluster.kubectl("delete", "node", "node1")  # as a cloud does with a machine that is gone
        cluster.until(lambda: bool(machines_on(there, "node0")), "a machine on the node that is left")
        there.until_ready("tiny")
        crowd.until_answered(there)
    assert crowd.lost == []


def test_another_image_and_shape_of_machine_replace_the_ray_cluster(there: Installation) -> None:
    """The image is the same one under its other name. The only node has no machine for it, until another one joins."""
    (old,) = ray_clusters(there, "shared")
    with Crowd().asking(there, "tiny") as crowd:
        crowd.until_answered(there)
        upgrade(there)
        there.cluster.until(lambda: len(ray_clusters(there, "shared")) == 2, "another RayCluster is made")
        (new,) = set(ray_clusters(there, "shared")) - {old}
        there.cluster.until(lambda: waits_for(there, new, "Insufficient cpu"), "it says what it waits for")
        assert is_at(there, old)
        crowd.until_answered(there)
        there.cluster.add_node(2)
        there.cluster.until(lambda: is_at(there, new), "requests go to the new RayCluster")
        crowd.until_answered(there)
    assert crowd.lost == []


def test_a_model_gets_a_ray_cluster_of_its_own(there: Installation) -> None:
    """It is asked for before the model has left the RayCluster that was replaced."""
    before = ray_clusters(there, "shared")[-1]
    with Crowd().asking(there, "tiny") as crowd:
        there.kubectl("patch", "model", "tiny", "--type=merge", "--patch", '{"spec": {"cluster": "dedicated"}}')
        there.cluster.until(lambda: len(ray_clusters(there, "tiny")) == 1, "its own is made")
        (own,) = ray_clusters(there, "tiny")
        there.cluster.until(lambda: ray_clusters(there, "shared") == [before], "the old RayCluster is given up")
        there.cluster.until(lambda: is_at(there, own), "requests go to its own")
        there.until_ready("tiny")
        crowd.until_answered(there)
    assert crowd.lost == []
    there.kubectl("delete", "model", "tiny", "--timeout=180s")
    there.cluster.until(lambda: ray_clusters(there, "tiny") == [], "its RayCluster goes with it")
    there.cluster.until(lambda: pods_of(there, own) == [], "no pod of it is left")
    assert ray_clusters(there, "shared") == [before]


def test_training_goes_on_from_its_checkpoint_after_the_head_is_lost(there: Installation) -> None:
    (cluster,) = ray_clusters(there, "shared")
    there.kubectl("apply", "-f", "-", text=LEARNS)
    there.cluster.until(lambda: kept_step(there) >= KEPT_STEP, "a checkpoint is kept")
    head = f"ray.io/cluster={cluster},ray.io/node-type=head"
    there.kubectl("delete", "pod", "-l", head, "--grace-period=0", "--force")
    steps: list[float] = []

    def is_trained() -> bool:
        steps.extend(later_steps(there))
        return there.is_ready("learns")

    there.cluster.until(is_trained, "another attempt has trained it")
    assert min(steps) >= KEPT_STEP, "a step that was kept was taken again"
    (record,) = train_folder(there).glob("record.json")
    assert json.loads(record.read_text())["attempt"] > 1


def upgrade(there: Installation) -> None:
    """`helm upgrade` with another image and shape of `local`: no node has room for it beside one from before."""
    profile = {"name": "local", "cpus": max(1, (os.cpu_count() or 2) - 1), "memory": "5Gi", "min": 0, "max": 2}
    changes = ("--set-json", f"ray.profiles=[{json.dumps(profile)}]", "--set-string", f"ray.image.tag={VERSION}")
    release = ("upgrade", "fastserve", str(CHART), "-n", NAMESPACE, "--reuse-values", "--set", "ray.image.digest=")
    done = there.cluster.run(there.cluster.binaries["helm"], *release, *changes)
    assert done.returncode == 0, done.stderr


def ray_clusters(there: Installation, pool: str) -> list[str]:
    """Names of the RayClusters of a pool that stay, the oldest first: `shared`, or a model's name."""
    found = there.cluster.items(f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayclusters")
    mine = [
        item["metadata"]
        for item in found
        if item["metadata"]["labels"].get("fastserve.dev/model", "shared") == pool
        and "deletionTimestamp" not in item["metadata"]
    ]
    return [item["name"] for item in sorted(mine, key=lambda item: str(item["creationTimestamp"]))]


def is_at(there: Installation, name: str) -> bool:
    """Whether all requests go to one RayCluster."""
    found = there.cluster.get(f"/api/v1/namespaces/{NAMESPACE}/configmaps/fastserve-gateway")
    revisions = json.loads(found["data"]["config.json"])["models"]["tiny"]["revisions"]
    urls = [target["url"] for revision in revisions for target in revision["targets"]]
    return bool(urls) and all(url.startswith(f"http://{name}-") for url in urls)


def waits_for(there: Installation, name: str, words: str) -> bool:
    """Whether the model says that it moves to a RayCluster, and what that one lacks."""
    conditions = there.model("tiny")["status"]["conditions"]
    (told,) = (item["message"] for item in conditions if item["type"] == "Serve")
    return f"It moves to RayCluster {name}" in told and words in told


def pods_of(there: Installation, name: str) -> list[dict[str, Any]]:
    """Pods of a RayCluster."""
    return [pod for pod in there.pods() if pod["metadata"]["labels"].get("ray.io/cluster") == name]


def train_folder(there: Installation) -> Path:
    """What the store has of the only training."""
    (found,) = (there.inputs.parent / NAMESPACE / "artifacts/train").iterdir()
    return found


def kept_step(there: Installation) -> int:
    """Step of the newest whole checkpoint; 0 before the first one."""
    markers = (there.inputs.parent / NAMESPACE / "artifacts/train").glob("*/checkpoints/*/checkpoint.json")
    return max((int(marker.parent.name) for marker in markers), default=0)


def later_steps(there: Installation) -> list[float]:
    """Where each attempt but the first says that it is; nothing before its first step."""
    told = [json.loads(place.read_text()) for place in train_folder(there).glob("attempts/[!1]/workers.json")]
    return [item["done"] for item in told if item["unit"] == "steps"]


def machines_on(there: Installation, node: str) -> list[str]:
    """Ray's workers on a node that are ready."""
    ready = there.running("ray-worker")
    return [
        pod["metadata"]["name"]
        for pod in there.pods("ray-worker")
        if pod["spec"].get("nodeName") == node and pod["metadata"]["name"] in ready
    ]

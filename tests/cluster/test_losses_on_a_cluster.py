"""Machines, nodes and heads that are lost, and pods that are replaced, while somebody asks; nobody is told so.

One story on one cluster of its own, in this order.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from images import Image
from installation import CHART, NAMESPACE, Crowd, Installation, installed
from whole_cluster import WholeCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

MANIFEST = """apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: tiny}
spec: {source: "file:///store/inputs/model", serve: {}}
"""


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


def machines_on(there: Installation, node: str) -> list[str]:
    """Ray's workers on a node that are ready."""
    ready = there.running("ray-worker")
    return [
        pod["metadata"]["name"]
        for pod in there.pods("ray-worker")
        if pod["spec"].get("nodeName") == node and pod["metadata"]["name"] in ready
    ]

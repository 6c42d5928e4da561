"""How long it takes from `helm install` and `kubectl apply` to the first token, and what of it takes how long.

Images are on the node. A line for each mark: `PYTHONPATH=tests/kube:tests/e2e python tests/cluster/first_token.py`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from images import Image, operator_image, ray_image
from installation import Installation, install, make_inputs, prepare
from kubernetes_binaries import present_node
from whole_cluster import WholeCluster, whole_cluster

SMALLEST = """apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: first}
spec: {source: "file:///store/inputs/model", serve: {}}
"""
LIMIT_SECONDS = 400


def first_token(cluster: WholeCluster, images: list[Image]) -> dict[str, float]:
    """Install the chart on a cluster without it, apply the smallest manifest, and ask until it answers.

    Returns when each mark was first seen, in seconds since `helm install` was called, in order.
    """
    store = make_inputs(cluster.folder / "store")
    for image in images:
        cluster.bring(image.archive)
    prepare(cluster, store)
    there = Installation(cluster, store / "inputs")
    start = time.monotonic()
    seen: dict[str, float] = {}
    install(cluster, images)
    seen["helm install returned"] = time.monotonic() - start
    there.kubectl("apply", "-f", "-", text=SMALLEST)
    there.make_key("team", "first")
    marks: dict[str, Callable[[], bool]] = {
        "operator runs": lambda: bool(there.running("operator")),
        "gateway ready": lambda: bool(there.running("gateway")),
        "head ready": lambda: bool(there.running("ray-head")),
        "source stage done": lambda: _is_true(there, "Source"),
        "worker asked for": lambda: bool(there.pods("ray-worker")),
        "worker ready": lambda: bool(there.running("ray-worker")),
        "Ready": lambda: there.is_ready("first"),
    }
    while marks and time.monotonic() - start < LIMIT_SECONDS:
        for mark in [mark for mark, is_there in marks.items() if is_there()]:
            seen[mark] = time.monotonic() - start
            del marks[mark]
        time.sleep(0.1)
    answer = there.ask("first", max_tokens=1)
    answer.raise_for_status()
    seen["first token"] = time.monotonic() - start
    return dict(sorted(seen.items(), key=lambda item: item[1]))


def _is_true(there: Installation, stage: str) -> bool:
    conditions = (there.model("first").get("status") or {}).get("conditions") or []
    return any((item["type"], item["status"]) == (stage, "True") for item in conditions)


def measured() -> dict[str, float]:
    """`first_token` on a cluster of its own. Raises RuntimeError where a node's programs are missing."""
    binaries = present_node()
    if binaries is None:
        raise RuntimeError("a node's programs are missing: `python tests/kube/kubernetes_binaries.py node`")
    with tempfile.TemporaryDirectory() as folder:
        images = [operator_image(Path(folder)), ray_image(Path(folder))]
        with whole_cluster(binaries, str(shutil.which("go"))) as cluster:
            return first_token(cluster, images)


if __name__ == "__main__":
    for mark, seconds in measured().items():
        sys.stdout.write(f"{mark}\t{seconds:.1f} s\n")

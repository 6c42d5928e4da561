"""Models that ask for the same thing: it is made once, by one of them, and each goes its own way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from model_files import write_model
from small_cluster import SmallCluster, small_cluster

from fastserve_operator.model import Namespace

MODELS = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models"
NAMES = ("chat", "chat-b", "small")
"""One name begins as another one does."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SmallCluster]:
    write_model(tmp_path / "source")
    with small_cluster(tmp_path) as found:
        yield found


def ask(cluster: SmallCluster, name: str) -> None:
    spec = {"source": f"file://{cluster.folder}/source", "serve": {"context": 16}}
    value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": name}, "spec": spec}
    cluster.objects.put(f"{MODELS}/{name}", value)


def reason(cluster: SmallCluster, name: str) -> str:
    conditions = cluster.objects.objects[f"{MODELS}/{name}"].get("status", {}).get("conditions", [])
    return next((str(item["reason"]) for item in conditions if item["type"] == "Ready"), "")


def tend_until(tended: Namespace, cluster: SmallCluster, true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, f"never: {what}: {cluster.ray.jobs}"
        tended.tend()
        cluster.ray.go_on()
        time.sleep(0.005)


def attempts_of(cluster: SmallCluster) -> Counter[str]:
    """How many jobs there ever were of each stage and key."""
    return Counter("-".join(name.rsplit("-", 3)[1:3]) for name in cluster.ray.jobs)


def test_what_several_ask_for_at_once_is_made_once(cluster: SmallCluster) -> None:
    cluster.ray.holds = True
    for name in NAMES:
        ask(cluster, name)
    tended = cluster.operator()
    tend_until(tended, cluster, lambda: all(reason(cluster, name) == "Waiting" for name in NAMES), "all wait")
    for _ in range(5):
        tended.tend()
    (job,) = cluster.ray.jobs
    told = {name: cluster.objects.objects[f"{MODELS}/{name}"]["status"]["why"][0] for name in NAMES}
    maker = job.rsplit("-", 3)[0]
    assert [name for name, why in told.items() if f"of model {maker}, which asks for the same" not in why] == [maker]
    assert list(attempts_of(cluster).values()) == [1], cluster.ray.jobs
    tended = cluster.operator()  # another one knows no more than what is there
    tended.tend()
    assert list(attempts_of(cluster).values()) == [1], cluster.ray.jobs
    cluster.ray.holds = False
    tend_until(tended, cluster, lambda: all(reason(cluster, name) == "Ready" for name in NAMES), "all are served")
    assert list(attempts_of(cluster).values()) == [1], cluster.ray.jobs


@pytest.mark.parametrize("makes", [True, False])
def test_one_that_is_deleted_takes_nothing_from_the_others(cluster: SmallCluster, makes: bool) -> None:
    cluster.ray.holds = True
    for name in NAMES:
        ask(cluster, name)
    tended = cluster.operator()
    tend_until(tended, cluster, lambda: all(reason(cluster, name) == "Waiting" for name in NAMES), "all wait")
    (job,) = cluster.ray.jobs
    maker = job.rsplit("-", 3)[0]
    leaves = maker if makes else next(name for name in NAMES if name != maker)
    cluster.objects.delete(f"{MODELS}/{leaves}")
    tend_until(tended, cluster, lambda: f"{MODELS}/{leaves}" not in cluster.objects.objects, "it is gone")
    cluster.ray.holds = False
    stay = [name for name in NAMES if name != leaves]
    tend_until(tended, cluster, lambda: all(reason(cluster, name) == "Ready" for name in stay), "the others are served")
    # Whoever made it took it along; the rest agree on one of them to make it anew.
    assert list(attempts_of(cluster).values()) == [2 if makes else 1], cluster.ray.jobs

"""A Ray of several nodes with labels: workers find their profiles, a lost node costs little, a new one is taken in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_runs import Cluster, Run, Starter, curve, ray_cluster, store_with_a_model
from tiny_llama import write_rows

from fastserve.artifacts.checkpoints import newest_checkpoint
from fastserve.artifacts.store import Store
from fastserve.plan.stages import Stage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ROWS = 64
EVERY_STEPS = 10
STEPS = 498
BATCH_TOKENS = 1800
EPOCH_STEPS = 3
"""Batches that the rows below are cut into."""

NODES = """
import sys
import ray._private.utils as utils
from ray.cluster_utils import Cluster

cluster = Cluster(
    initialize_head=True,
    head_node_args=dict(num_cpus=0, include_dashboard=False, object_store_memory=100 << 20, temp_dir=sys.argv[1]),
)
nodes = {}
print(cluster.address, flush=True)
for line in sys.stdin:
    what, name, *profile = line.split()
    if what == "add":
        nodes[name] = cluster.add_node(
            num_cpus=1, object_store_memory=80 << 20, labels={"fastserve.dev/profile": profile[0]}
        )
    else:
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
    print("done", what, name, flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # All machines that there are can be had at once, so nobody needs to wait for a lost one to come back.
    with ray_cluster(NODES, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="6") as found:
        for name, profile in (("one", "small"), ("two", "large"), ("three", "large")):
            found.say(f"add {name} {profile}")
        yield found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_with_a_model(tmp_path_factory)


@pytest.fixture
def run(cluster: Cluster, store: Store, tmp_path: Path) -> Iterator[Run]:
    starter = Starter(cluster, store, tmp_path)
    section = {
        "method": "full",
        "precision": "fp32",
        "steps": STEPS,
        "batchTokens": BATCH_TOKENS,
        "maxLength": 256,
        "learningRate": 1e-3,
        "workers": [{"profile": "small", "count": 1}, {"profile": "large", "count": 2}],
        "elastic": {"minWorkers": 2},
        "checkpoint": {"everySteps": EVERY_STEPS},
    }
    yield starter.start("c", write_rows(tmp_path / "rows.jsonl", ROWS), section)
    starter.end()


def test_a_lost_node_is_done_without_and_a_new_one_is_taken_in(cluster: Cluster, store: Store, run: Run) -> None:
    run.until(lambda: run.done() >= 2 * EVERY_STEPS + 3 and run.profiles() == ["large", "large", "small"])
    assert run.progress()["metrics"]["proof"]["gradientError"] <= 2e-6
    run.until(lambda: len(run.losses()) > 2 * EVERY_STEPS)
    run.until(lambda: (newest_checkpoint(store, Stage.TRAIN, run.request.key) or 0) >= 2 * EVERY_STEPS)
    before = run.losses()
    cluster.say("remove three")
    run.until(lambda: run.profiles() == ["large", "small"])
    run.until(lambda: len(run.losses()) > max(before) + 2)
    between = run.losses()
    cluster.say("add four large")
    run.until(lambda: run.profiles() == ["large", "large", "small"])
    record = run.record()
    rows = curve(store, record)
    # Every step once, and with it every sample; a step that was done again gave the same.
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    losses = {row["step"]: row["loss"] for row in rows}
    for earlier in (before, between):
        assert [losses[step] for step in earlier] == pytest.approx(list(earlier.values()), abs=2e-6)
    # An epoch's batches are the data set, whoever computed them.
    tokens = [row["tokens"] for row in rows]
    epochs = [sum(tokens[begin : begin + EPOCH_STEPS]) for begin in range(0, STEPS, EPOCH_STEPS)]
    assert len(epochs) == STEPS // EPOCH_STEPS
    assert len(set(epochs)) == 1
    assert epochs[0] > (EPOCH_STEPS - 1) * BATCH_TOKENS
    sharing = record.metrics["sharing"]
    assert sharing["restarts"] >= 2
    # What came after the newest checkpoint; the one that was on its way may be lost, too.
    assert sharing["lostSteps"] <= sharing["restarts"] * 2 * EVERY_STEPS

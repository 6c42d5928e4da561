"""Training and serving on one Ray: a run gives a machine up for a replica, and takes it back when the replica is gone.

The replica is an actor that wants a whole machine of a profile, as Serve's are; it waits in Ray's queue like them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_runs import Cluster, Run, Starter, alone, curve, ray_cluster, store_with_a_model
from tiny_llama import write_rows

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.plan.sharing import SHORT_SECONDS, Need, TrainingRun, Wish, share
from fastserve.plan.stages import Stage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ROWS = 64
STEPS = 420
BATCH_TOKENS = 1800
EPOCH_STEPS = 3
"""Batches that the rows are cut into."""

SECTION = {
    "method": "full",
    "precision": "fp32",
    "steps": STEPS,
    "batchTokens": BATCH_TOKENS,
    "maxLength": 256,
    "learningRate": 2e-4,
    "workers": [{"profile": "small", "count": 1}, {"profile": "large", "count": 1}],
    "elastic": {"minWorkers": 1},
    # None but those that a change of size makes: a step that is done twice would show.
    "checkpoint": {"everySteps": 1000},
}

NODES = """
import sys
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(
    initialize_head=True,
    head_node_args=dict(num_cpus=0, include_dashboard=False, object_store_memory=100 << 20, temp_dir=sys.argv[1]),
)
for profile in ("small", "large"):
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20, labels={"fastserve.dev/profile": profile})
ray.init(address=cluster.address, log_to_driver=False)


@ray.remote(num_cpus=1, label_selector={"fastserve.dev/profile": "large"})
class Replica:
    def up(self):
        return True


print(cluster.address, flush=True)
for line in sys.stdin:
    what = line.strip()
    if what == "want":
        replica = Replica.remote()
        up = replica.up.remote()
    elif what == "early":
        assert not ray.wait([up], timeout=0.5)[0], "there was a free machine all the time"
    elif what == "up":
        ray.get(up, timeout=60)
    else:
        ray.kill(replica)
    print("done", what, flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster(NODES) as found:
        yield found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_with_a_model(tmp_path_factory)


@pytest.fixture
def run(cluster: Cluster, store: Store, tmp_path: Path) -> Iterator[Run]:
    starter = Starter(cluster, store, tmp_path)
    yield starter.start("a", write_rows(tmp_path / "rows.jsonl", ROWS), SECTION)
    starter.end()


def test_a_run_lends_a_machine_and_takes_it_back_and_nothing_is_done_twice(
    cluster: Cluster, store: Store, run: Run, tmp_path: Path
) -> None:
    run.until(lambda: run.done() >= 5 and run.profiles() == ["large", "small"])
    cluster.say("want")
    cluster.say("early")
    now = time.time()
    needs = [Need("chat", "large", 0, 1, now - SHORT_SECONDS, priority=1)]
    [wish] = share([TrainingRun("tiny", 0, {"small": 1, "large": 1}, 1)], needs, now)
    assert wish is not None
    attempts.write_wish(store, Stage.TRAIN, run.request.key, 1, wish.to_json())
    cluster.say("up")
    lends = "training with 1 of 2 workers: training lends 1 machine of profile large to chat"
    run.until(lambda: run.profiles() == ["small"] and run.progress().get("note", "").startswith(lends))
    lent_at = run.done()
    run.until(lambda: run.done() >= lent_at + 5)
    lifted = Wish(None, "given back", time.time())
    attempts.write_wish(store, Stage.TRAIN, run.request.key, 1, lifted.to_json())
    cluster.say("end")
    run.until(lambda: run.profiles() == ["large", "small"] and run.progress().get("note") == "training")
    grown_at = int(run.done())
    record = run.record()
    rows = curve(store, record)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    sharing = record.metrics["sharing"]
    assert (sharing["restarts"], sharing["lostSteps"]) == (2, 0)
    assert sharing["proof"]["gradientError"] <= 2e-6
    # Every sample once an epoch, whoever computed it.
    tokens = [row["tokens"] for row in rows]
    epochs = [sum(tokens[begin : begin + EPOCH_STEPS]) for begin in range(0, STEPS, EPOCH_STEPS)]
    assert len(set(epochs)) == 1
    assert epochs[0] > (EPOCH_STEPS - 1) * BATCH_TOKENS
    (tmp_path / "calm").mkdir()
    most = min(STEPS, grown_at + 20)
    calm = alone(store, run.request, SECTION, tmp_path / "rows.jsonl", tmp_path / "calm", most)
    both = list(zip(rows, calm, strict=False))
    assert len(both) > grown_at
    assert [row["tokens"] for row, _ in both] == [row["tokens"] for _, row in both]
    assert [row["trainedTokens"] for row, _ in both] == [row["trainedTokens"] for _, row in both]
    assert [row["loss"] for row, _ in both[:30]] == pytest.approx([row["loss"] for _, row in both[:30]], abs=5e-6)
    # Sums in another order, and Adam makes whole steps of rounding where a gradient is nearly 0.
    assert [row["loss"] for row, _ in both] == pytest.approx([row["loss"] for _, row in both], abs=1e-3)

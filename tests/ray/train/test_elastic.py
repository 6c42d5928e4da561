"""A Ray of several nodes with labels: workers find their profiles, a lost node costs little, a new one is taken in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_rows, write_tiny_llama

from fastserve.artifacts import attempts, sources
from fastserve.artifacts.store import Store, open_store
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.source import Source

pytestmark = pytest.mark.ray

PLATFORM = Path(__file__).resolve().parents[3] / "platform"
SOURCE_KEY = "b" * 64
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


@dataclass(frozen=True)
class Cluster:
    """Nodes that come and go, in processes of their own."""

    address: str
    process: subprocess.Popen[str]
    environment: dict[str, str]

    def say(self, command: str) -> None:
        """`add NAME PROFILE` or `remove NAME`; returns when it is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        while True:
            line = self.process.stdout.readline()
            assert line, "the cluster's process ended"
            if line.startswith("done"):
                return


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(PLATFORM),
        "RAY_AUTH_MODE": "disabled",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    folder = Path("/tmp") / f"fs-nodes-{os.getpid()}"
    (folder / "ray").mkdir(parents=True)  # where Ray notes the address of the newest cluster, but does not make it
    process = subprocess.Popen(
        [sys.executable, "-c", NODES, str(folder / "ray")],
        env={**environment, "RAY_TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "Ray did not start"
        found = Cluster(address, process, {**environment, "RAY_ADDRESS": address})
        for name, profile in (("one", "small"), ("two", "large"), ("three", "large")):
            found.say(f"add {name} {profile}")
        yield found
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = open_store(str(tmp_path_factory.mktemp("store")))
    folder = tmp_path_factory.mktemp("source")
    write_tiny_llama(folder / "model", layers=4, hidden=64)
    request = StageRequest("tiny", Stage.SOURCE, SOURCE_KEY, 1, {})
    attempts.claim(store, request)
    attempts.commit(store, request, folder, {}, {})
    return store


@dataclass(frozen=True)
class Run:
    """One attempt, as a process of its own."""

    request: StageRequest
    store: Store
    process: subprocess.Popen[bytes]
    log: Path

    def progress(self) -> dict[str, Any]:
        """What the attempt has reported."""
        return attempts.read_progress(self.store, Stage.TRAIN, self.request.key, 1) or {}

    def done(self) -> float:
        """Steps done."""
        told = self.progress()
        return told["done"] if told.get("unit") == "steps" else 0

    def profiles(self) -> list[str]:
        """Profiles of the workers that take part now."""
        return sorted(worker["profile"] for worker in self.progress().get("metrics", {}).get("workers", []))

    def curve(self) -> dict[int, float]:
        """Losses so far, by step."""
        text = attempts.read_curve(self.store, Stage.TRAIN, self.request.key).decode()
        return {row["step"]: row["loss"] for row in map(json.loads, text.splitlines())}

    def until(self, reached: Callable[[], bool], timeout_seconds: float = 150) -> None:
        """Wait; the log is shown when the attempt ends or hangs before."""
        end = time.monotonic() + timeout_seconds
        while not reached():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"rc {self.process.poll()}, {self.progress()}:\n{self.log.read_text()[-6000:]}")
            time.sleep(0.1)


@pytest.fixture
def run(cluster: Cluster, store: Store, tmp_path: Path) -> Iterator[Run]:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    source = Source(uri=rows.as_uri())
    resolved = sources.resolve(source, role="data")
    section = {
        "dataset": {"uri": source.uri},
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
    request = StageRequest(
        "tiny",
        Stage.TRAIN,
        "c" * 64,
        1,
        section,
        {"model": SOURCE_KEY},
        {"model": Stage.SOURCE},
        {resolved.ident: resolved.digest},
    )
    assert attempts.claim(store, request)
    log = tmp_path / "stage.log"
    arguments = ["--store", store.uri, "--stage", "train", "--key", request.key, "--attempt", "1"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastserve.stages.entry", *arguments],
            env={**cluster.environment, "FASTSERVE_SCRATCH": str(tmp_path / "scratch")},
            stdout=stream,
            stderr=stream,
        )
    yield Run(request, store, process, log)
    if process.poll() is None:
        process.kill()
    process.wait()


def test_a_lost_node_is_done_without_and_a_new_one_is_taken_in(cluster: Cluster, store: Store, run: Run) -> None:
    run.until(lambda: run.done() >= 2 * EVERY_STEPS + 3 and run.profiles() == ["large", "large", "small"])
    assert run.progress()["metrics"]["proof"]["gradientError"] <= 2e-6
    run.until(lambda: len(run.curve()) > 2 * EVERY_STEPS)
    before = run.curve()
    cluster.say("remove three")
    run.until(lambda: run.profiles() == ["large", "small"])
    run.until(lambda: len(run.curve()) > max(before) + 2)
    between = run.curve()
    cluster.say("add four large")
    run.until(lambda: run.profiles() == ["large", "large", "small"])
    if run.process.wait(timeout=240) != 0:
        pytest.fail(run.log.read_text()[-6000:])
    record = attempts.find(store, Stage.TRAIN, run.request.key)
    assert record is not None
    text = (attempts.fetch(store, record) / "curve.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
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
    assert sharing["lostSteps"] <= sharing["restarts"] * EVERY_STEPS

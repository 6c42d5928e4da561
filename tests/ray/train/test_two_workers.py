"""Two real Ray Train workers: the same loss as one process, and no step lost or repeated when one of them is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_llama import write_rows, write_tiny_llama

from fastserve.artifacts import attempts, sources
from fastserve.artifacts.checkpoints import newest_checkpoint
from fastserve.artifacts.record import Record
from fastserve.artifacts.store import Store, open_store
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.source import Source

pytestmark = pytest.mark.ray

PLATFORM = Path(__file__).resolve().parents[3] / "platform"
SOURCE_KEY = "b" * 64
ROWS = 40
EVERY_STEPS = 10
STEPS = 200

RAY_HEAD = """
import sys, ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@dataclass(frozen=True)
class Cluster:
    """A Ray of our own, in a process of its own."""

    address: str
    process: subprocess.Popen[str]
    environment: dict[str, str]

    def workers(self) -> list[psutil.Process]:
        """The training workers that live now."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


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
    # Ray's sockets lie below its temporary folder, and their paths may be 107 bytes long.
    folder = Path("/tmp") / f"fs-ray-{os.getpid()}"
    process = subprocess.Popen(
        [sys.executable, "-c", RAY_HEAD, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    address = process.stdout.readline().strip()
    try:
        assert address, "Ray did not start"
        yield Cluster(address, process, {**environment, "RAY_ADDRESS": address})
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


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@dataclass(frozen=True)
class Run:
    """One attempt, as a process of its own."""

    request: StageRequest
    store: Store
    process: subprocess.Popen[bytes]
    log: Path

    def done(self) -> float:
        """Steps that the attempt has reported."""
        progress = attempts.read_progress(self.store, Stage.TRAIN, self.request.key, self.request.attempt)
        return 0 if progress is None or progress["unit"] != "steps" else progress["done"]

    def until(self, reached: Callable[[], bool], timeout_seconds: float = 180) -> None:
        """Wait; the log is shown when the attempt ends or hangs before."""
        end = time.monotonic() + timeout_seconds
        while not reached():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"rc {self.process.poll()}:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.1)

    def record(self) -> Record:
        """Wait for the end, which must be a committed artifact."""
        if self.process.wait(timeout=300) != 0:
            pytest.fail(self.log.read_text()[-4000:])
        record = attempts.find(self.store, Stage.TRAIN, self.request.key)
        assert record is not None
        return record


@pytest.fixture
def start(cluster: Cluster, store: Store, rows: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`start(key="c", attempt=1, workers=2)`: one attempt of the stage, as the cluster would start it."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(key: str, attempt: int = 1, workers: int = 2) -> Run:
        source = Source(uri=rows.as_uri())
        resolved = sources.resolve(source, role="data")
        section = {
            "dataset": {"uri": source.uri},
            "precision": "fp32",
            "steps": STEPS,
            "batchTokens": 600,
            "maxLength": 256,
            "learningRate": 1e-3,
            "lora": {"rank": 4},
            "workers": [{"profile": "local", "count": workers}],
            "checkpoint": {"everySteps": EVERY_STEPS},
        }
        request = StageRequest(
            "tiny",
            Stage.TRAIN,
            key * 64,
            attempt,
            section,
            {"model": SOURCE_KEY},
            {"model": Stage.SOURCE},
            {resolved.ident: resolved.digest},
        )
        assert attempts.claim(store, request)
        log = tmp_path / f"{key}-{attempt}.log"
        arguments = ["--store", store.uri, "--stage", "train", "--key", request.key, "--attempt", str(attempt)]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastserve.stages.entry", *arguments],
                env={**cluster.environment, "FASTSERVE_SCRATCH": str(tmp_path / "scratch")},
                stdout=stream,
                stderr=stream,
            )
        started.append(process)
        return Run(request, store, process, log)

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def curve(store: Store, record: Record) -> list[dict[str, Any]]:
    text = (attempts.fetch(store, record) / "curve.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def calm_curve() -> list[list[dict[str, Any]]]:
    """The curve of the undisturbed run, once it has run."""
    return []


def undisturbed(start: Callable[..., Run], store: Store, calm: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if not calm:
        calm.append(curve(store, start("c").record()))
    return calm[0]


def same_losses(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in one] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    assert [row["trainedTokens"] for row in one] == [row["trainedTokens"] for row in two]
    assert [row["loss"] for row in one[:30]] == pytest.approx([row["loss"] for row in two[:30]], abs=5e-6)
    # The batch is shared by what was measured, so sums are taken in other orders, and Adam turns rounding into whole
    # steps wherever a gradient is nearly 0; after 200 steps the last digits show it.
    assert one[-1]["loss"] == pytest.approx(two[-1]["loss"], abs=1e-3)


def test_two_workers_have_the_losses_of_one(
    start: Callable[..., Run], store: Store, calm_curve: list[list[dict[str, Any]]]
) -> None:
    two = undisturbed(start, store, calm_curve)
    one = curve(store, start("d", workers=1).record())
    same_losses(two, one)
    assert two[-1]["loss"] < two[0]["loss"]


def test_a_killed_worker_costs_nothing_but_time(
    cluster: Cluster, start: Callable[..., Run], store: Store, calm_curve: list[list[dict[str, Any]]]
) -> None:
    run = start("e")
    run.until(lambda: run.done() >= 2 * EVERY_STEPS)
    workers = cluster.workers()
    assert len(workers) == 2
    workers[-1].kill()
    record = run.record()
    assert record.attempt == 1
    sharing = record.metrics["sharing"]
    assert sharing["restarts"] == 1
    assert sharing["lostSteps"] <= EVERY_STEPS
    assert sharing["proof"]["gradientError"] <= 2e-6
    same_losses(curve(store, record), undisturbed(start, store, calm_curve))


def test_a_killed_stage_goes_on_from_its_checkpoint_in_the_next_attempt(
    cluster: Cluster, start: Callable[..., Run], store: Store, calm_curve: list[list[dict[str, Any]]]
) -> None:
    run = start("f")
    run.until(lambda: (newest_checkpoint(store, Stage.TRAIN, run.request.key) or 0) >= 2 * EVERY_STEPS)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    left = newest_checkpoint(store, Stage.TRAIN, run.request.key) or 0
    assert 0 < left < STEPS
    again = start("f", attempt=2)
    again.until(lambda: again.done() >= left)
    record = again.record()
    assert record.attempt == 2
    same_losses(curve(store, record), undisturbed(start, store, calm_curve))
    deadline = time.monotonic() + 30
    while cluster.workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert cluster.workers() == []

"""The operator killed 200 times at random moments, over whole pipelines on a real API server and a real Ray head.

Three replicas stand by, as a Deployment would keep them; the one that holds the Lease is killed, and another process is
started in its place. FASTSERVE_BENCH_KILLS sets how often.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench.figure import Figure
from tests.bench.operator_ground import Ground, ground

from fastserve.cluster.ray_head import Endpoint
from fastserve.cluster.ray_jobs import Jobs, JobState
from fastserve.cluster.ray_serve import ServeApi
from fastserve.spec.model import API_VERSION

KILLS = int(os.environ.get("FASTSERVE_BENCH_KILLS", "200"))
REPLICAS = 3
LEASE_SECONDS = 1
MOST_SECONDS = 1.5
"""Of a leader's life, from when it is seen to lead."""

END_SECONDS = 400.0
"""For what is under way when nobody is killed any more."""

MODELS = "/apis/fastserve.dev/v1alpha1/namespaces/default/models"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/default/leases/fastserve-operator"


class Pipelines:
    """One Model after the other, each with a seed of its own, so that each is trained, compressed and measured."""

    def __init__(self, cluster: Any, files: Path) -> None:
        self._cluster = cluster
        self._files = files
        self.names: list[str] = []

    def go_on(self) -> None:
        """Ask for the next one when the last one is ready."""
        if not self.names or self.ready() == len(self.names):
            number = len(self.names)
            spec = {
                "source": f"file://{self._files}/model",
                "train": {
                    "method": "lora",
                    "dataset": f"file://{self._files}/train.jsonl",
                    "epochs": 1,
                    "batchTokens": 512,
                    "maxLength": 64,
                    "seed": number,
                },
                "compress": [{"quantize": {"format": "int8"}}],
                "evaluate": {"data": f"file://{self._files}/held.jsonl"},
                **({"serve": {"context": 1024}} if number == 0 else {}),
            }
            value = {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": f"m{number}"}, "spec": spec}
            self._cluster.api.post(MODELS, json=value).raise_for_status()
            self.names.append(f"m{number}")

    def ready(self) -> int:
        """How many are."""
        told = [item.get("status", {}).get("conditions", []) for item in self._cluster.get(MODELS)["items"]]
        return sum(any((one["type"], one["status"]) == ("Ready", "True") for one in some) for some in told)


class Replicas:
    """The operator's processes."""

    def __init__(self, there: Ground) -> None:
        self._ground = there
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def fill(self) -> None:
        """Start what is missing."""
        while len(self._processes) < REPLICAS:
            process = self._ground.operator("--lease-seconds", str(LEASE_SECONDS))
            self._processes[process.pid] = process

    def kill(self, pid: int) -> bool:
        """SIGKILL. False when it is none of ours, or has ended."""
        process = self._processes.pop(pid, None)
        if process is None:
            return False
        process.kill()
        process.wait()
        return True

    def stop(self) -> None:
        """SIGTERM to all."""
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            process.wait(60)

    def leader(self, cluster: Any) -> int | None:
        """Process number of the one that the Lease names, where it is alive."""
        answer = cluster.api.get(LEASE)
        if not answer.is_success:
            return None
        words = str(answer.json()["spec"].get("holderIdentity") or "").split("_")
        pid = int(words[1]) if len(words) > 1 else 0
        return pid if pid in self._processes else None


def run() -> Iterator[Figure]:
    """About eight minutes for 200."""
    with ground() as there:
        from tiny import tiny_model, tiny_rows

        folder, cluster = there.folder, there.cluster
        tiny_model(folder / "model")
        tiny_rows(folder / "train.jsonl", 0, 64)
        tiny_rows(folder / "held.jsonl", 1000, 16)
        pipelines, replicas = Pipelines(cluster, folder), Replicas(there)
        try:
            yield from _measured(there, pipelines, replicas)
        finally:
            replicas.stop()


def _measured(there: Ground, pipelines: Pipelines, replicas: Replicas) -> Iterator[Figure]:
    began = time.monotonic()
    gaps = _kill(there.cluster, pipelines, replicas)
    yield Figure("operator killed at random moments", len(gaps), "times", f"{KILLS}", len(gaps) == KILLS)
    yield Figure("killed over", time.monotonic() - began, "s")
    yield Figure("without a leader, longest", max(gaps), "s")
    yield from _end(there.cluster, pipelines, there.folder, there.head)


def _kill(cluster: Any, pipelines: Pipelines, replicas: Replicas) -> list[float]:
    """Kill leaders; returns for each how long nobody led before it, in seconds."""
    moments, gaps = random.Random(7), []
    while len(gaps) < KILLS:
        replicas.fill()
        since = time.monotonic()
        while (leader := replicas.leader(cluster)) is None:
            if time.monotonic() > since + 120:
                raise RuntimeError("nobody leads")
            time.sleep(0.03)
        gaps.append(time.monotonic() - since)
        end = time.monotonic() + moments.uniform(0.0, MOST_SECONDS)
        pipelines.go_on()
        time.sleep(max(0.0, end - time.monotonic()))
        replicas.kill(leader)
    replicas.fill()
    return gaps


def _end(cluster: Any, pipelines: Pipelines, folder: Path, head: Endpoint) -> Iterator[Figure]:
    """What has become of it all."""
    wanted = len(pipelines.names)
    all_ready = _until(lambda: pipelines.ready() == wanted, END_SECONDS)
    yield Figure("pipelines begun, and ready in the end", pipelines.ready(), f"of {wanted}", "all", all_ready)
    begun: Counter[str] = Counter()
    for path in folder.glob("store/default/artifacts/*/*/attempts/*/progress.json"):
        begun["/".join(path.parts[-5:-3])] += 1
    records = list(folder.glob("store/default/artifacts/*/*/record.json"))
    yield Figure("stages that made an artifact", len(records), "")
    twice = sum(count > 1 for count in begun.values())
    yield Figure("stages that were begun twice", twice, "", "0", twice == 0)
    claims = len(list(folder.glob("store/default/artifacts/*/*/attempts/*/request.json")))
    yield Figure("attempts that were claimed and never begun", claims - sum(begun.values()), "")
    torn = [path for path in folder.glob("store/default/artifacts/*/*/attempts/*/files") if not _kept(path)]
    yield Figure("torn artifacts left", len(torn), "", "0", not torn)
    apps = ServeApi(head.dashboard_url, head.token).get()
    yield Figure("applications that Serve has", len(apps), "", "1", len(apps) == 1)
    cluster.kubectl("delete", "models", "--all", "--wait=false")
    gone = _until(lambda: not cluster.get(MODELS)["items"], END_SECONDS)
    yield Figure("all Models go when they are deleted", float(gone), "", "1", gone)
    left = _left(cluster, head)
    yield Figure("orphans left: objects, jobs, applications", len(left), ", ".join(left)[:200], "0", not left)


def _kept(files: Path) -> bool:
    """Whether a record names these files."""
    record = files.parents[2] / "record.json"
    return record.exists() and str(json.loads(record.read_text())["attempt"]) == files.parent.name


def _left(cluster: Any, head: Endpoint) -> list[str]:
    named = cluster.kubectl("get", "models,configmaps", "-n", "default", "-o", "name").stdout.split()
    objects = [name for name in named if "kube-root-ca.crt" not in name and "fastserve-gateway" not in name]
    ended = (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED)
    jobs = [name for name, job in Jobs(head.dashboard_url, head.token).all().items() if job.state not in ended]
    return [*objects, *jobs, *ServeApi(head.dashboard_url, head.token).get()]


def _until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True

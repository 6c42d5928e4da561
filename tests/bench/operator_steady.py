"""What the operator costs while nothing happens: many Models on a real API server, every one of them done.

Their one artifact lies in the store before the operator starts, so no Ray is needed and nothing but the operator's own
work is measured. FASTSERVE_BENCH_MODELS sets how many there are; `operator_many` has ten times as many.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from tests.bench.figure import Figure, below

from fastserve.artifacts import attempts, sources
from fastserve.artifacts.stores import open_store
from fastserve.plan.keys import outside, request_for
from fastserve.plan.stages import Stage
from fastserve.spec.load import read
from fastserve.spec.model import API_VERSION, Model

ROOT = Path(__file__).parents[2]
MODELS = int(os.environ.get("FASTSERVE_BENCH_MODELS", "1000"))
WARM_SECONDS = 70.0
"""A Model that is done is looked at anew a minute later: what that costs is part of what is measured."""

STEADY_SECONDS = 60.0
PROBES = 5
PATH = "/apis/fastserve.dev/v1alpha1/namespaces/default/models"


def run() -> Iterator[Figure]:
    """About three minutes."""
    yield from measured(MODELS, aims=True)


def measured(models: int, aims: bool) -> Iterator[Figure]:
    """Processor time, memory, and how long a change takes to be seen. aims: whether there is something to meet."""
    sys.path[:0] = [str(ROOT / "tests/kube"), str(ROOT / "tests/doubles")]
    from control_plane import control_plane
    from kubernetes_binaries import WHAT_TO_DO, present

    binaries = present()
    if binaries is None:
        raise SystemExit(f"needs {WHAT_TO_DO}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastserve-bench-")))
        cluster = stack.enter_context(control_plane(binaries))
        cluster.kubectl("apply", "-f", str(ROOT / "helm/fastserve/crds"))
        cluster.established("models.fastserve.dev")
        source = _made(folder)
        for number in range(models):
            cluster.api.post(PATH, json=_wish(f"m{number:05d}", source)).raise_for_status()
        began = time.monotonic()
        with _running(folder, cluster.kubeconfig):
            while _ready(cluster) < models:
                time.sleep(2 * models / 1000)  # to list them all is work for the API server, too
            yield Figure(f"{models} new models are ready after", time.monotonic() - began, "s")
        name = _post(cluster)
        with _running(folder, cluster.kubeconfig) as operator:
            yield Figure(f"among {models} models a new one is seen after a restart", _until_seen(cluster, name), "s")
            time.sleep(WARM_SECONDS)
            process = psutil.Process(operator.pid)
            before, at = process.cpu_times(), time.monotonic()
            time.sleep(STEADY_SECONDS)
            after, seconds = process.cpu_times(), time.monotonic() - at
            share = 100 * (after.user + after.system - before.user - before.system) / seconds
            seen = statistics.median(_until_seen(cluster, _post(cluster)) for _ in range(PROBES))
            for name, value, unit, limit in (
                (f"operator, {models} models steady", share, "% of a core", 5.0),
                (f"operator, {models} models", process.memory_info().rss / 1e6, "MB", 250.0),
                (f"a change among {models} models is seen after (median)", seen, "s", 5.0),
            ):
                yield below(name, value, unit, limit) if aims else Figure(name, value, unit)


def _made(folder: Path) -> str:
    """A source, and its artifact in the namespace's store; returns its URI."""
    from model_files import model_folder

    place = folder / "model"
    place.mkdir()
    for name, content in model_folder().items():
        (place / name).write_bytes(content)
    (model,) = read(json.dumps(_wish("any", f"file://{place}")))
    assert isinstance(model, Model)
    digests = {item.ident: sources.resolve(item.source, role=item.role).digest for item in outside(model)}
    store, request = open_store(str(folder / "store/default")), request_for(model, Stage.SOURCE, digests, 1)
    attempts.claim(store, request)
    attempts.commit(store, request, place, {}, {})
    return f"file://{place}"


def _wish(name: str, source: str) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": name}, "spec": {"source": source}}


@contextmanager
def _running(folder: Path, kubeconfig: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The operator, until the block ends."""
    words = [sys.executable, "-m", "fastserve_operator", "--namespace", "default"]
    words += ["--store", str(folder / "store"), "--scratch", str(folder / "scratch")]
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    with (
        open(folder / "operator.log", "ab") as log,
        subprocess.Popen(words, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


def _ready(cluster: Any) -> int:
    conditions = [item.get("status", {}).get("conditions", []) for item in cluster.get(PATH)["items"]]
    return sum(any(one["type"] == "Ready" and one["status"] == "True" for one in told) for told in conditions)


def _post(cluster: Any) -> str:
    """Ask for one more; returns its name, the last of all."""
    name = f"new-{time.monotonic_ns()}"
    cluster.api.post(PATH, json=_wish(name, "file:///there/is/nothing/here")).raise_for_status()
    return name


def _until_seen(cluster: Any, name: str) -> float:
    """Seconds until a Model has its first status."""
    began = time.monotonic()
    while not cluster.get(f"{PATH}/{name}").get("status"):
        time.sleep(0.02)
    return time.monotonic() - began

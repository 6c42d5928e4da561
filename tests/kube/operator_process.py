"""The operator as a process: started, killed, stopped for a while, and asked what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from control_plane import Cluster

LEASE_SECONDS = 3


class Ray(Protocol):
    """A Ray head that the operator is given."""

    dashboard_url: str
    token_path: Path

    @property
    def serve_url(self) -> str:
        """Of Serve's proxy."""

    @property
    def python(self) -> str:
        """What runs a stage."""


@dataclass
class Operator:
    """One operator at a time, and the namespace that it tends."""

    cluster: Cluster
    account: Path
    """Kubeconfig of the account that the chart gives the operator: it may no more than it needs."""

    namespace: str
    folder: Path
    head: Ray
    name: str = "operator"
    """Of its log and its scratch folder; the store is that of all operators of the folder."""

    _process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Start the process; it acts as soon as the lease of one that was killed is up."""
        words = [
            *(sys.executable, "-m", "fastserve_operator", "--namespace", self.namespace),
            *("--store", str(self.folder / "store"), "--scratch", str(self.folder / f"{self.name}-scratch")),
            *("--ray-address", self.head.dashboard_url, "--ray-token-file", str(self.head.token_path)),
            *("--serve-url", self.head.serve_url, "--stage-python", self.head.python),
            *("--lease-seconds", str(LEASE_SECONDS), "--gateway-admin-url", "http://127.0.0.1:9"),
        ]
        environment = {**os.environ, "KUBECONFIG": str(self.account)}
        with open(self.folder / f"{self.name}.log", "ab") as log:
            self._process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        assert self._process.poll() is None, f"it ended by itself: {self.log()[-2000:]}"
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: as on a machine that has come to a halt."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """SIGTERM, as Kubernetes sends it; it ends in time."""
        if self._process is not None and self._process.poll() is None:
            self.go_on()
            self._process.terminate()
            assert self._process.wait(300) == 0, self.log()[-2000:]

    def log(self) -> str:
        """What all of them said."""
        place = self.folder / f"{self.name}.log"
        return place.read_text() if place.exists() else ""

    def kubectl(self, *words: str, text: str | None = None, check: bool = True) -> str:
        """kubectl in this namespace."""
        return self.cluster.kubectl("-n", self.namespace, *words, text=text, check=check).stdout

    def apply(self, kind: str, name: str, spec: dict[str, Any]) -> None:
        """Apply an object."""
        value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        self.kubectl("apply", "-f", "-", text=json.dumps(value))

    def condition(self, what: str, kind: str = "Ready") -> dict[str, Any]:
        """A condition of an object; empty while there is none."""
        status = json.loads(self.kubectl("get", what, "-o", "json")).get("status", {})
        return next((item for item in status.get("conditions", []) if item["type"] == kind), {})

    def until(self, true: Callable[[], object], what: str, seconds: float) -> None:
        """Wait for something to become true. seconds: within what it usually does; a busy machine has five times that,
        and five minutes at least."""
        seconds = max(5 * seconds, 300.0)
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"after {seconds:.0f} s: {what}\n{self.log()[-3000:]}"
            time.sleep(0.2)

    def left(self) -> list[str]:
        """Objects of ours in the namespace, but for the gateway's, which are the namespace's own."""
        named = self.kubectl("get", "models,accesskeys,configmaps,secrets", "-o", "name").split()
        return [name for name in named if "kube-root-ca.crt" not in name and "fastserve-gateway" not in name]


def pipeline(files: Path) -> dict[str, Any]:
    return {
        "source": f"file://{files}/model",
        "train": {
            "method": "lora",
            "dataset": f"file://{files}/train.jsonl",
            "epochs": 1,
            "batchTokens": 512,
            "maxLength": 64,
        },
        "compress": [{"quantize": {"format": "int8"}}],
        "evaluate": {"data": f"file://{files}/held.jsonl"},
    }


def stages(operator: Operator) -> set[str]:
    """Stages that have an artifact; none has two."""
    found = [
        json.loads(path.read_text())["stage"] for path in operator.folder.glob("store/*/artifacts/*/*/record.json")
    ]
    assert len(set(found)) == len(found), f"a stage has two artifacts: {found}"
    return set(found)


def answered(operator: Operator, what: str) -> bool:
    """Whether an object was surveyed."""
    return operator.condition(what).get("reason") not in (None, "Surveying")


@contextlib.contextmanager
def tending(found: Operator) -> Iterator[Operator]:
    """An operator that leaves nothing behind in its namespace."""
    try:
        yield found
    finally:
        found.kubectl("delete", "models,accesskeys", "--all", "--wait=false", check=False)
        with contextlib.suppress(AssertionError):
            found.until(lambda: not found.kubectl("get", "models", "-o", "name"), "models are left", 30)
        found.stop()

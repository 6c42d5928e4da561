"""What benchmarks of the operator stand on: an API server without machines, a Ray head, operators as processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.cluster.home import Home
from fastserve.cluster.ray_head import Endpoint, RayHead

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Ground:
    """An API server that knows the definitions, and a head; all of it ends with the block that it was made for."""

    folder: Path
    cluster: Any
    home: Home
    head: Endpoint

    def operator(self, *words: str) -> subprocess.Popen[bytes]:
        """Start an operator of the namespace `default`. words: more of its arguments."""
        command = [sys.executable, "-m", "fastserve_operator", "--namespace", "default", *words]
        command += ["--store", str(self.folder / "store"), "--scratch", str(self.folder / "scratch")]
        command += ["--ray-address", self.head.dashboard_url, "--ray-token-file", str(self.head.token_path)]
        command += ["--serve-url", self.head.serve_url, "--stage-python", self.head.python]
        command += ["--gateway-admin-url", "http://127.0.0.1:9"]
        environment = {**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig)}
        with open(self.folder / "operator.log", "ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@contextmanager
def api_server() -> Iterator[tuple[Path, Any]]:
    """A folder, and an API server that knows the definitions."""
    sys.path[:0] = [str(ROOT / f"tests/{name}") for name in ("kube", "e2e", "doubles")]
    from control_plane import control_plane
    from kubernetes_binaries import WHAT_TO_DO, present

    binaries = present()
    if binaries is None:
        raise SystemExit(f"needs {WHAT_TO_DO}")
    with tempfile.TemporaryDirectory(prefix="fastserve-bench-") as folder, control_plane(binaries) as cluster:
        cluster.kubectl("apply", "-f", str(ROOT / "helm/fastserve/crds"))
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        yield Path(folder), cluster


@contextmanager
def ground() -> Iterator[Ground]:
    """The API server, and a Ray head."""
    with ExitStack() as stack:
        folder, cluster = stack.enter_context(api_server())
        home = Home(folder / "home")
        home.create()
        ray = RayHead(home.path)
        stack.callback(ray.stop)
        yield Ground(folder, cluster, home, ray.start())

"""The Ray head of one home: started as processes of its own, found again after a crash, and ended without a trace.

Everything listens on loopback alone and asks for a token; two homes on one machine do not meet. What a head needs to be
found again (ports, processes, scratch folder) stands in `cluster/ray.json` of the home before its first process starts.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fastserve.cluster.direct import ENGINES, ENGINES_VARIABLE
from fastserve.cluster.home import Home
from fastserve.cluster.nodes import PROFILE_LABEL, Machine
from fastserve.cluster.processes import (
    HOME_VARIABLE,
    LOOPBACK,
    PART_VARIABLE,
    Process,
    await_true,
    clean_environment,
    find,
    free_ports,
    kill_home,
)
from fastserve.errors import ClusterFailed
from fastserve.plan.facts import LOCAL

START_TRIES = 3
START_SECONDS = 90.0
"""Longest wait for one try; 8 s is usual on two idle cores, the rest is for a machine that is busy."""

STOP_SECONDS = 8.0
"""How long processes may take to end by themselves, so that a stage can remove its scratch folder."""

LEFTOVER_SECONDS = 2.0
"""The same for what is left of a head that died; most of it waits for a head that will not come back."""

IDLE = ("/gcs_server", "ray.scripts.scripts")
"""Parts of a head that keep nothing; asked to end, they take a second longer than all others."""

OBJECT_STORE_BYTES = 200_000_000
"""Room for objects that tasks hand to each other. Weights and rows never go this way, so it stays small."""

LOGICAL_CPUS = 64
"""What the scheduler counts. Replicas and workers of several revisions and stages must fit beside each other on a
laptop; how many threads each one uses is decided elsewhere."""

PART = "ray"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running head."""

    dashboard_url: str
    """Base of the Jobs and Serve REST APIs."""

    token_path: Path
    """File with the token that every call must carry; readable by its owner alone."""

    gcs_port: int
    serve_port: int
    """Where Serve's proxy answers, once applications are put."""

    temp_dir: Path
    """Sockets and logs of this head; removed when it stops."""

    pids: tuple[int, ...]
    """The first process of the head, which ends when any part of it does, and what was there when it had started."""

    @property
    def token(self) -> str:
        """The token itself."""
        return self.token_path.read_text().strip()

    @property
    def promised(self) -> tuple[Machine, ...]:
        """Machines that would come when they are asked for: none."""
        return ()

    @property
    def serve_host(self) -> str:
        """Address that Serve's proxy listens on."""
        return LOOPBACK

    @property
    def serve_url(self) -> str:
        """Base URL of Serve's proxy."""
        return f"http://{LOOPBACK}:{self.serve_port}"

    @property
    def python(self) -> str:
        """The interpreter that runs a stage: the one that runs this command."""
        return sys.executable


class RayHead:
    """Starts, finds and stops the Ray head of a home."""

    def __init__(self, home: Path) -> None:
        self._home = Home(home)
        self._found: tuple[Process, Endpoint] | None = None
        self._popen: _Detached | None = None

    @property
    def token_path(self) -> Path:
        """The home's token for its control plane."""
        return self._home.path / "cluster" / "token"

    def load(self) -> Endpoint | None:
        """The head that runs, also one that another command started; None when none does.

        The first look asks it whether it answers to the home's token; later ones only whether its process lives.
        """
        if self._found is not None and self._found[0].alive:
            return self._found[1]
        self._found = None
        saved = self._home.read_json("cluster/ray.json")
        if not saved or not saved.get("main"):
            return None
        main, endpoint = Process(**saved["main"]), self._endpoint(saved)
        # Slow to answer is not gone: only a token that is not ours, or a process that ended, makes it another head.
        if not main.alive or self._status(endpoint, "/api/version") in (401, 403):
            return None
        self._found = (main, endpoint)
        return endpoint

    def alive(self) -> bool:
        """Whether the head runs and answers now."""
        endpoint = self.load()
        return endpoint is not None and self._status(endpoint, "/api/version") == 200

    def start(self) -> Endpoint:
        """The head that runs, else a new one.

        Raises ClusterFailed, with the end of its log, when it does not come up.
        """
        endpoint = self.load()
        if endpoint is not None:
            return endpoint
        self._home.create()
        self._make_token()
        reasons = []
        for _ in range(START_TRIES):
            self._clear(LEFTOVER_SECONDS)  # what a killed command left half-started, or a head that died
            try:
                return self._start_once()
            except ClusterFailed as error:
                reasons.append(str(error))
        self._clear(LEFTOVER_SECONDS)
        raise ClusterFailed(
            f"the Ray head did not start in {START_TRIES} tries: {reasons[-1]}; see {self._log_path}, "
            "and run `fastserve up` again when the machine is less busy"
        )

    def stop(self) -> None:
        """End every process of the head and of what runs in it, and remove its scratch folder."""
        self._clear(STOP_SECONDS)

    def _clear(self, grace_seconds: float) -> None:
        self._found = None
        kill_home(self._home.id, PART, grace_seconds, idle=IDLE)
        if self._popen is not None:
            self._popen.wait()  # else it would stay in the process table as long as this command runs
            self._popen = None
        saved = self._home.read_json("cluster/ray.json")
        if saved:
            shutil.rmtree(saved["temp_dir"], ignore_errors=True)
            self._home.remove("cluster/ray.json")
        for left in Path("/tmp").glob(f"{self._prefix}*"):  # of a command that was killed before it noted the folder
            shutil.rmtree(left, ignore_errors=True)

    # -- starting --------------------------------------------------------------------------------------------------

    @property
    def _prefix(self) -> str:
        """How the names of this home's scratch folders begin."""
        return f"fastserve-{self._home.id[:8]}-"

    @property
    def _log_path(self) -> Path:
        return self._home.path / "logs" / "ray-head.log"

    def _make_token(self) -> None:
        if self.token_path.exists() and self.token_path.read_text().strip():
            return  # kept: a head that runs knows it
        handle = os.open(self.token_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))

    def _start_once(self) -> Endpoint:
        names = ("gcs", "dashboard", "agent_http", "agent_grpc", "metrics", "dashboard_metrics", "serve")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        # Ray makes unix sockets deep below this folder, and their whole path may have 107 characters.
        temp_dir = Path(tempfile.mkdtemp(prefix=self._prefix, dir="/tmp"))
        saved: dict[str, Any] = {"ports": ports, "temp_dir": str(temp_dir), "main": None, "pids": []}
        self._home.write_json("cluster/ray.json", saved)
        with open(self._log_path, "ab") as log:
            popen = _Detached(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *start_arguments(ports, temp_dir)],
                env=self._environment(temp_dir, ports["dashboard_metrics"]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=temp_dir,
            )
        self._popen = popen
        main = Process.of(popen.pid)
        endpoint = self._endpoint(saved)
        if main is None or not self._await_start(popen, endpoint):
            raise ClusterFailed(f"{self._last_words(popen)}")
        others = {process.pid for process in find(self._home.id, PART)} - {main.pid}
        saved |= {"main": main.to_json(), "pids": [main.pid, *sorted(others)]}
        self._home.write_json("cluster/ray.json", saved)
        endpoint = self._endpoint(saved)
        self._found = (main, endpoint)
        return endpoint

    def _await_start(self, popen: _Detached, endpoint: Endpoint) -> bool:
        def over() -> bool:
            if popen.poll() is not None:
                return True
            # Ray writes this file when all its parts run; before it the Jobs API takes jobs that nobody can start.
            return (endpoint.temp_dir / "ray_current_cluster").exists() and self._status(endpoint, "/api/jobs/") == 200

        return await_true(over, START_SECONDS) and popen.poll() is None

    def _last_words(self, popen: _Detached) -> str:
        how = (
            f"it ended with code {popen.returncode}"
            if popen.poll() is not None
            else f"it did not answer in {START_SECONDS:.0f}s"
        )
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        return f"{how} ({lines[-1][:200] if lines else 'it said nothing'})"

    def _environment(self, temp_dir: Path, dashboard_metrics_port: int) -> dict[str, str]:
        return clean_environment(
            {
                HOME_VARIABLE: self._home.id,
                PART_VARIABLE: PART,
                # Ray clobbers the environment that find() reads when it renames its processes, unless told not to.
                "SPT_NOENV": "1",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.token_path),
                # "Not a cluster over several machines": without it Ray replaces 127.0.0.1 by the machine's address.
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                "RAY_START_HOOK": "fastserve.cluster.ray_start.leave_out_client",
                "DASHBOARD_METRIC_PORT": str(dashboard_metrics_port),
                "RAY_TMPDIR": str(temp_dir),
                # Python's and vLLM's own sockets, which stay when their process is killed.
                "TMPDIR": os.environ.get("TMPDIR") or str(temp_dir),
                ENGINES_VARIABLE: str(temp_dir / ENGINES),
                "RAY_USAGE_STATS_ENABLED": "0",
                # Ray runs workers at nice 15; beside anything else on the machine they would starve.
                "RAY_worker_niceness": "0",
                # Ray kills a worker at 95 % of the machine's memory; the plan has counted the bytes already.
                "RAY_memory_usage_threshold": "0.98",
                # Ray would start an idle worker for each logical CPU as soon as the first driver connects.
                "RAY_prestart_worker_first_driver": "0",
                "RAY_enable_worker_prestart": "0",
                "RAY_agent_register_timeout_ms": "400000",
                # Replicas drain when their application is taken away; stopping the head is the end of all of them.
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
                # Tries of a replica that cannot start, before its application counts as failed; Ray's own number is 3.
                "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "2",
                # What a stage may take to clean up after SIGTERM before it is killed; Ray gives 3 s.
                "RAY_JOB_STOP_WAIT_TIME_S": "20",
                # Beside the store, not in /tmp, which is often small; a model is written there whole.
                "FASTSERVE_SCRATCH": os.environ.get("FASTSERVE_SCRATCH") or str(self._home.path / "scratch"),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0))),
            }
        )

    # -- looking ---------------------------------------------------------------------------------------------------

    def _endpoint(self, saved: dict[str, Any]) -> Endpoint:
        ports = saved["ports"]
        return Endpoint(
            dashboard_url=f"http://{LOOPBACK}:{ports['dashboard']}",
            token_path=self.token_path,
            gcs_port=ports["gcs"],
            serve_port=ports["serve"],
            temp_dir=Path(saved["temp_dir"]),
            pids=tuple(saved["pids"]),
        )

    def _status(self, endpoint: Endpoint, path: str) -> int:
        """HTTP status of a GET with the home's token; 0 when nothing answers."""
        try:
            headers = {"Authorization": f"Bearer {endpoint.token}"}
            with httpx.Client(trust_env=False, timeout=10.0) as client:
                return client.get(endpoint.dashboard_url + path, headers=headers).status_code
        except (httpx.HTTPError, OSError):
            return 0


class _Detached(subprocess.Popen[bytes]):
    """A process that may outlive this command; Python need not warn when its handle goes first."""

    def __del__(self) -> None:
        """Leave the process alone."""


def start_arguments(ports: dict[str, int], temp_dir: Path) -> list[str]:
    """Arguments of `ray start` for a head on loopback."""
    return [
        "--head",
        "--block",  # stays as the parent of all parts, and ends when one of them does
        f"--node-ip-address={LOOPBACK}",
        f"--port={ports['gcs']}",
        "--include-dashboard=true",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={ports['dashboard']}",
        f"--dashboard-agent-listen-port={ports['agent_http']}",
        f"--dashboard-agent-grpc-port={ports['agent_grpc']}",
        f"--metrics-export-port={ports['metrics']}",
        "--min-worker-port=0",  # any free port: Ray's own fixed range is the same for every head on the machine
        "--max-worker-port=0",
        f"--num-cpus={LOGICAL_CPUS}",
        f"--labels={PROFILE_LABEL}={LOCAL}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={temp_dir}",
        "--disable-usage-stats",
        "--no-monitor",  # there is nothing to scale on one machine
        "--include-log-monitor=false",
        "--log-style=record",
        "--log-color=false",
    ]

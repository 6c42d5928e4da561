"""More machines for a home's Ray head: raylets on this machine with the label of a hardware profile."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

from fastserve.cluster.home import Home
from fastserve.cluster.nodes import PROFILE_LABEL, Machine, machines
from fastserve.cluster.processes import HOME_VARIABLE, PART_VARIABLE, clean_environment
from fastserve.cluster.ray_head import Endpoint

JOIN = """
from ray._private import ray_constants, services

ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host

from ray.scripts.scripts import main

main()
"""
"""`ray start` for a machine that joins a head on loopback, which Ray takes for a head that nobody can join."""


class Node:
    """One machine of a profile."""

    def __init__(self, home: Home, endpoint: Endpoint, profile: str, cpus: int) -> None:
        self._endpoint, self.profile = endpoint, profile
        before = self._count()
        environment = clean_environment(
            {
                HOME_VARIABLE: home.id,
                PART_VARIABLE: "ray",
                "SPT_NOENV": "1",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(endpoint.token_path),
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                "RAY_TMPDIR": str(endpoint.temp_dir),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_worker_niceness": "0",
                "RAY_memory_usage_threshold": "0.98",
                "RAY_prestart_worker_first_driver": "0",
                "RAY_enable_worker_prestart": "0",
                "RAY_agent_register_timeout_ms": "400000",
                "FASTSERVE_SCRATCH": str(home.path / "scratch"),
                "OMP_NUM_THREADS": "1",
            }
        )
        command = [
            sys.executable, "-c", JOIN, "start", "--block",
            f"--address=127.0.0.1:{endpoint.gcs_port}", "--node-ip-address=127.0.0.1",
            f"--num-cpus={cpus}", f"--object-store-memory={80 << 20}", f"--labels={PROFILE_LABEL}={profile}",
            "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats",
            "--include-log-monitor=false", "--log-style=record", "--log-color=false",
        ]  # fmt: skip
        with (home.path / "logs" / f"node-{profile}-{time.monotonic_ns()}.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 300
        while self._count() <= before:
            assert self._process.poll() is None, f"the node of {profile} ended with {self._process.returncode}"
            assert time.monotonic() < deadline, f"the node of {profile} did not join in 300 s"
            time.sleep(0.2)

    def _count(self) -> int:
        return sum(item.profile == self.profile for item in self._machines())

    def _machines(self) -> list[Machine]:
        return machines(self._endpoint.dashboard_url, self._endpoint.token)

    def wait(self) -> None:
        """Until it has ended, as it does with its head."""
        self._process.wait(300)

    def pull_the_plug(self) -> None:
        """End it and all that runs on it without a word."""
        main = psutil.Process(self._process.pid)
        for process in [main, *main.children(recursive=True)]:
            if process.pid != os.getpid():
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
        self._process.wait()

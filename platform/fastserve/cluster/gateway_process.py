"""The gateway of one home: a process of its own, so that it outlives Ray and starts in about a second."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from fastserve.cluster.home import Home
from fastserve.cluster.processes import Process, clean_environment, end_each, free_port, port_is_free
from fastserve.errors import ClusterFailed, PortInUse
from fastserve.gateway import config as gateway_config
from fastserve.gateway.keys import digest, new_key

START_SECONDS = 60.0
"""One second is usual; the rest is for a machine that is busy."""

STOP_SECONDS = 10.0
FIRST_PORT = 8100
STATS_SECONDS = 2.0
SEND_SECONDS = 10.0
"""Longest wait for a gateway to take new orders; milliseconds are usual."""

ADMIN_FILE = "gateway/admin.json"
"""Port and tokens of the gateway's admin door; its owner alone may read it."""


class GatewayProcess:
    """Starts, finds, reconfigures and stops the gateway process of a home."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._started: subprocess.Popen[bytes] | None = None
        self.config_path = home.path / "gateway" / "config.json"

    @property
    def port(self) -> int | None:
        """Port that the gateway of this home has, running or not."""
        found = self._home.read_json("gateway/process.json")
        return None if found is None else int(found["port"])

    @property
    def url(self) -> str | None:
        """Base URL for OpenAI clients; None before the first start."""
        return None if self.port is None else f"http://127.0.0.1:{self.port}/v1"

    def alive(self) -> bool:
        """Whether the process that was started runs and is the same one."""
        process = self._process()
        return process is not None and process.alive

    def _process(self) -> Process | None:
        """The process that was started last. It is told apart by clock ticks after boot: a clock that is set right
        meanwhile does not make it another one."""
        found = self._home.read_json("gateway/process.json")
        return None if found is None else Process(found["pid"], found.get("start_ticks", 0))

    def choose_port(self, wanted: int | None) -> int:
        """The port to listen on: the wanted one, else the one it had, else a free one.

        Raises PortInUse when a port that was asked for by number is taken by somebody else.
        """
        had = self.port
        if wanted is not None:
            if wanted != had and not port_is_free(wanted):
                raise PortInUse(
                    f"port {wanted} is in use by another program; "
                    "give another --port, or leave it out and a free one is found"
                )
            return wanted
        if had is not None and (self.alive() or port_is_free(had)):
            return had
        return free_port(FIRST_PORT)

    def configure(self, models: Mapping[str, Any], keys: tuple[gateway_config.Key, ...], port: int) -> bool:
        """Write the configuration when it differs from what is there, and tell a process that runs, so that what is
        said to be ready is. One that does not answer reads it by itself. True when written."""
        admin_port, token, orders = self._admin(port)
        wanted = gateway_config.Config(
            host="127.0.0.1",
            port=port,
            models=dict(models),
            keys=keys,
            admin_port=admin_port,
            admin_sha256=digest(token),
            orders_sha256=digest(orders),
        )
        if self.config_path.exists() and gateway_config.read(self.config_path) == wanted:
            return False
        gateway_config.write(self.config_path, wanted)
        if self.alive():
            self._send(wanted, orders)
        return True

    def _send(self, wanted: gateway_config.Config, token: str) -> None:
        url, headers = f"http://127.0.0.1:{wanted.admin_port}/orders", {"Authorization": f"Bearer {token}"}
        with contextlib.suppress(httpx.HTTPError), httpx.Client(trust_env=False, timeout=SEND_SECONDS) as client:
            client.put(url, json=gateway_config.to_json(wanted), headers=headers)

    def start(self, port: int) -> None:
        """Start the process on `port` and wait until it answers; nothing to do when it runs there already.

        Raises PortInUse when another program took one of its ports first, else ClusterFailed with the end of its log
        when it does not come up.
        """
        if self.alive() and self.port == port:
            return
        self.stop()
        log_path = self._home.path / "logs" / "gateway.log"
        with open(log_path, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastserve.gateway", "--config", str(self.config_path)],
                env=clean_environment({"FASTSERVE_HOME_ID": self._home.id}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self._home.path,
            )
        self._started = process
        started = Process.of(process.pid)
        if started is None:
            raise ClusterFailed(f"the gateway stopped at once: {_tail(log_path)}")
        self._home.write_json("gateway/process.json", {**started.to_json(), "port": port})
        deadline, health = time.monotonic() + START_SECONDS, f"http://127.0.0.1:{port}/healthz"
        while time.monotonic() < deadline:
            if process.poll() is not None:
                taken = process.returncode == PortInUse.exit_code and not self._ports_are_free(port)
                raise (PortInUse if taken else ClusterFailed)(f"the gateway stopped at once: {_tail(log_path)}")
            with contextlib.suppress(httpx.TransportError):
                # The port may be another home's, whose gateway is well, too.
                if _listens(process.pid, port) and httpx.get(health, timeout=2, trust_env=False).status_code == 200:
                    return
            time.sleep(0.05)
        raise ClusterFailed(f"the gateway did not answer within {START_SECONDS:.0f}s; see {log_path}")

    def stats(self, since: float) -> dict[str, Any] | None:
        """What the gateway has counted since the Unix second `since`, as its `/stats` says it; None while it does not
        answer."""
        found = self._home.read_json(ADMIN_FILE)
        if found is None:
            return None
        try:
            answer = httpx.get(
                f"http://127.0.0.1:{found['port']}/stats",
                params={"since": repr(since)},
                headers={"Authorization": f"Bearer {found['token']}"},
                timeout=STATS_SECONDS,
                trust_env=False,
            )
            if answer.status_code != 200:
                return None
            return dict(answer.json())
        except (httpx.HTTPError, ValueError):
            return None

    def _ports_are_free(self, port: int) -> bool:
        admin = self._home.read_json(ADMIN_FILE) or {}
        return port_is_free(port) and port_is_free(int(admin.get("port", port)))

    def _admin(self, port: int) -> tuple[int, str, str]:
        """Port of the admin door, its token for figures and its token for orders: those it had, but another port when
        another program has taken it meanwhile."""
        found = self._home.read_json(ADMIN_FILE) or {}
        there = int(found.get("port", port))
        kept = there != port and (self.alive() or port_is_free(there))
        admin_port = there if kept else free_port(FIRST_PORT + 1, avoid=(port,))
        token, orders = (str(found.get(name) or new_key()) for name in ("token", "orders"))
        admin = {"port": admin_port, "token": token, "orders": orders}
        if admin != found:
            self._home.write_json(ADMIN_FILE, admin)
        return admin_port, token, orders

    def stop(self) -> None:
        """End the process, if it runs; streams get a moment to finish."""
        process = self._process()
        if process is None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            if process.alive:
                end_each([process], how, STOP_SECONDS)
        if self._started is not None:
            self._started.poll()


def _listens(pid: int, port: int) -> bool:
    try:
        open_ones = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in open_ones)


def _tail(path: Path, size_bytes: int = 400) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - size_bytes))
        return file.read().decode(errors="replace").strip()

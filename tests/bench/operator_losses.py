"""Requests lost while the operator, one of two gateways, a replica or its engine are ended, each by itself.

All of it is real but for the pods: the operator as a process on a real API server, a Ray head with two replicas of a
tiny model in real engines, and two gateway processes that get the orders of the ConfigMap in a file, as a mounted
volume gives them. The clients do what OpenAI's do: a request that got no answer is tried again, twice at most, at
whichever gateway takes it, as a Service would choose. What was cut off after its first byte is counted apart.
"""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from tests.bench.figure import Figure
from tests.bench.operator_ground import Ground, ground

from fastserve.cluster.home import Home
from fastserve.cluster.processes import free_port
from fastserve.spec.model import API_VERSION

CLIENTS = 6
TRIES = 3
TOKENS = 60
PHASE_SECONDS = 8.0
BACK_SECONDS = 120.0
"""For two replicas to answer again."""

ORDERS = "/api/v1/namespaces/default/configmaps/fastserve-gateway"
MODEL = "/apis/fastserve.dev/v1alpha1/namespaces/default/models/chat"


@dataclass
class Clients:
    """Ask one request after the other, whole answers and streams, at two gateways by turns."""

    bases: list[str]
    key: str
    over: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)
    """asked, answered, lost, tried again, cut (streams)."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Begin."""
        self._threads = [threading.Thread(target=self._live, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let what is under way end."""
        self.over.set()
        for thread in self._threads:
            thread.join()

    def taken(self) -> Counter[str]:
        """Counts since the last time."""
        with self._lock:
            found, self.counts = self.counts, Counter()
        return found

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _live(self, number: int) -> None:
        with httpx.Client(timeout=170, headers={"Authorization": f"Bearer {self.key}"}) as client:
            turn = number
            while not self.over.is_set():
                self._count("asked")
                for trial in range(TRIES):
                    turn += 1
                    told = self._ask(client, self.bases[turn % len(self.bases)], number)
                    if told != "nothing":
                        break
                    if trial + 1 < TRIES:
                        self._count("tried again")
                        time.sleep(0.5)
                self._count("lost" if told == "nothing" else told)

    def _ask(self, client: httpx.Client, base: str, number: int) -> str:
        """answered; cut after the first byte of an answer; nothing."""
        message = {"role": "user", "content": f"hello {number}"}
        body = {
            "model": "chat",
            "messages": [message],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": number % 2 == 0,
        }
        began = False
        last = b""
        try:
            with client.stream("POST", f"{base}/v1/chat/completions", json=body) as answer:
                if answer.status_code >= 500 or answer.status_code == 429:
                    return "nothing"
                if answer.status_code != 200:
                    return f"refused with {answer.status_code}"
                for chunk in answer.iter_bytes():
                    began = began or (bool(chunk.strip()) and not chunk.startswith(b":"))
                    last = (last + chunk)[-400:]
        except httpx.TransportError:
            return "cut" if began else "nothing"
        whole = not body["stream"] or last.rstrip().endswith(b"data: [DONE]")
        return "answered" if whole else "cut"


class Gateways:
    """Two processes, and what stands for the kubelet: it writes the orders into each one's file."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._ports = [(free_port(18300 + 4 * number), free_port(18302 + 4 * number)) for number in range(2)]
        self._processes: list[subprocess.Popen[bytes] | None] = [None, None]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._mount)

    @property
    def bases(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port, _ in self._ports]

    def start(self) -> None:
        """Both, with the orders as they are."""
        self._write()
        self._thread.start()
        for number in range(2):
            self.run(number)

    def run(self, number: int) -> None:
        """Start one, and wait until it answers."""
        with open(self._folder / f"gateway-{number}.log", "ab") as log:
            words = [sys.executable, "-m", "fastserve.gateway", "--config", str(self._file(number))]
            self._processes[number] = subprocess.Popen(words, stdout=log, stderr=log)
        wait(lambda: answers(f"{self.bases[number]}/healthz"), 60, "a gateway answers")

    def end(self, number: int, how: signal.Signals) -> None:
        """SIGTERM, as when its pod is deleted, or SIGKILL."""
        process = self._processes[number]
        assert process is not None
        process.send_signal(how)
        process.wait(120)

    def stop(self) -> None:
        """All of it."""
        self._over.set()
        self._thread.join()
        for process in self._processes:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(120)

    def _file(self, number: int) -> Path:
        return self._folder / f"orders-{number}.json"

    def _mount(self) -> None:
        while not self._over.wait(0.5):
            with contextlib.suppress(httpx.HTTPError):
                self._write()

    def _write(self) -> None:
        orders = json.loads(self._cluster.get(ORDERS)["data"]["config.json"])
        for number, (port, admin) in enumerate(self._ports):
            text = json.dumps({**orders, "host": "127.0.0.1", "port": port, "adminPort": admin}, sort_keys=True)
            place = self._file(number)
            if not place.exists() or place.read_text() != text:
                fresh = place.with_suffix(".new")
                fresh.write_text(text)
                fresh.replace(place)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=5).status_code == 200
    return False


def wait(true: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)


def run() -> Iterator[Figure]:
    """About three minutes."""
    with ground() as there, ExitStack() as stack:
        from tiny import tiny_model

        folder, cluster = there.folder, there.cluster
        tiny_model(folder / "model")
        operators = Operators(there)
        stack.callback(operators.stop)
        operators.start()
        spec = {
            "source": f"file://{folder}/model",
            "serve": {"context": 512, "replicas": {"min": 2, "max": 2}, "engine": {"maxSequences": 4}},
        }
        for kind, name, value in (("Model", "chat", spec), ("AccessKey", "team", {"models": ["chat"]})):
            wish = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": value}
            cluster.kubectl("apply", "-f", "-", text=json.dumps(wish))
        wait(lambda: _replicas(cluster) == 2, 300, "two replicas")
        secret = json.loads(cluster.kubectl("get", "secret/team-key", "-o", "json").stdout)
        gateways = Gateways(cluster, folder)
        stack.callback(gateways.stop)
        gateways.start()
        clients = Clients(gateways.bases, base64.b64decode(secret["data"]["key"]).decode())
        stack.callback(clients.stop)
        clients.start()
        yield from _phases(cluster, there.home, operators, gateways, clients)


class Operators:
    """One operator at a time."""

    def __init__(self, there: Ground) -> None:
        self._ground = there
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = self._ground.operator("--lease-seconds", "3")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(60)


def _phases(cluster: Any, home: Home, operators: Operators, gateways: Gateways, clients: Clients) -> Iterator[Figure]:
    """Clients ask all the while; before each phase two replicas answer."""

    def restarted_gateway(how: signal.Signals) -> None:
        for number in range(2):
            gateways.end(number, how)
            time.sleep(1)
            gateways.run(number)
            time.sleep(2)

    def killed_operator() -> None:
        for _ in range(2):
            operators.kill()
            time.sleep(2)
            operators.start()
            time.sleep(4)

    what: list[tuple[str, Callable[[], None]]] = [
        ("nothing is ended", lambda: None),
        ("the operator is killed, twice", killed_operator),
        ("each gateway is ended (SIGTERM)", lambda: restarted_gateway(signal.SIGTERM)),
        ("each gateway is killed (SIGKILL)", lambda: restarted_gateway(signal.SIGKILL)),
        ("an engine is killed", lambda: _kill(home, "EngineCore")),
        ("a replica is killed", lambda: _kill(home, "ServeReplica")),
    ]
    for name, act in what:
        wait(lambda: _replicas(cluster) == 2, BACK_SECONDS, "two replicas")
        clients.taken()
        act()
        time.sleep(PHASE_SECONDS)
        counts = clients.taken()
        lost = counts["lost"] + sum(count for key, count in counts.items() if key.startswith("refused"))
        yield Figure(f"{name}: lost before the first byte", lost, f"of {counts['asked']}", "0", lost == 0)
        yield Figure(f"{name}: tried again by the client", counts["tried again"], "times")
        yield Figure(f"{name}: cut after the first byte", counts["cut"], f"of {counts['asked']}")


def _replicas(cluster: Any) -> int:
    answer = cluster.api.get(MODEL)
    return int(answer.json().get("status", {}).get("replicas") or 0) if answer.is_success else 0


def _kill(home: Home, sign: str) -> None:
    """SIGKILL to one process of the head's with this in its name."""
    mark = f"FASTSERVE_HOME_ID={home.id}".encode()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if ours and sign in " ".join(process.cmdline()):
                process.kill()
                return
    raise RuntimeError(f"no process with {sign}")

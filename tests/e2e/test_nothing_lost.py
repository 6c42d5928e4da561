"""Requests without end while the replica and its engine are killed: nobody who had no byte yet sees it."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import psutil
import pytest
from laptop import Laptop
from tiny import tiny_model

from fastserve.cluster.access import local_key
from fastserve.cluster.gateway_process import GatewayProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CLIENTS = 6


class Load:
    """Clients that ask one request after the other, whole answers and streams, until they are told to stop."""

    def __init__(self, laptop: Laptop) -> None:
        port = laptop.home.read_json("gateway/process.json")["port"]
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {local_key(laptop.home)}"}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._live, args=(number,)) for number in range(CLIENTS)]
        self.whole: list[int | str] = []
        """Status of each whole answer, or what broke it."""

        self.streams: list[str] = []
        """Last event of each stream."""

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(300)

    def _live(self, number: int) -> None:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"hello {number}"}],
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": number % 3 == 0,
        }
        with httpx.Client(timeout=290) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self._url, json=body, headers=self._headers)
                except httpx.TransportError as error:
                    self.whole.append(repr(error))
                    continue
                if body["stream"]:
                    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
                    self.streams.append(lines[-1] if answer.status_code == 200 else f"{answer.status_code}")
                else:
                    self.whole.append(answer.status_code)


def test_a_replica_killed_under_load_costs_no_whole_answer_and_no_stream_ends_silently(
    serving_laptop: Laptop, tmp_path: Path
) -> None:
    laptop = serving_laptop
    folder = tiny_model(tmp_path / "model")
    manifest = tmp_path / "tiny.yaml"
    serve = "{context: 512, engine: {maxSequences: 4}}"
    manifest.write_text(
        "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: tiny}\n"
        f"spec: {{source: {folder}, serve: {serve}}}\n"
    )
    laptop.run("up", str(manifest), "--detach")
    gateway = GatewayProcess(laptop.home)
    with Load(laptop) as load:
        for sign in ("EngineCore", "ServeReplica"):
            before = len(load.whole)
            laptop.until(lambda before=before: len(load.whole) >= before + 8, "requests are answered")
            dead = laptop.kill(sign)
            laptop.until(lambda sign=sign, dead=dead: _replaced(laptop, sign, dead), f"another {sign} is there")
            after = len(load.whole)
            laptop.until(lambda after=after: len(load.whole) >= after + 8, f"answers after {sign} was killed")
    assert set(load.whole) == {200}
    torn = [end for end in load.streams if end != "data: [DONE]"]
    assert all("upstream_lost" in end for end in torn), torn
    cut = len(torn)

    def settled() -> bool:
        """The gateway counts a request as over a moment after its client has all of it."""
        stats = gateway.stats(0)
        if stats is None:
            return False
        counted = stats["models"]["tiny"]
        (revision,) = counted["revisions"].values()
        found = (counted["lost"], revision["lost"], revision["running"], counted["held"])
        return bool(found == (cut, cut, 0, 0))

    laptop.until(settled, f"{cut} requests count as lost and none runs", 60)


def _replaced(laptop: Laptop, sign: str, dead: psutil.Process) -> bool:
    found = laptop.named(sign)
    return bool(found) and dead not in found

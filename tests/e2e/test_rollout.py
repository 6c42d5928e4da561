"""A new revision takes over step by step while clients go on asking, and `fastserve rollback` takes it back."""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from laptop import ROOT, Laptop

from fastserve.cluster.access import local_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODEL = ROOT / "tests" / "data" / "cases" / "11-wrong-eos.gguf"
BOTH_SECONDS = 6
"""How long both revisions are watched: long enough to be seen by whoever is held up for a few seconds."""


class Clients:
    """Two clients that ask one after the other, all the time, one of them for streams."""

    def __init__(self, laptop: Laptop, name: str) -> None:
        gateway = laptop.home.read_json("gateway/process.json")
        self._url = f"http://127.0.0.1:{gateway['port']}/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {local_key(laptop.home)}"}
        self._name = name
        self._over = threading.Event()
        self.answered = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(stream,)) for stream in (True, False)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, stream: bool) -> None:
        body = {"model": self._name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": stream}
        with httpx.Client(timeout=300, headers=self._headers) as client:
            while not self._over.is_set():
                self._one(client, body, "data: [DONE]" if stream else '"finish_reason"')
                time.sleep(0.05)

    def _one(self, client: httpx.Client, body: dict[str, Any], ends: str) -> None:
        try:
            answer = client.post(self._url, json=body)
        except httpx.HTTPError as error:
            self.failures.append(repr(error))
            return
        whole = answer.status_code == 200 and ends in answer.text and '"error"' not in answer.text
        if whole:
            self.answered += 1
        else:
            self.failures.append(f"{answer.status_code} {answer.text[:300]}")


def manifest(folder: Path, context: int) -> str:
    path = folder / "steps.yaml"
    rollout = f"{{steps: [50, 100], hold: {BOTH_SECONDS}s, maxTtftIncrease: 900%}}"
    spec = f"{{source: {MODEL}, serve: {{context: {context}, rollout: {rollout}}}}}"
    path.write_text(f"apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {{name: steps}}\nspec: {spec}\n")
    return str(path)


def shares(laptop: Laptop) -> dict[str, int]:
    return laptop.home.weights("steps")


def test_a_rollout_by_steps_and_a_rollback_lose_no_request(serving_laptop: Laptop, tmp_path: Path) -> None:
    laptop = serving_laptop
    laptop.run("up", manifest(tmp_path, 256), "--detach")
    (old,) = shares(laptop)
    with Clients(laptop, "steps") as clients:
        up = laptop.start("up", manifest(tmp_path, 192), "--detach")
        laptop.until(lambda: len(shares(laptop)) == 2 or up.poll() is not None, "there is a step")
        up.send_signal(signal.SIGSTOP)  # whoever decides stands still while it is looked at, however long that takes
        shifted = laptop.home.shifted_at("steps")
        assert sorted(shares(laptop).values()) == [50, 50], laptop.said()
        (new,) = shares(laptop).keys() - {old}
        laptop.until(lambda: bool(laptop.json("why", "steps").get("rollout")), "it says that it rolls out")
        story = laptop.json("why", "steps")
        assert (story["rollout"]["revision"], story["rollout"]["weight"]) == (new, 50)
        up.send_signal(signal.SIGCONT)
        assert up.wait(300) == 0, laptop.said()
        assert shares(laptop) == {new: 100}
        whole = laptop.home.shifted_at("steps")
        assert shifted is not None
        assert whole is not None
        assert whole - shifted >= BOTH_SECONDS
        before = clients.answered
        laptop.run("rollback", "steps")
        assert shares(laptop) == {old: 100}
        laptop.until(lambda: clients.answered > before + 10, "it answers after the rollback")
    assert clients.failures == []
    status = laptop.json("status", "steps")
    assert status["pin"] == {"revision": old, "insteadOf": new, "reason": "ByHand", "message": ""}
    assert json.loads((laptop.home.path / "models/steps/weights.json").read_text())["proven"] == old

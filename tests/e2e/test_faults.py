"""Kill things in the middle: nothing is repeated that had committed, nothing is orphaned, and the end is the same."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from laptop import COMMAND, Laptop, ctrl_c
from tiny import tiny_manifest

from fastserve.cluster.access import local_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

STAGES = ("source", "train", "compress", "evaluate")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A manifest with all stages around a model that is trained, compressed and loaded in seconds."""
    return str(tiny_manifest(tmp_path_factory.mktemp("tiny")))


def running(laptop: Laptop, stage: str) -> bool:
    """Whether an attempt of the stage is under way: it reports, and has not committed.

    The tiny source is done half a second after its first report, so there a claim that is a second old will do.
    """
    for request in laptop.home.path.glob(f"store/artifacts/{stage}/*/attempts/*/request.json"):
        key, progress = request.parents[2], request.with_name("progress.json")
        if (key / "record.json").exists() or request.with_name("failure.json").exists():
            continue
        if progress.exists() and time.time() - json.loads(progress.read_text())["at"] < 5:
            return True
        if stage == "source" and time.time() - request.stat().st_mtime > 1:
            return True
    return False


def starting_to_serve(laptop: Laptop) -> bool:
    return bool(list(laptop.home.path.glob("serving/*.json")))


def moments(laptop: Laptop) -> list[tuple[str, Callable[[], bool]]]:
    """Each stage, and the start of the engine."""
    stages: list[tuple[str, Callable[[], bool]]] = [
        (stage, lambda stage=stage: running(laptop, stage)) for stage in STAGES
    ]
    return [*stages, ("serve", lambda: starting_to_serve(laptop))]


def ready(laptop: Laptop) -> bool:
    done = subprocess.run(
        [*_status(laptop)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60
    )
    return done.returncode == 0 and bool(json.loads(done.stdout)["url"])


def _status(laptop: Laptop) -> list[str]:
    return [COMMAND, "status", "tiny", "-o", "json", "--home", str(laptop.home.path)]


def test_the_command_line_killed_in_each_stage_and_begun_again(laptop: Laptop, manifest: str) -> None:
    for name, now in moments(laptop):
        process = laptop.start("up", manifest)
        laptop.until(now, f"{name} is under way", 240)
        process.kill()
        process.wait()
    process = laptop.start("up", manifest)
    laptop.until(lambda: ready(laptop), "it is ready", 300)
    attempts = {name: attempt for name, (attempt, _) in laptop.records().items()}
    assert len(attempts) == 4
    assert set(attempts.values()) == {1}, f"a stage was repeated: {attempts}"
    laptop.chat("tiny", "hello")
    laptop.until(lambda: "tiny is ready" in laptop.said(), "its own answer is under way", 60)
    assert ctrl_c(process) == 0
    laptop.assert_nothing_left()


def test_ctrl_c_in_each_stage_and_begun_again(laptop: Laptop, manifest: str) -> None:
    for name, now in moments(laptop):
        before = laptop.records()
        process = laptop.start("up", manifest)
        laptop.until(now, f"{name} is under way", 240)
        assert ctrl_c(process) == 130
        laptop.assert_nothing_left()
        assert before.items() <= laptop.records().items(), "what had committed was repeated"
    laptop.run("up", manifest, "--detach")
    laptop.chat("tiny", "hello")


@pytest.fixture(scope="module")
def serving(shared_laptop: Laptop, manifest: str) -> Laptop:
    """A laptop on which the tiny model is up."""
    shared_laptop.run("up", manifest, "--detach")
    return shared_laptop


def kill(laptop: Laptop, sign: str) -> int:
    """SIGKILL the process of this home whose command line holds `sign`."""
    found = [process for process in laptop.processes() if sign in " ".join(process.cmdline())]
    assert found, f"no process with {sign}: {[p.cmdline() for p in laptop.processes()]}"
    os.kill(found[0].pid, signal.SIGKILL)
    return found[0].pid


def answers(laptop: Laptop) -> bool:
    """Whether a request through the gateway is answered."""
    gateway = laptop.home.read_json("gateway/process.json")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    headers = {"Authorization": f"Bearer {local_key(laptop.home)}"}
    try:
        url = f"http://127.0.0.1:{gateway['port']}/v1/chat/completions"
        return httpx.post(url, json=body, headers=headers, timeout=120).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("sign", ["fastserve.gateway", "gcs_server", "raylet/raylet", "EngineCore"])
def test_a_killed_part_comes_back(serving: Laptop, sign: str) -> None:
    before = serving.records()
    pid = kill(serving, sign)
    serving.until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", f"{sign} is dead", 20)
    time.sleep(3)  # whoever watches has had a look
    serving.until(lambda: answers(serving) and ready(serving), f"it answers again after {sign} was killed", 240)
    assert serving.records() == before


def test_a_replica_killed_under_a_stream_is_told_to_the_client_and_replaced(serving: Laptop) -> None:
    told = threading.Event()
    events: list[str] = []

    def listen() -> None:
        gateway = serving.home.read_json("gateway/process.json")
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 900,
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {local_key(serving.home)}"}
        url = f"http://127.0.0.1:{gateway['port']}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])
                    told.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert told.wait(60)
    kill(serving, "ServeReplica")
    listener.join(120)
    assert "error" in json.loads(events[-1]), f"the stream ended with {events[-1]}"
    serving.until(lambda: answers(serving) and ready(serving), "the replica is replaced", 240)


def test_a_second_up_on_the_same_home_is_refused_or_takes_over(serving: Laptop, manifest: str) -> None:
    tender = serving.home.tender()
    assert tender is not None
    assert tender["detached"]
    process = serving.start("up", manifest)  # takes over from the one in the background
    serving.until(lambda: (serving.home.tender() or {}).get("pid") == process.pid, "the new one tends", 60)
    done = serving.run("up", manifest, expect=5)
    assert f"process {process.pid}" in done.stderr
    serving.until(lambda: ready(serving), "it is ready", 120)
    assert ctrl_c(process) == 0
    serving.assert_nothing_left()
    serving.run("up", manifest, "--detach")


def test_a_port_in_use_is_named_before_anything_runs(laptop: Laptop, manifest: str) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = laptop.run("up", manifest, "--port", port, expect=5)
    assert f"port {port} is in use" in done.stderr
    assert not list(Path(laptop.home.path).glob("store/artifacts/*"))

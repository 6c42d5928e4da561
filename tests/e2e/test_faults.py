"""Kill things in the middle: nothing is repeated that had committed, nothing is orphaned, and the end is the same."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from laptop import COMMAND, Laptop, ctrl_c, gone
from s3_servers import moto_server
from tiny import tiny_manifest

from fastserve.cluster.access import local_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

STAGES = ("source", "train", "compress", "evaluate")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A manifest with all stages around a model that is trained, compressed and loaded in seconds."""
    return str(tiny_manifest(tmp_path_factory.mktemp("tiny")))


def has_begun(laptop: Laptop, stage: str) -> bool:
    """Whether a process of the stage is there."""
    return bool(laptop.named("fastserve.stages.entry", f"--stage {stage}"))


def running(laptop: Laptop, stage: str) -> bool:
    """Whether an attempt of the stage is under way: it reports, and has not committed.

    The tiny source is done half a second after its first report, so there its process will do.
    """
    if stage == "source":
        return has_begun(laptop, stage)
    for request in laptop.home.path.glob(f"store/artifacts/{stage}/*/attempts/*/request.json"):
        key, progress = request.parents[2], request.with_name("progress.json")
        if (key / "record.json").exists() or request.with_name("failure.json").exists():
            continue
        if progress.exists() and time.time() - json.loads(progress.read_text())["at"] < 5:
            return True
    return False


def starting_to_serve(laptop: Laptop) -> bool:
    return bool(list(laptop.home.path.glob("serving/*.json")))


def moments(laptop: Laptop, under_way: Callable[[Laptop, str], bool] = running) -> list[tuple[str, Callable[[], bool]]]:
    """Each stage, and the start of the engine. On a machine that stands still for a while a stage may begin and end
    between two looks; then the next one that is under way will do."""
    stages: list[Callable[[], bool]] = [lambda stage=stage: under_way(laptop, stage) for stage in STAGES]
    each = [*stages, lambda: starting_to_serve(laptop)]
    return [
        (name, lambda number=number: any(now() for now in each[number:]))
        for number, name in enumerate((*STAGES, "serve"))
    ]


def ready(laptop: Laptop) -> bool:
    done = subprocess.run(
        [*_status(laptop)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300
    )
    return done.returncode == 0 and bool(json.loads(done.stdout)["url"])


def _status(laptop: Laptop) -> list[str]:
    return [COMMAND, "status", "tiny", "-o", "json", "--home", str(laptop.home.path)]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a store on an S3 server."""
    with moto_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server.make_bucket("artifacts")


def test_the_command_line_killed_in_each_stage_and_begun_again(bucket: str, laptop: Laptop, manifest: str) -> None:
    """The whole job with its artifacts on S3: the address is given once, and remembered."""
    for number, (name, now) in enumerate(moments(laptop, has_begun)):
        process = laptop.start("up", manifest, *([] if number else ["--store", bucket]))
        laptop.until(now, f"{name} is under way")
        process.kill()
        process.wait()
    process = laptop.start("up", manifest)
    # What says `ready` of itself ends with 0; the status may say so of the model a moment earlier.
    laptop.until(lambda: "tiny is ready" in laptop.said(), "it says that it is ready")
    laptop.until(lambda: ready(laptop), "its status says so, too")
    attempts = {name: attempt for name, (attempt, _) in laptop.records().items()}
    assert len(attempts) == 4
    assert set(attempts.values()) == {1}, f"a stage was repeated: {attempts}"
    assert not list(laptop.home.path.glob("store/**/record.json"))
    stages = laptop.json("status", "tiny")["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == dict.fromkeys(STAGES, "committed")
    assert answers(laptop)
    assert ctrl_c(process) == 0, laptop.said()
    laptop.assert_nothing_left()
    sheet = laptop.json("plan", manifest)
    assert {line["stage"]: line["state"] for line in sheet["stages"]} == {
        **dict.fromkeys(STAGES, "committed"),
        "serve": "will run",
    }


def test_ctrl_c_in_each_stage_and_begun_again(shared_laptop: Laptop, manifest: str) -> None:
    """The tests below go on with what this one has made."""
    laptop = shared_laptop
    for name, now in moments(laptop):
        before, said = laptop.records(), len(laptop.said())
        process = laptop.start("up", manifest)
        laptop.until(now, f"{name} is under way")
        code = ctrl_c(process)
        was_ready = "tiny is ready" in laptop.said()[said:]  # where the machine stood still meanwhile
        assert code == (0 if was_ready else 130), laptop.said()[said:]
        laptop.assert_nothing_left()
        assert before.items() <= laptop.records().items(), "what had committed was repeated"
    laptop.run("up", manifest, "--detach")
    laptop.chat("tiny", "hello")


@pytest.fixture(scope="module")
def serving(shared_laptop: Laptop, manifest: str) -> Laptop:
    """A laptop on which the tiny model is up."""
    shared_laptop.run("up", manifest, "--detach")
    return shared_laptop


def answers(laptop: Laptop) -> bool:
    """Whether a request through the gateway is answered."""
    gateway = laptop.home.read_json("gateway/process.json")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    headers = {"Authorization": f"Bearer {local_key(laptop.home)}"}
    try:
        url = f"http://127.0.0.1:{gateway['port']}/v1/chat/completions"
        return httpx.post(url, json=body, headers=headers, timeout=300).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("sign", ["fastserve.gateway", "gcs_server", "raylet/raylet", "EngineCore"])
def test_a_killed_part_comes_back(serving: Laptop, sign: str) -> None:
    before = serving.records()
    dead = serving.kill(sign)
    serving.until(lambda: bool(serving.named(sign)) and dead not in serving.named(sign), f"another {sign} is there")
    serving.until(lambda: answers(serving) and ready(serving), f"it answers again after {sign} was killed")
    assert serving.records() == before


def test_what_is_killed_around_an_engine_comes_back_without_leftovers(serving: Laptop) -> None:
    """Engines are forked from a warm process."""
    engine = serving.only("EngineCore")
    server = engine.parent()
    assert server is not None
    warm = server.parent()
    assert warm is not None and warm in serving.processes(), "the engine was forked"  # noqa: PT018

    os.kill(warm.pid, signal.SIGKILL)
    serving.until(lambda: gone(warm), "the warm process is dead")
    assert serving.chat("tiny", "hi") is not None
    assert serving.only("EngineCore") == engine, "an engine does not need the process it came from"

    serving.kill("ServeReplica")
    serving.until(lambda: gone(engine) and gone(server), "they end with their replica", 60)
    assert serving.chat("tiny", "hi") is not None
    engine = serving.only("EngineCore")
    second = engine.parent()
    assert second is not None
    assert second.pid != server.pid

    os.kill(second.pid, signal.SIGKILL)
    serving.until(lambda: gone(engine), "an engine ends with its server", 60)
    assert serving.chat("tiny", "hi") is not None


class Stream:
    """A long answer that somebody listens to."""

    def __init__(self, laptop: Laptop) -> None:
        self._laptop, self._told = laptop, threading.Event()
        self.events: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        assert self._told.wait(300)

    def _listen(self) -> None:
        gateway = self._laptop.home.read_json("gateway/process.json")
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {local_key(self._laptop.home)}"}
        url = f"http://127.0.0.1:{gateway['port']}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=300) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:])
                    self._told.set()

    def ended_within(self, seconds: float) -> bool:
        self._listener.join(seconds)
        return not self._listener.is_alive()


def halted_stream(laptop: Laptop) -> Stream:
    """A stream in the middle of its answer, with an engine that stands still, so that it cannot come to its end."""
    for _ in range(5):
        stream, engine = Stream(laptop), laptop.only("EngineCore")
        engine.suspend()
        if not stream.ended_within(1):
            return stream
        engine.resume()
    raise AssertionError("900 tokens are over before anybody can look")


def test_a_replica_killed_under_a_stream_is_told_to_the_client_and_replaced(serving: Laptop) -> None:
    stream = halted_stream(serving)
    serving.kill("ServeReplica")
    assert stream.ended_within(300)
    assert "error" in json.loads(stream.events[-1]), f"the stream ended with {stream.events[-1]}"
    serving.until(lambda: answers(serving) and ready(serving), "the replica is replaced")


def test_a_second_up_on_the_same_home_is_refused_or_takes_over(serving: Laptop, manifest: str) -> None:
    tender, said = serving.home.tender(), len(serving.said())
    assert tender is not None
    assert tender["detached"]
    process = serving.start("up", manifest)  # takes over from the one in the background
    serving.until(lambda: (serving.home.tender() or {}).get("pid") == process.pid, "the new one tends")
    done = serving.run("up", manifest, expect=5)
    assert f"process {process.pid}" in done.stderr
    serving.until(lambda: "tiny is ready" in serving.said()[said:], "it is ready")
    assert ctrl_c(process) == 0, serving.said()[said:]
    serving.assert_nothing_left()


def test_a_port_in_use_is_named_before_anything_runs(laptop: Laptop, manifest: str) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = laptop.run("up", manifest, "--port", port, expect=5)
    assert f"port {port} is in use" in done.stderr
    assert not list(Path(laptop.home.path).glob("store/artifacts/*"))

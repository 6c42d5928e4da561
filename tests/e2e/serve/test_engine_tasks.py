"""What one real engine does beside plain text: adapters that come and go, calls of tools, structured answers,
speech; and how it is found when it is stuck."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tiny_adapters import write_adapter
from tiny_llama import TEMPLATE, write_tiny_llama
from tiny_whisper import tone, write_tiny_whisper

from fastserve.cluster.processes import clean_environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

HOST = Path(__file__).with_name("engine_host.py")
SECTION = {"context": 512, "engine": {"maxSequences": 4, "kvCache": "32MiB", "dtype": "float32"}}
TOOLS = (
    '{% if tools %}{{ \'Write <tool_call>{"name": ..., "arguments": ...}</tool_call>\' + tools | tojson }}{% endif %}'
)
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "dark": {"type": "boolean"}},
    "required": ["colour", "dark"],
    "additionalProperties": False,
}
STUCK_SECONDS = 4
WIDTH = 128
THERE = {"width": WIDTH, "module": "model.layers.1.self_attn.o_proj"}


class Engine:
    """The host process and a client of it; `ready` waits for it."""

    def __init__(self, model: Path, section: dict[str, Any], *ranks: int) -> None:
        self.log = model.parent / "host.log"
        self._sockets = Path(tempfile.mkdtemp(prefix="fs-engine-", dir="/tmp"))  # their paths may have 107 characters
        env = clean_environment({"FASTSERVE_CHECK_SECONDS": str(STUCK_SECONDS), "TMPDIR": str(self._sockets)})
        with socket.socket() as bound, self.log.open("wb") as log:
            bound.bind(("127.0.0.1", 0))
            port, number = bound.getsockname()[1], bound.fileno()
            command = [sys.executable, str(HOST), str(model), str(number), json.dumps(section), json.dumps(ranks)]
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, pass_fds=[number], start_new_session=True
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300)

    def ready(self) -> Engine:
        deadline = time.monotonic() + 300
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            try:
                self.client.get("/health")
                return self
            except httpx.TransportError:
                time.sleep(0.2)

    def end(self) -> None:
        """Twice is as once."""
        if self.client.is_closed:
            return
        self.client.close()
        try:
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # the engine's own process may outlive its host
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            shutil.rmtree(self._sockets, ignore_errors=True)

    def ask(self, model: str = "chat", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24, "temperature": 0}
        return self.client.post("/v1/chat/completions", json=body | {"ignore_eos": True} | more)

    def text(self, model: str = "chat") -> str:
        return str(self.ask(model).raise_for_status().json()["choices"][0]["message"]["content"])

    def adapters(self, **paths: Path) -> list[dict[str, str]]:
        wanted = [{"name": name, "path": str(path)} for name, path in paths.items()]
        refused: list[dict[str, str]] = self.client.post("/_adapters", json=wanted).json()
        return refused

    def names(self) -> list[str]:
        return [item["id"] for item in self.client.get("/v1/models").json()["data"]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """An engine for speech and one for text, which load at the same time."""
    model = write_tiny_llama(tmp_path_factory.mktemp("tasks") / "model", hidden=WIDTH, dtype="float32")
    (model / "chat_template.jinja").write_text(TOOLS + TEMPLATE)
    text = Engine(model, SECTION, 8)
    speech = Engine(write_tiny_whisper(tmp_path_factory.mktemp("speech") / "model"), {"task": "transcribe"})
    yield speech, text
    speech.end()
    text.end()


@pytest.fixture(scope="module")
def engine(both: tuple[Engine, Engine]) -> Engine:
    return both[1].ready()


def test_speech_becomes_text(both: tuple[Engine, Engine]) -> None:
    speech = both[0].ready()
    for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        fields = {"model": "chat", "language": "en", "temperature": "0"}
        answer = speech.client.post(path, data=fields, files={"file": ("tone.wav", tone(), "audio/wav")})
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"]
    noise = {"file": ("noise.wav", b"RIFF and no sound", "audio/wav")}
    assert speech.client.post("/v1/audio/transcriptions", data={"model": "chat"}, files=noise).status_code == 400
    assert speech.client.get("/_check").json() == "well"
    speech.end()


def test_adapters_come_and_go_and_a_bad_one_takes_nothing_with_it(engine: Engine, tmp_path: Path) -> None:
    plain = engine.text()
    zero = write_adapter(tmp_path / "zero", **THERE)
    loud = write_adapter(tmp_path / "loud", **THERE, value=0.5)
    other = write_adapter(tmp_path / "other", width=2 * WIDTH)
    (refused,) = engine.adapters(zero=zero, other=other, loud=loud)
    assert refused["name"] == "other"
    assert engine.names() == ["chat", "zero", "loud"]
    assert engine.text("zero") == engine.text() == plain
    assert engine.text("loud") != plain
    missing = engine.ask("other")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")

    before = engine.text("loud")
    assert engine.adapters(zero=write_adapter(tmp_path / "again", **THERE, value=-0.5), loud=loud) == []
    assert engine.text("zero") not in (plain, before)  # other bytes under the same name
    assert engine.adapters(loud=loud) == []
    assert engine.names() == ["chat", "loud"]
    assert engine.ask("zero").status_code == 404
    assert engine.text("loud") == before
    assert engine.adapters(loud=tmp_path / "gone")[0]["name"] == "loud"
    assert engine.text("loud") == before  # what cannot be replaced stays
    assert engine.adapters() == []
    assert engine.text() == plain


def test_a_request_that_runs_ends_with_the_adapter_that_it_began_with(engine: Engine, tmp_path: Path) -> None:
    loud = write_adapter(tmp_path / "loud", **THERE, value=0.5)
    assert engine.adapters(loud=loud) == []
    whole = engine.ask("loud", max_tokens=200).json()["choices"][0]["message"]["content"]
    found: list[str] = []

    def stream() -> None:
        found.append(engine.ask("loud", max_tokens=200).json()["choices"][0]["message"]["content"])

    thread = threading.Thread(target=stream)
    thread.start()
    while not engine.client.get("/_stats").json()["running"] and thread.is_alive():
        time.sleep(0.01)
    assert engine.adapters() == []
    thread.join(300)
    assert found == [whole]


def test_nobody_outside_can_load_an_adapter(engine: Engine, tmp_path: Path) -> None:
    body = {"lora_name": "evil", "lora_path": str(write_adapter(tmp_path / "evil", **THERE))}
    assert engine.client.post("/v1/load_lora_adapter", json=body).status_code == 404
    assert "evil" not in engine.names()


def _no_blanks() -> dict[str, int]:
    """A model of random weights likes blanks, which JSON allows without end; the byte-level tokens of four of them."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {str(3 + alphabet.index(letter)): -100 for letter in "ĠĊĉč"}


def test_a_tool_is_called_in_the_familys_own_way(engine: Engine) -> None:
    tool = {"type": "function", "function": {"name": "paint", "strict": True, "parameters": COLOURS}}
    choice = {"type": "function", "function": {"name": "paint"}}
    asked = {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False, "logit_bias": _no_blanks()}
    answer = engine.ask(max_tokens=180, ignore_eos=False, **asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"].get("tool_calls"), answer.text
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "paint"
    assert json.loads(call["function"]["arguments"])["colour"] in ("red", "blue")
    # `auto` needs the parser that was found for the template; without one vLLM answers 400.
    assert engine.ask(tools=[tool], tool_choice="auto").status_code == 200


def test_an_answer_follows_its_schema_and_a_bad_schema_hurts_nobody(engine: Engine) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "colours", "schema": COLOURS}}
    answer = engine.ask(response_format=wanted, max_tokens=100, ignore_eos=False, logit_bias=_no_blanks())
    assert answer.status_code == 200, answer.text
    found = json.loads(answer.json()["choices"][0]["message"]["content"])
    assert found["colour"] in ("red", "blue")
    assert found["dark"] in (True, False)
    wanted["json_schema"]["schema"] = {"type": "object", "properties": {"a": {"type": "nonsense"}}}
    assert engine.ask(response_format=wanted).status_code == 400
    assert engine.ask(structured_outputs={"regex": "("}).status_code == 400
    assert engine.client.get("/_check").json() == "well"
    assert engine.ask().status_code == 200


def test_the_signals_follow_the_engine(engine: Engine) -> None:
    engine.ask(max_tokens=100)
    until(lambda: engine.client.get("/_stats").json()["running"] == 0, "the last request is counted as over")
    found = engine.client.get("/_stats").json()
    assert found["slots"] == 4
    assert found["running"] == found["waiting"] == 0
    assert found["tokens_per_s"] > 0
    assert found["ttft_ms"] > 0
    assert 0 <= found["kv_use"] <= 1


def test_an_engine_that_is_stuck_with_requests_in_it_ends_with_its_replica(engine: Engine) -> None:
    """The last test of this engine."""
    core = psutil.Process(core_of(engine))
    failed: list[bool] = []

    def ask() -> None:
        try:
            failed.append(engine.ask(max_tokens=200).status_code != 200)
        except httpx.TransportError:
            failed.append(True)

    began = time.monotonic()
    core.suspend()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    time.sleep(0.5)  # usually its request is there by now; if not, the check asks one of its own
    assert "no sign of life" in engine.client.get("/_check").json()
    assert engine.process.wait(120) == 1
    assert time.monotonic() - began >= STUCK_SECONDS
    thread.join(300)
    assert failed == [True]
    until(lambda: not core.is_running() or core.status() == psutil.STATUS_ZOMBIE, "the engine ends, too")


def core_of(engine: Engine) -> int:
    """Process of the engine's core."""
    children = psutil.Process(engine.process.pid).children()
    (found,) = [child.pid for child in children if "EngineCore" in f"{child.name()} {child.cmdline()}"]
    return found


def until(true: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait for something to become true, or for a process that it asks to be gone."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while not true():
            assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what}"
            time.sleep(0.05)

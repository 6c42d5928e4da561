"""What `status` tells of a model's adapters."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fastserve.artifacts.stores import open_store
from fastserve.cli import render, stories
from fastserve.cluster.kube.story import story_of
from fastserve.cluster.status import current_stage, status_of
from fastserve.plan.adapters import adapter_key
from fastserve.plan.keys import stage_keys
from fastserve.plan.moves import Done, Refuse, Wait
from fastserve.plan.observed import Attempt, AttemptState, Committed, LiveRevision, Observed, RevisionState
from fastserve.plan.pipeline import wanted_revision
from fastserve.plan.stages import Stage
from fastserve.spec.load import read
from fastserve.spec.model import Model

MANIFEST = """
apiVersion: fastserve.dev/v1alpha1
kind: Model
metadata: {name: chat}
spec:
  source: hf://a/b
  serve:
    adapters:
      - {name: small, source: "hf://a/small"}
      - {name: large, source: "hf://a/large"}
      - {name: coming, source: "hf://a/coming"}
      - {name: bad, source: "hf://a/bad"}
      - {name: unread, source: "hf://a/unread"}
"""
NAMES = ("small", "large", "coming", "bad")


@pytest.fixture
def seen() -> tuple[Model, Observed]:
    """A model that serves with an engine for ranks up to 16, and its adapters in every state."""
    (model,) = read(MANIFEST)
    assert isinstance(model, Model)
    digests = {f"hf://a/{name}": f"of {name}" for name in ("b", *NAMES)}
    key = {name: adapter_key(f"of {name}") for name in NAMES}
    source = stage_keys(model, digests)[Stage.SOURCE]
    committed = {source: Committed(Stage.SOURCE, source, "a" * 64, 1)}
    committed[key["small"]] = Committed(Stage.SOURCE, key["small"], "b" * 64, 1, {"rank": 8})
    before = Observed(digests=digests, committed=committed)
    revision = wanted_revision(model, before, stage_keys(model, digests))
    assert revision is not None
    committed[key["large"]] = Committed(Stage.SOURCE, key["large"], "c" * 64, 1, {"rank": revision.lora_rank + 1})
    attempts = {
        key["coming"]: Attempt(1, AttemptState.RUNNING),
        key["bad"]: Attempt(1, AttemptState.FAILED, "SourceInvalid", "it holds a pickle"),
    }
    live = (LiveRevision(revision.digest, RevisionState.READY, replicas=1),)
    known = {revision.digest: revision.to_json()}
    weights = {revision.digest: 100}
    return model, Observed(digests, committed, attempts, revisions=live, weights=weights, known_revisions=known)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is shown in tables."""
    text = io.StringIO()
    monkeypatch.setattr(render, "out", Console(file=text, width=160))
    return text


def test_each_adapter_has_its_state(seen: tuple[Model, Observed], tmp_path: Path, screen: io.StringIO) -> None:
    model, observed = seen
    story = status_of(model, observed, [], open_store(str(tmp_path)), "http://here/v1")
    states = {item["name"]: item["state"] for item in story["adapters"]}
    assert states == {
        "small": "serving",
        "large": "committed",
        "coming": "running",
        "bad": "failed",
        "unread": "waiting",
    }
    small, large = story["adapters"][:2]
    assert (small["rank"], small["digest"], small["revisions"]) == (8, "b" * 64, [observed.revisions[0].digest])
    assert large["revisions"] == []
    found = {"metadata": {"name": "chat", "generation": 1}, "status": {**story, "observedGeneration": 1}}
    assert story_of(found)["adapters"] == story["adapters"]  # as on a cluster
    stories.details({**story, "stage": "-"})
    rows = {line.split()[0]: line.split()[1:] for line in screen.getvalue().splitlines() if line}
    assert rows["small"] == ["serving", "8", "bbbbbbbb"]
    assert rows["bad"] == ["failed", "it", "holds", "a", "pickle"]


def test_an_adapter_of_a_revision_without_traffic_does_not_serve(seen: tuple[Model, Observed], tmp_path: Path) -> None:
    model, observed = seen
    idle = Observed(
        observed.digests,
        observed.committed,
        revisions=observed.revisions,
        known_revisions=observed.known_revisions,
    )
    story = status_of(model, idle, [], open_store(str(tmp_path)), None)
    assert story["adapters"][0]["state"] == "committed"


def test_a_model_without_adapters_lists_none(tmp_path: Path, screen: io.StringIO) -> None:
    (model,) = read(MANIFEST.partition("    adapters:")[0].replace("serve:", "serve: {}"))
    assert isinstance(model, Model)
    story = status_of(model, Observed(), [], open_store(str(tmp_path)), None)
    assert story["adapters"] == []
    stories.details({**story, "stage": "-"})
    assert "ADAPTER" not in screen.getvalue()


def test_the_stage_is_what_begins_else_what_is_waited_for() -> None:
    """`kubectl get models` shows it in its one line."""
    train = Wait(because="Stage train is running.", stage="train")
    refused = Refuse(because="", reason="GateFailed", stage="evaluate")
    assert current_stage([]) == current_stage([Done(because="")]) == "-"
    assert current_stage([train]) == "train"
    assert current_stage([train, refused]) == "evaluate"

"""A rollback by annotation, with the operator killed before or after any of its writes: obeyed once, by whoever comes
next."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_files import write_model
from small_cluster import Killed, Moments, SmallCluster, small_cluster

from fastserve.cluster.kube.rollback import ROLLBACK
from fastserve_operator import acceptance
from fastserve_operator.model import Namespace

MODEL = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models/small"
STATE = "/api/v1/namespaces/demo/configmaps/small-state"
LOOKS = 400


class Life:
    """A Model with two revisions, and one operator after the other."""

    def __init__(self, cluster: SmallCluster, source: Path) -> None:
        self.cluster = cluster
        self.source = source
        self.tended: Namespace = cluster.operator()
        self.deaths = 0

    def apply(self, context: int, asked: str | None = None) -> None:
        spec = {"source": f"file://{self.source}", "serve": {"context": context}}
        value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "spec": spec}
        metadata = {"name": "small", "annotations": {} if asked is None else {ROLLBACK: asked}}
        self.cluster.objects.put(MODEL, {**value, "metadata": metadata})

    def until(self, true: Callable[[], object], what: str) -> None:
        for _ in range(LOOKS):
            if true():
                return
            try:
                self.tended.tend()
            except Killed:
                self.deaths += 1
                self.tended = self.cluster.operator()
            self.cluster.ray.go_on()
            time.sleep(0.001)  # data is read in a thread
        raise AssertionError(f"never: {what}: {json.dumps(self.status, indent=1)[-3000:]}")

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.cluster.objects.objects[MODEL].get("status") or {})

    def serves(self, reason: str, generation: int) -> bool:
        ready = next((item for item in self.status.get("conditions", []) if item["type"] == "Ready"), {})
        told = (ready.get("status"), ready.get("reason"), ready.get("observedGeneration"))
        return told == ("True", reason, generation) and len(self.cluster.ray.apps) == 1

    def two_revisions(self) -> tuple[str, str]:
        found = []
        for generation, context in enumerate((16, 32), 1):
            self.apply(context)
            self.until(lambda generation=generation: self.serves("Ready", generation), "served")
            found.append(self.status["revision"])
        first, second = found
        assert first != second
        return first, second


def source_of(folder: Path) -> Path:
    write_model(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_it_is_obeyed_once_whenever_the_operator_dies(tmp_path: Path, after: bool) -> None:
    source, died = source_of(tmp_path), 0
    for number in range(1, 100):
        (tmp_path / str(number)).mkdir()
        with small_cluster(tmp_path / str(number)) as cluster:
            life = Life(cluster, source)
            first, second = life.two_revisions()
            cluster.moments = Moments(number, after, happens=die)
            life.tended = cluster.operator()
            life.apply(32, asked="previous@1")
            life.until(lambda life=life, first=first: life.status.get("revision") == first, "rolled back")
            life.until(lambda life=life: life.serves("Ready", 2), "settled")
            assert life.status["rollback"]["revision"].startswith(first)
            assert life.status["pin"]["insteadOf"].startswith(second)
            pins = [name for name in cluster.objects.objects[STATE]["data"] if name in ("pin.json", "rollback.json")]
            assert len(pins) == 2
            for _ in range(3):
                life.tended.tend()
            assert life.status["revision"] == first, "not one further back"
            died += life.deaths
            if cluster.moments.count < number:
                break
    assert died > 5


def die() -> None:
    raise Killed


class AtOnce(threading.Thread):
    """A thread that has its result when it was begun, as one of a quick survey may have."""

    def start(self) -> None:
        super().start()
        self.join(0.2)  # it cannot end: what comes after its result waits for who begins it


@pytest.mark.parametrize("thread", [threading.Thread, AtOnce])
def test_a_wish_that_comes_with_another_manifest_is_over_when_that_one_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread: type[threading.Thread]
) -> None:
    """As on a laptop: a rollback holds until the manifest changes."""
    monkeypatch.setattr(acceptance, "threading", SimpleNamespace(Thread=thread, Lock=threading.Lock))
    source = source_of(tmp_path)
    (tmp_path / "c").mkdir()
    with small_cluster(tmp_path / "c") as cluster:
        life = Life(cluster, source)
        first, second = life.two_revisions()
        life.apply(8, asked="previous")
        life.until(lambda: life.serves("Ready", 3), "the new one serves")
        assert life.status["revision"] not in (first, second)
        assert "pin" not in life.status
        assert life.status["rollback"]["asked"] == "previous"

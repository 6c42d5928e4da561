"""Reading through what is kept: in whatever order things come, it ends as the API server has it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import pytest
from followed import followed
from hypothesis import given, settings
from hypothesis import strategies as st
from kube_objects import KubeObjects, served
from kubernetes import client

from fastserve.cluster.kube.api import CONFIG_MAPS, EVENTS, MODELS, KubeApi, Resource
from fastserve.cluster.kube.home import STATES
from fastserve.cluster.kube.watched import JUST_SECONDS, LIST_SECONDS, SILENT_SECONDS, Watched, WatchedApi
from fastserve.errors import ClusterFailed, StateChanged

PLACE = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models"
MAPS = "/api/v1/namespaces/demo/configmaps"
NAMES = ("a", "b", "c")
LABELS = "mine"


class Wire(WatchedApi):
    """With the objects at the other end of the wire, and watches that break where a test says so."""

    def __init__(self, objects: KubeObjects) -> None:
        super().__init__(client.ApiClient(client.Configuration()))
        self.objects = objects
        self.seconds = 0.0
        self.most_events = 1000
        self.breaks = False
        self.refused = False

    def keep_it(self, namespace: str | None = "demo", changed: Callable[[], None] = lambda: None) -> Watched:
        found = Watched(self, MODELS, namespace, LABELS, changed, lambda: self.seconds)
        self.watched = (found,)
        return found

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, Any] | None, content: str
    ) -> tuple[int, dict[str, Any]]:
        words = {key: [str(value)] for key, value in (query or {}).items()}
        return self.objects.answer(method, unquote(path), words, json.loads(json.dumps(body)), content)

    def watch(
        self, resource: Resource, namespace: str | None, version: str, labels: str = "", silent_seconds: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        if self.refused:
            raise ClusterFailed("you may not watch models")
        told = self.objects.since(resource.path(namespace), {"labelSelector": [labels]}, int(version))
        return self._until_it_breaks(told[: self.most_events])

    def _until_it_breaks(self, told: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        yield from told
        if self.breaks:
            raise ClusterFailed("it broke")

    def lists(self) -> int:
        return sum(call == ("GET", PLACE) for call in self.objects.calls)

    def truth(self) -> list[dict[str, Any]]:
        return KubeApi.list(self, MODELS, "demo", LABELS)

    def kept(self) -> list[dict[str, Any]]:
        return self.list(MODELS, "demo", LABELS)


def wish(name: str, number: int, labelled: bool = True) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "demo", "labels": {LABELS: "yes"} if labelled else {}}
    return {
        "apiVersion": MODELS.api_version,
        "kind": "Model",
        "metadata": metadata,
        "spec": {"source": f"file:///{number}"},
    }


class World:
    """Foreign writers, a watch, and answers to our own writes that come late."""

    def __init__(self) -> None:
        self.wire = Wire(KubeObjects())
        self.watched = self.wire.keep_it()
        self.late: list[dict[str, Any]] = []

    def foreign(self, name: str, number: int) -> None:
        self.wire.objects.put(f"{PLACE}/{name}", wish(name, number, labelled=number % 4 != 3))

    def removed(self, name: str, number: int) -> None:
        if f"{PLACE}/{name}" in self.wire.objects.objects:
            self.wire.objects.delete(f"{PLACE}/{name}")

    def own(self, name: str, number: int) -> None:
        """A write that follows from what is kept; who reads sees it."""
        found = next((item for item in self.wire.kept() if item["metadata"]["name"] == name), None)
        with suppress(StateChanged):
            if found is None:
                made = self.wire.create(MODELS, wish(name, number))
            else:
                patch = {"spec": {"source": f"own:///{number}"}}
                made = self.wire.merge(MODELS, "demo", name, patch, found["metadata"]["resourceVersion"])
            assert made["metadata"] in [item["metadata"] for item in self.wire.kept()]

    def own_late(self, name: str, number: int) -> None:
        """The same, and the answer is on its way for a while."""
        body = {"metadata": {}, "status": {"stage": str(number)}}
        status, answer = self.wire.objects.answer("PATCH", f"{PLACE}/{name}", {}, body, "application/merge-patch+json")
        if status == 200:
            self.late.append(answer)

    def answers(self, name: str, number: int) -> None:
        while self.late:
            self.watched.took(self.late.pop(number % len(self.late)))

    def follows(self, name: str, number: int) -> None:
        """A watch that ends or breaks after some events."""
        self.wire.most_events, self.wire.breaks = number, number % 2 == 0
        with suppress(ClusterFailed):
            self.watched.follow(patience_seconds=0.0)
        self.wire.most_events, self.wire.breaks = 1000, False

    def compacts(self, name: str, number: int) -> None:
        self.wire.objects.compacted = self.wire.objects.version()

    def passes(self, name: str, number: int) -> None:
        self.wire.seconds += 40.0 * number

    def reads(self, name: str, number: int) -> None:
        self.wire.kept()

    def another_acted(self, name: str, number: int) -> None:
        self.wire.anew()
        assert self.wire.kept() == self.wire.truth()


DEEDS = ("foreign", "foreign", "removed", "own", "own_late", "answers", "follows", "compacts", "passes", "reads")


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from((*DEEDS, "another_acted")), st.sampled_from(NAMES), st.integers(0, 6)), max_size=40
    )
)
def test_it_ends_as_the_api_server_has_it(deeds: list[tuple[str, str, int]]) -> None:
    world = World()
    for deed, name, number in deeds:
        getattr(world, deed)(name, number)
    world.answers("", 0)
    wire = world.wire
    for _ in range(3):  # a watch that cannot go on, a list, and a watch from there
        wire.kept()
        world.watched.follow(patience_seconds=0.0)
    listed = wire.lists()
    assert wire.kept() == wire.truth()
    assert wire.lists() == listed + 1, "only the truth was listed"


def test_a_change_is_seen_without_a_list() -> None:
    wire, told = Wire(KubeObjects()), []
    watched = wire.keep_it(changed=lambda: told.append(len(told)))
    assert wire.kept() == []
    wire.objects.put(f"{PLACE}/a", wish("a", 1))
    watched.follow(0.0)
    assert [item["metadata"]["name"] for item in wire.kept()] == ["a"]
    assert (wire.lists(), len(told)) == (1, 1)


def test_a_watch_that_cannot_go_on_asks_for_a_list() -> None:
    wire, told = Wire(KubeObjects()), []
    watched = wire.keep_it(changed=lambda: told.append("changed"))
    wire.kept()
    wire.objects.put(f"{PLACE}/a", wish("a", 1))
    wire.objects.compacted = wire.objects.version()
    watched.follow(0.0)
    assert told == ["changed"]
    wire.seconds += JUST_SECONDS
    assert len(wire.kept()) == 1
    wire.objects.put(f"{PLACE}/b", wish("b", 1))
    watched.follow(0.0)
    wire.seconds += JUST_SECONDS
    assert len(wire.kept()) == 2
    assert wire.lists() == 2


@pytest.mark.parametrize(
    ("seconds", "heard", "lists"),
    [
        (SILENT_SECONDS - 1, False, 1),
        (SILENT_SECONDS, False, 2),
        (LIST_SECONDS - 1, True, 1),
        (LIST_SECONDS, True, 2),
    ],
)
def test_neither_a_silent_watch_nor_an_old_list_is_believed(seconds: float, heard: bool, lists: int) -> None:
    wire = Wire(KubeObjects())
    watched = wire.keep_it()
    wire.kept()
    watched.follow(0.0)
    wire.seconds += seconds
    if heard:
        watched.follow(0.0)
    wire.kept()
    assert wire.lists() == lists


def test_where_nothing_may_be_watched_every_look_lists() -> None:
    wire = Wire(KubeObjects())
    wire.refused = True
    watched = wire.keep_it()
    for number in range(1, 4):
        wire.objects.put(f"{PLACE}/a", wish("a", number))
        assert wire.kept() == wire.truth()
        with pytest.raises(ClusterFailed, match="may not watch"):
            watched.follow(0.0)
        wire.seconds += JUST_SECONDS


def test_a_watch_that_broke_is_not_believed_until_there_is_another() -> None:
    wire = Wire(KubeObjects())
    watched = wire.keep_it()
    wire.kept()
    wire.breaks = True
    with pytest.raises(ClusterFailed):
        watched.follow(0.0)
    wire.seconds += JUST_SECONDS
    wire.objects.put(f"{PLACE}/a", wish("a", 1))
    assert len(wire.kept()) == 1
    wire.breaks = False
    watched.follow(0.0)
    wire.seconds += JUST_SECONDS
    listed = wire.lists()
    wire.kept()
    assert wire.lists() == listed


def test_an_api_server_that_is_away_is_told_and_what_was_kept_is_not_taken_for_the_truth() -> None:
    wire = Wire(KubeObjects())
    wire.keep_it()
    wire.kept()
    wire.seconds += JUST_SECONDS
    wire.objects.down = True
    with pytest.raises(ClusterFailed):
        wire.kept()
    wire.objects.down = False
    wire.objects.put(f"{PLACE}/a", wish("a", 1))
    assert len(wire.kept()) == 1


def test_nothing_is_watched_before_somebody_reads() -> None:
    """A replica that waits for the lease keeps nothing."""
    wire = Wire(KubeObjects())
    watched = wire.keep_it()
    wire.objects.put(f"{PLACE}/a", wish("a", 1))
    watched.follow(0.0)
    assert watched._kept.all(None) == []
    assert wire.objects.calls == []


def test_versions_that_cannot_be_compared_are_not_kept() -> None:
    wire = Wire(KubeObjects())
    watched = wire.keep_it()
    wire.objects.put(f"{PLACE}/a", wish("a", 1))
    wire.objects.version = lambda: "x7"  # type: ignore[assignment, return-value, method-assign]
    assert [len(wire.kept()), len(wire.kept())] == [1, 1]
    assert wire.lists() == 2
    watched.follow(0.0)
    assert watched._kept.all(None) == []


def test_other_collections_and_selectors_and_namespaces_go_straight_to_the_api_server() -> None:
    objects = KubeObjects()
    wire = Wire(objects)
    wire.keep_it()
    wire.kept()
    calls = len(objects.calls)
    wire.list(MODELS, "demo")
    wire.list(MODELS, "other", LABELS)
    wire.list(EVENTS, "demo", LABELS)
    wire.list(MODELS, "demo", LABELS, fields="metadata.name=a")
    assert len(objects.calls) == calls + 4
    wire.create(EVENTS, {"metadata": {"name": "e", "namespace": "demo", "labels": {LABELS: ""}}})
    wire.create(MODELS, {"metadata": {"name": "m", "namespace": "other", "labels": {LABELS: ""}}})
    assert wire.kept() == []


def test_all_namespaces_are_one_collection() -> None:
    wire = Wire(KubeObjects())
    watched = wire.keep_it(namespace=None)
    for namespace in ("demo", "other"):
        path = f"/apis/fastserve.dev/v1alpha1/namespaces/{namespace}/models/a"
        value = wish("a", 1)
        wire.objects.put(path, {**value, "metadata": {**value["metadata"], "namespace": namespace}})
    assert len(wire.list(MODELS, None, LABELS)) == 2
    assert [item["metadata"]["namespace"] for item in wire.list(MODELS, "other", LABELS)] == ["other"]
    wire.objects.delete(PLACE + "/a")
    watched.follow(0.0)
    assert [item["metadata"]["namespace"] for item in wire.list(MODELS, None, LABELS)] == ["other"]
    assert len(wire.objects.calls) == 1


def test_a_status_that_we_wrote_is_read_and_a_dry_run_is_not() -> None:
    wire = Wire(KubeObjects())
    wire.keep_it()
    wire.objects.put(f"{PLACE}/a", wish("a", 1))
    (found,) = wire.kept()
    wire.apply(MODELS, wish("a", 2), dry_run=True)
    assert wire.kept() == [found]
    assert wire.apply_status(MODELS, found, {"stage": "train"})
    assert wire.kept()[0]["status"] == {"stage": "train"}
    assert wire.lists() == 1


# -- over the wire -----------------------------------------------------------------------------------------------------


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_over_http_a_change_is_seen_and_a_watch_that_breaks_is_taken_up_again() -> None:
    objects = KubeObjects()
    with served(objects, WatchedApi) as api:
        watched = api.keep(CONFIG_MAPS, "demo", STATES)
        labels = {"app.kubernetes.io/managed-by": "fastserve", "fastserve.dev/model": "m"}

        def names() -> list[str]:
            return [item["metadata"]["name"] for item in api.list(CONFIG_MAPS, "demo", STATES)]

        assert names() == []
        with followed(watched, objects.break_watches):
            for number in range(3):
                objects.put(f"{MAPS}/s{number}", {"metadata": {"name": f"s{number}", "labels": labels}})
                objects.put(f"{MAPS}/other", {"metadata": {"name": "other", "labels": {"number": str(number)}}})
                until(lambda number=number: names() == [f"s{at}" for at in range(number + 1)], "a change is not seen")
                objects.break_watches()
            objects.compacted = objects.version()
            objects.delete(f"{MAPS}/s1")
            until(lambda: names() == ["s0", "s2"], "a deletion is not seen")


def test_over_http_a_watch_that_says_nothing_is_broken_and_one_that_is_refused_says_so() -> None:
    objects = KubeObjects()
    with served(objects) as api:
        with pytest.raises(ClusterFailed, match="does not answer"):
            list(api.watch(MODELS, "demo", "0", silent_seconds=0.1))
        objects.down = True
        with pytest.raises(ClusterFailed, match="watch models"):
            api.watch(MODELS, "demo", "0")
        objects.down = False
        objects.put(f"{PLACE}/a", wish("a", 1))
        objects.compacted = objects.version() + 1
        (told,) = api.watch(MODELS, "demo", "0")
        assert told["type"] == "ERROR"

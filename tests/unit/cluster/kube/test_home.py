from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kube_objects import KubeObjects, served

from fastserve.cluster.home import Home
from fastserve.cluster.kube.api import KubeApi
from fastserve.cluster.kube.home import RETRY, KubeHome
from fastserve.errors import NameConflict, StateChanged, StoreFailed
from fastserve.plan.observed import Pin
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.model import Model

MODELS = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models"
MAPS = "/api/v1/namespaces/demo/configmaps"


def wish(name: str, **more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "fastserve.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": name, "namespace": "demo", **more},
        "spec": {"source": "hf://org/small"},
    }


def model(name: str) -> Model:
    return Model.model_validate(wish(name) | {"metadata": {"name": name}}, by_alias=True)


@pytest.fixture
def objects() -> KubeObjects:
    found = KubeObjects()
    for name in ("one", "two"):
        found.put(f"{MODELS}/{name}", wish(name))
    return found


def home(api: KubeApi, folder: Path) -> KubeHome:
    found = KubeHome(api, "demo", folder, "s3://bucket/demo")
    found.look()
    return found


def test_what_is_accepted_stands_in_one_object_that_goes_with_its_model(
    api: KubeApi, objects: KubeObjects, tmp_path: Path
) -> None:
    first = home(api, tmp_path)
    first.want(model("one"), {"hf://org/small": "d" * 64}, {"k": 2})
    assert [call for call in objects.calls if call[0] != "GET"] == [("POST", MAPS)]
    again = home(api, tmp_path / "elsewhere")
    assert again.model("one") == model("one")
    assert again.resolved("one") == {"hf://org/small": "d" * 64}
    assert again.forgiven("one") == {"k": 2}
    assert again.model_names() == ["one"]
    objects.delete(f"{MODELS}/one")
    assert f"{MAPS}/one-state" not in objects.objects


def test_a_value_that_is_there_is_not_written_again(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    found = home(api, tmp_path)
    found.want(model("one"), {}, {})
    before = len(objects.calls)
    found.want(model("one"), {}, {})
    found.write_json("models/one/resolved.json", {})
    found.remove("models/one/pin.json")
    assert objects.calls[before:] == []


def test_another_generation_or_another_retry_is_asked_anew(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    found = home(api, tmp_path)
    found.want(model("one"), {}, {})
    assert found.is_accepted(objects.objects[f"{MODELS}/one"])
    objects.put(f"{MODELS}/one", wish("one", annotations={RETRY: "1"}))
    assert not found.is_accepted(objects.objects[f"{MODELS}/one"])
    found.look()
    found.want(model("one"), {}, {})
    objects.put(f"{MODELS}/one", wish("one") | {"spec": {"source": "hf://org/other"}})
    assert not found.is_accepted(objects.objects[f"{MODELS}/one"])


def test_who_writes_second_is_told_and_overwrites_nothing(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    home(api, tmp_path).want(model("one"), {}, {})
    first, second = home(api, tmp_path), home(api, tmp_path)
    first.set_pin("one", Pin("a" * 64, "b" * 64))
    with pytest.raises(StateChanged, match="one-state"):
        second.set_weights("one", {"b" * 64: 100})
    again = home(api, tmp_path)
    assert again.pin("one") is not None
    assert again.weights("one") == {}
    again.set_weights("one", {"b" * 64: 100})
    assert home(api, tmp_path).weights("one") == {"b" * 64: 100}


def test_an_object_of_somebody_else_is_left_alone(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    theirs = objects.put(f"{MAPS}/one-state", {"metadata": {"name": "one-state"}, "data": {"model.json": "{}"}})
    found = home(api, tmp_path)
    assert found.model("one") is None
    with pytest.raises(NameConflict, match="one-state"):
        found.want(model("one"), {}, {})
    assert objects.objects[f"{MAPS}/one-state"] == theirs


def test_a_state_whose_label_was_taken_off_is_found_again(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    """Else every look would find nothing, and every write that it is there."""
    first = home(api, tmp_path)
    first.want(model("one"), {}, {})
    first.set_pin("one", Pin("a" * 64, "b" * 64))
    del objects.objects[f"{MAPS}/one-state"]["metadata"]["labels"]["fastserve.dev/model"]
    found = home(api, tmp_path)
    assert found.model_names() == []
    with pytest.raises(StateChanged):
        found.want(model("one"), {}, {})
    assert home(api, tmp_path).pin("one") == Pin("a" * 64, "b" * 64)


def test_what_an_earlier_model_of_the_name_left_is_not_believed(
    api: KubeApi, objects: KubeObjects, tmp_path: Path
) -> None:
    home(api, tmp_path).want(model("one"), {}, {})
    objects.objects[f"{MODELS}/one"]["metadata"]["uid"] = "uid-of-the-next"
    found = home(api, tmp_path)
    assert found.model_names() == []
    with pytest.raises(NameConflict):
        found.want(model("one"), {}, {})


def test_a_damaged_value_is_named(api: KubeApi, objects: KubeObjects, tmp_path: Path) -> None:
    home(api, tmp_path).want(model("one"), {}, {})
    objects.objects[f"{MAPS}/one-state"]["data"]["weights.json"] = "{"
    with pytest.raises(StoreFailed, match=r"demo/one-state: weights\.json is damaged"):
        home(api, tmp_path).weights("one")


def test_what_one_model_kept_and_nobody_can_read_is_no_matter_of_another(
    api: KubeApi, objects: KubeObjects, tmp_path: Path
) -> None:
    first = home(api, tmp_path)
    for name in ("one", "two"):
        first.want(model(name), {}, {})
        first.start_serving(f"{name}-aaaaaaaa", revision(name, "a" * 64))
    data = objects.objects[f"{MAPS}/one-state"]["data"]
    data["model.json"] = '{"spec": {"of": "another version"}}'
    found = home(api, tmp_path)
    assert (found.model("one"), found.model("two")) == (None, model("two"))
    assert list(found.damaged) == ["one"]
    assert set(found.serving()) == {"one-aaaaaaaa", "two-aaaaaaaa"}, "what serves goes on"
    assert found.model_names() == ["one", "two"]
    data["serving__one-aaaaaaaa.json"] = "{"
    found = home(api, tmp_path)
    assert set(found.serving()) == {"two-aaaaaaaa"}
    found.look()
    found.want(model("one"), {}, {})
    assert found.model("one") == model("one")
    assert found.damaged == {}


def test_what_serves_is_read_once_a_look_and_anew_after_a_change(
    api: KubeApi, objects: KubeObjects, tmp_path: Path
) -> None:
    found = home(api, tmp_path)
    found.want(model("one"), {}, {})
    assert found.serving() == {}
    found.start_serving("one-aaaaaaaa", revision("one", "a" * 64))
    assert found.serving() == {"one-aaaaaaaa": revision("one", "a" * 64)}
    assert found.serving_since()["one-aaaaaaaa"] > 0
    found.stop_serving("one-aaaaaaaa")
    assert found.serving() == {}
    assert found.listed("models/one/*.json") == home(api, tmp_path).listed("models/one/*.json")
    assert found.listed("models/none/*.json") == []


def test_what_can_be_found_out_again_stays_in_the_scratch_folder(
    api: KubeApi, objects: KubeObjects, tmp_path: Path
) -> None:
    found = home(api, tmp_path)
    found.create()
    found.write_json("cache/facts/x.json", {"rows": 3})
    assert (tmp_path / "cache/facts/x.json").exists()
    assert found.read_json("cache/facts/x.json") == {"rows": 3}
    assert [call for call in objects.calls if call[0] != "GET"] == []


names = st.sampled_from(["one", "two"])
digests = st.sampled_from(["a" * 64, "b" * 64])
operations = st.one_of(
    st.tuples(st.just("want"), names),
    st.tuples(st.just("unwant"), names),
    st.tuples(st.just("resolved"), names, digests),
    st.tuples(st.just("pin"), names, digests),
    st.tuples(st.just("unpin"), names),
    st.tuples(st.just("keep"), names, digests),
    st.tuples(st.just("serve"), names, digests),
    st.tuples(st.just("unserve"), names, digests),
)


def carry_out(home: Home, operation: tuple[str, ...]) -> None:
    what, name, *rest = operation
    match what:
        case "want":
            home.want(model(name), {"hf://org/small": "d" * 64}, {"k": 1})
        case "unwant":
            home.unwant(name)
        case "resolved":
            home.set_resolved(name, "hf://org/small", rest[0])
        case "pin":
            home.set_pin(name, Pin(rest[0], "c" * 64))
        case "unpin":
            home.set_pin(name, None)
        case "keep":
            home.keep_revision(revision(name, rest[0]), 1.0)
        case "serve":
            home.start_serving(f"{name}-{rest[0][:8]}", revision(name, rest[0]))
        case "unserve":
            home.stop_serving(f"{name}-{rest[0][:8]}")


def revision(name: str, digest: str) -> Revision:
    return Revision(name, Stage.SOURCE, digest, digest, {"task": "generate"})


def seen(home: Home) -> dict[str, Any]:
    names = ("one", "two")
    return {
        "wanted": home.model_names(),
        "models": [home.model(name) for name in names],
        "ended": [home.ended(name) for name in names],
        "resolved": [home.resolved(name) for name in names],
        "forgiven": [home.forgiven(name) for name in names],
        "pins": [home.pin(name) for name in names],
        "revisions": [home.revisions(name) for name in names],
        "serving": home.serving(),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(operations, max_size=12))
def test_a_cluster_keeps_what_a_laptop_keeps(
    steps: list[tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is done, both tell the same; also whoever looks afresh."""
    folder = tmp_path_factory.mktemp("homes")
    laptop = Home(folder / "laptop")
    laptop.create()
    objects = KubeObjects()
    for name in ("one", "two"):
        objects.put(f"{MODELS}/{name}", wish(name))
    with served(objects) as api:
        cluster = home(api, folder / "scratch")
        for step in steps:
            carry_out(laptop, step)
            carry_out(cluster, step)
        assert seen(cluster) == seen(laptop)
        assert seen(home(api, folder / "other")) == seen(laptop)

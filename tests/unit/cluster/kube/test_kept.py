from __future__ import annotations

from typing import Any

from fastserve.cluster.kube.kept import Kept


def value(name: str, version: int, **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "demo", "resourceVersion": str(version), **metadata}}


def versions(kept: Kept, namespace: str | None = "demo") -> dict[str, int]:
    return {item["metadata"]["name"]: int(item["metadata"]["resourceVersion"]) for item in kept.all(namespace)}


def test_what_is_newer_stays_whatever_comes_first() -> None:
    kept = Kept()
    kept.put(value("a", 7))
    kept.put(value("a", 5))
    kept.drop(value("a", 6))
    assert versions(kept) == {"a": 7}
    kept.put(value("a", 12))  # as a number, not as a text
    assert versions(kept) == {"a": 12}


def test_an_answer_that_comes_after_the_object_is_gone_brings_nothing_back() -> None:
    kept = Kept()
    kept.put(value("a", 3))
    kept.drop(value("a", 9))
    kept.put(value("a", 8))
    assert versions(kept) == {}
    kept.put(value("a", 10))  # another one of its name
    assert versions(kept) == {"a": 10}


def test_an_older_object_that_a_list_did_not_have_is_gone() -> None:
    kept = Kept()
    kept.replace([value("b", 4)], 9)
    kept.put(value("a", 8))
    assert versions(kept) == {"b": 4}
    kept.put(value("a", 10))
    assert versions(kept) == {"a": 10, "b": 4}


def test_a_list_takes_nothing_back_that_is_known_of_later() -> None:
    kept = Kept()
    kept.put(value("new", 12))
    kept.put(value("changed", 11))
    kept.put(value("gone", 3))
    kept.drop(value("gone", 13))
    kept.put(value("long gone", 2))
    kept.replace([value("changed", 4), value("gone", 3), value("other", 5)], 10)
    assert versions(kept) == {"changed": 11, "new": 12, "other": 5}


def test_a_server_that_was_put_back_to_a_backup_is_believed() -> None:
    kept = Kept()
    kept.replace([value("a", 100)], 200)
    kept.put(value("b", 210))
    kept.drop(value("c", 211))
    kept.replace([value("a", 50), value("c", 40)], 60)
    assert versions(kept) == {"a": 50, "c": 40}
    kept.put(value("a", 61))
    assert versions(kept)["a"] == 61


def test_one_that_only_waited_for_its_last_finalizer_is_gone() -> None:
    kept = Kept()
    kept.put(value("a", 3, finalizers=["f"], deletionTimestamp="2027-01-01T00:00:00Z"))
    assert versions(kept) == {"a": 3}
    kept.put(value("a", 3, finalizers=[], deletionTimestamp="2027-01-01T00:00:00Z"))
    assert versions(kept) == {}
    kept.put(value("a", 3, finalizers=["f"], deletionTimestamp="2027-01-01T00:00:00Z"))
    assert versions(kept) == {}


def test_what_did_not_change_is_the_very_same_object_and_holds_nothing_that_nobody_reads() -> None:
    kept = Kept()
    kept.replace(kept.slim([value("a", 3, managedFields=[{"manager": "somebody"}])]), 5)
    (first,) = kept.all("demo")
    assert first == value("a", 3)
    kept.put(value("a", 3))
    kept.replace(kept.slim([value("a", 3, managedFields=[{"manager": "somebody"}])]), 9)
    assert kept.all("demo")[0] is first


def test_namespaces_are_apart() -> None:
    kept = Kept()
    kept.put(value("a", 3))
    kept.put({"metadata": {"name": "a", "namespace": "other", "resourceVersion": "4"}})
    assert versions(kept, "other") == {"a": 4}
    assert [item["metadata"]["namespace"] for item in kept.all(None)] == ["demo", "other"]
    assert kept.all("nowhere") == []

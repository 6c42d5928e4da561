"""How many replicas a revision may have beside others: a surge of one, never twice the fleet."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.plan.observed import Pin
from fastserve.plan.rollout import replica_bounds
from fastserve.spec.serve import Serve


def serve(least: int, most: int, rollout: bool = True) -> Serve:
    steps = {"rollout": {"steps": [5, 25, 100]}} if rollout else {}
    return Serve.model_validate({"replicas": {"min": least, "max": most}, **steps})


def test_alone_a_revision_has_what_the_manifest_says() -> None:
    assert replica_bounds(serve(2, 8), {}, "new") == (2, 8)
    assert replica_bounds(serve(2, 8), {"new": 100}, "new") == (2, 8)
    assert replica_bounds(serve(0, 8), {"new": 100}, "new") == (0, 8)


def test_a_new_revision_starts_with_one_replica() -> None:
    weights = {"old": 100}
    assert replica_bounds(serve(4, 8), weights, "new") == (1, 1)
    assert replica_bounds(serve(0, 8), weights, "new") == (1, 1), "it must come up once to be known good"
    assert replica_bounds(serve(4, 8), weights, "old") == (4, 8)


def test_while_traffic_is_shared_replicas_follow() -> None:
    weights = {"old": 75, "new": 25}
    assert replica_bounds(serve(4, 8), weights, "new") == (1, 2)
    assert replica_bounds(serve(4, 8), weights, "old") == (3, 6)
    assert replica_bounds(serve(0, 1), weights, "new") == (0, 1)


def test_without_steps_and_in_a_rollback_it_comes_up_whole() -> None:
    assert replica_bounds(serve(4, 8, rollout=False), {"old": 100}, "new") == (4, 8)
    assert replica_bounds(serve(4, 8), {"bad": 100}, "good", Pin("good", "bad")) == (4, 8)


@given(least=st.integers(0, 50), more=st.integers(0, 50), share=st.integers(1, 99))
def test_there_is_never_more_than_one_replica_on_top(least: int, more: int, share: int) -> None:
    most = max(1, least + more)
    section, weights = serve(least, most), {"old": 100 - share, "new": share}
    (new_least, new_most), (old_least, old_most) = (replica_bounds(section, weights, name) for name in ("new", "old"))
    assert least <= new_least + old_least <= least + 1
    assert most <= new_most + old_most <= most + 1
    assert 0 <= new_least <= new_most
    assert new_most >= 1
    assert 0 <= old_least <= old_most
    assert old_most >= 1

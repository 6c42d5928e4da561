from __future__ import annotations

import pytest
from kube_objects import KubeObjects

from fastserve.cluster.kube.api import KubeApi
from fastserve.cluster.kube.lease import LEASE_SECONDS, Lease
from fastserve.errors import ClusterFailed


class Clock:
    """Seconds that go when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def two(api: KubeApi) -> tuple[Lease, Clock, Lease, Clock]:
    one, other = Clock(), Clock()
    other.now = 77.0  # clocks need not agree
    return Lease(api, "demo", "op", "one", clock=one), one, Lease(api, "demo", "op", "other", clock=other), other


def test_one_of_two_acts(api: KubeApi) -> None:
    first, _, second, _ = two(api)
    assert first.renew()
    assert not second.renew()
    assert (first.held, second.held) == (True, False)
    assert first.renew()


def test_who_does_not_renew_stops_acting_before_another_may_begin(api: KubeApi) -> None:
    first, clock, second, other = two(api)
    assert first.renew()
    assert not second.renew()
    overlap = False
    taken_at = None
    for second_by_second in range(1, 2 * LEASE_SECONDS):
        clock.now += 1
        other.now += 1
        second.renew()
        overlap |= first.held and second.held
        if second.held and taken_at is None:
            taken_at = second_by_second
    assert not overlap
    assert taken_at == LEASE_SECONDS
    assert not first.renew()
    assert (first.term, second.term) == (1, 1)


def test_each_time_that_it_is_taken_is_a_term(api: KubeApi) -> None:
    first, clock, second, _ = two(api)
    for _ in range(5):
        assert first.renew()
        clock.now += LEASE_SECONDS / 5
    assert first.term == 1
    clock.now += LEASE_SECONDS  # nobody else took it, and somebody might have
    assert first.renew()
    assert first.term == 2
    first.release()
    assert second.renew()
    assert not first.renew()
    second.release()
    assert first.renew()
    assert (first.term, second.term) == (3, 1)


def test_who_releases_it_hands_over_at_once(api: KubeApi) -> None:
    first, _, second, _ = two(api)
    assert first.renew()
    assert not second.renew()
    first.release()
    assert not first.held
    assert second.renew()
    first.release()  # what is another's is not released
    assert second.renew()


def test_an_api_server_that_is_away_takes_the_lease_only_with_time(api: KubeApi, objects: KubeObjects) -> None:
    first, clock, _, _ = two(api)
    assert first.renew()
    objects.down = True
    with pytest.raises(ClusterFailed):
        first.renew()
    assert first.held
    clock.now += LEASE_SECONDS
    assert not first.held

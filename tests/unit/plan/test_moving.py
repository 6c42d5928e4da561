from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.plan.moving import LEAVE_SECONDS, Route, Standing, stay

standings = st.dictionaries(st.sampled_from("abc"), st.builds(Standing, st.integers(0, 3), st.booleans()))
routes = st.none() | st.builds(Route, st.sampled_from("abc"), st.floats(0, 300))


@given(st.sampled_from("abc"), standings, routes)
def test_what_answers_is_never_given_up_for_what_does_not(
    wanted: str, standing: dict[str, Standing], before: Route | None
) -> None:
    found = stay(wanted, standing, before)
    assert wanted in found.heads
    assert found.routed in found.heads
    answering = {head for head, item in standing.items() if item.answers}
    if answering:
        assert found.routed in answering or not answering - {wanted}
        assert answering & found.heads
    if before is None or before.head != found.routed or before.seconds < LEAVE_SECONDS:
        assert answering <= found.heads, "an old place is left only when requests have gone elsewhere for a while"
    assert found.moves == bool(found.heads - {wanted})


@given(st.sampled_from("abc"), standings, routes)
def test_requests_change_their_place_only_for_the_wanted_one(
    wanted: str, standing: dict[str, Standing], before: Route | None
) -> None:
    """And back from there when it has no longer as many replicas as the place before still has."""
    found = stay(wanted, standing, before)
    if before is not None and before.head != wanted and standing.get(before.head, Standing(0, False)).answers:
        assert found.routed in (wanted, before.head)


def carried_out(
    wanted: str, standing: dict[str, Standing], route: tuple[str, float] | None, now: float, room: int
) -> tuple[dict[str, Standing], tuple[str, float]]:
    """What the heads have after what is said was done. room: most heads that have machines for it at once."""
    found = stay(wanted, standing, None if route is None else Route(route[0], now - route[1]))
    kept = {head: item for head, item in standing.items() if head in found.heads}
    have = standing.get(wanted, Standing(0, False))
    others = sum(item.replicas > 0 for head, item in kept.items() if head != wanted)
    if have.replicas or others < room:
        kept[wanted] = Standing(max(have.replicas, found.least, 1), True)
    is_same = route is not None and route[0] == found.routed
    return kept, route if is_same and route is not None else (found.routed, now)


@given(st.sampled_from("abc"), standings, st.sampled_from([2, 3]))
def test_it_ends_at_the_wanted_head_alone(wanted: str, standing: dict[str, Standing], room: int) -> None:
    """Carry out what is said, again and again; also where only two heads have machines for it at once."""
    now, route = 0.0, None
    for _ in range(12):
        standing, route = carried_out(wanted, standing, route, now, room)
        now += LEAVE_SECONDS / 2
    assert set(standing) - {wanted} <= {head for head, item in standing.items() if not item.answers}
    assert stay(wanted, standing, None).heads == {wanted}


def test_a_third_place_gives_its_machines_to_the_wanted_one() -> None:
    """A model that is wanted elsewhere before it has left its last place but one."""
    standing = {"first": Standing(1, True), "second": Standing(1, True)}
    soon = stay("third", standing, Route("second", LEAVE_SECONDS - 1))
    assert (soon.heads, soon.routed) == ({"first", "second", "third"}, "second")
    later = stay("third", standing, Route("second", LEAVE_SECONDS))
    assert (later.heads, later.routed) == ({"second", "third"}, "second")


def test_as_many_replicas_come_up_beside_those_that_answer() -> None:
    before, old = {"old": Standing(4, True)}, Route("old", 1000.0)
    assert stay("new", before, old).least == 4
    assert stay("new", {**before, "new": Standing(3, True)}, old).routed == "old"
    full = stay("new", {**before, "new": Standing(4, True)}, old)
    assert (full.routed, full.heads) == ("new", {"old", "new"})
    left = stay("new", {**before, "new": Standing(4, True)}, Route("new", LEAVE_SECONDS))
    assert left.heads == {"new"}


def test_a_revision_that_rests_at_none_moves_without_a_request() -> None:
    assert stay("new", {"old": Standing(0, True)}, None).heads == {"old", "new"}
    rested = {"old": Standing(0, True), "new": Standing(0, True)}
    assert stay("new", rested, Route("new", LEAVE_SECONDS)).heads == {"new"}


def test_what_never_came_up_at_the_old_place_is_not_kept_there() -> None:
    assert stay("new", {"old": Standing(0, False)}, None).heads == {"new"}

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.plan.moving import LEAVE_SECONDS, Standing, is_full, stay

standings = st.dictionaries(st.sampled_from("abc"), st.builds(Standing, st.integers(0, 3), st.booleans()))
waits = st.none() | st.floats(0, 300)


@given(st.sampled_from("abc"), standings, waits)
def test_what_answers_is_never_given_up_for_what_does_not(
    wanted: str, standing: dict[str, Standing], settled: float | None
) -> None:
    found = stay(wanted, standing, settled)
    assert wanted in found.heads
    assert found.routed in found.heads
    answering = {head for head, item in standing.items() if item.answers}
    if answering:
        assert found.routed in answering or not answering - {wanted}
        assert answering & found.heads
    if settled is None or settled < LEAVE_SECONDS:
        assert answering <= found.heads, "an old place is left only after the new one has been in full for a while"
    assert found.moves == bool(found.heads - {wanted})


@given(st.sampled_from("abc"), standings)
def test_it_ends_at_the_wanted_head_alone(wanted: str, standing: dict[str, Standing]) -> None:
    """Carry out what is said, again and again, with hardware for it."""
    now, since = 0.0, None
    for _ in range(10):
        since = (now if since is None else since) if is_full(wanted, standing) else None
        found = stay(wanted, standing, None if since is None else now - since)
        kept = {head: item for head, item in standing.items() if head in found.heads}
        have = standing.get(wanted, Standing(0, False)).replicas
        standing = {**kept, wanted: Standing(max(have, found.least, 1), True)}
        now += LEAVE_SECONDS / 2
    assert set(standing) - {wanted} <= {head for head, item in standing.items() if not item.answers}
    assert stay(wanted, standing, now).heads == {wanted}


def test_as_many_replicas_come_up_beside_those_that_answer() -> None:
    before = {"old": Standing(4, True)}
    assert stay("new", before, None).least == 4
    assert stay("new", {**before, "new": Standing(3, True)}, 1000.0).routed == "old"
    full = stay("new", {**before, "new": Standing(4, True)}, 0.0)
    assert (full.routed, full.heads) == ("new", {"old", "new"})
    assert stay("new", {**before, "new": Standing(4, True)}, LEAVE_SECONDS).heads == {"new"}


def test_a_revision_that_rests_at_none_moves_without_a_request() -> None:
    assert stay("new", {"old": Standing(0, True)}, None).heads == {"old", "new"}
    assert stay("new", {"old": Standing(0, True), "new": Standing(0, True)}, LEAVE_SECONDS).heads == {"new"}


def test_what_never_came_up_at_the_old_place_is_not_kept_there() -> None:
    assert stay("new", {"old": Standing(0, False)}, None).heads == {"new"}

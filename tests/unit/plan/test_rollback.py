"""Which revision a rollback by hand means."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import UsageInvalid
from fastserve.plan.observed import Observed, Pin
from fastserve.plan.rollback import PREVIOUS, pin_of, rollback_target

DIGESTS = st.lists(st.text("0123456789abcdef", min_size=64, max_size=64), min_size=1, max_size=5, unique=True)


def seen(weights: dict[str, int], proven: str | None = None) -> Observed:
    return Observed(digests={}, weights=weights, proven=proven)


@given(DIGESTS, st.data())
def test_a_whole_digest_means_itself_whatever_serves(known: list[str], data: st.DataObject) -> None:
    wanted, named = data.draw(st.sampled_from(known)), data.draw(st.sampled_from(known))
    serving = data.draw(st.sampled_from(known))
    assert rollback_target("m", seen({serving: 100}), known, wanted, named) == named


@given(DIGESTS, st.data())
def test_the_one_before_is_the_next_older_one(known: list[str], data: st.DataObject) -> None:
    serving = data.draw(st.sampled_from(known))
    at = known.index(serving)
    for word in (None, PREVIOUS):
        if at == 0:
            with pytest.raises(UsageInvalid, match="no revision before"):
                rollback_target("m", seen({serving: 100}), known, serving, word)
        else:
            assert rollback_target("m", seen({serving: 100}), known, serving, word) == known[at - 1]


@given(DIGESTS, st.data())
def test_the_one_before_has_had_all_the_traffic_where_any_has(known: list[str], data: st.DataObject) -> None:
    """Between two good ones may stand one that never came up, or was rolled back."""
    serving = data.draw(st.sampled_from(known))
    before = known[: known.index(serving)]
    proven = data.draw(st.sets(st.sampled_from(known)))
    revisions = {digest: {"proven": True} if digest in proven else {} for digest in known}
    observed = replace(seen({serving: 100}), known_revisions=revisions)
    if not before:
        return
    good = [digest for digest in before if digest in proven]
    assert rollback_target("m", observed, known, serving, None) == (good or before)[-1]


@given(DIGESTS.filter(lambda known: len(known) > 1), st.integers(1, 99))
def test_during_a_step_it_is_never_the_new_one(known: list[str], share: int) -> None:
    old, new = known[0], known[-1]
    found = rollback_target("m", seen({old: 100 - share, new: share}, proven=old), known, new, None)
    assert found == old


def test_a_word_that_fits_none_or_two_is_refused_with_those_that_there_are() -> None:
    known = ["a" * 64, "ab" + "c" * 62]
    for word in ("a", "zz"):
        with pytest.raises(UsageInvalid, match="aaaaaaaa, abcccccc"):
            rollback_target("m", seen({}), known, known[1], word)
    assert rollback_target("m", seen({}), known, known[1], "ab") == known[1]


def test_without_traffic_nothing_is_before() -> None:
    with pytest.raises(UsageInvalid, match="no revision before"):
        rollback_target("m", seen({}), ["a" * 64], "a" * 64, None)


@given(st.booleans())
def test_only_the_wanted_one_without_steps_needs_no_pin(stepped: bool) -> None:
    assert pin_of("old", "new", stepped) == Pin("old", "new")
    assert pin_of("new", "new", stepped) == (Pin("new", "new") if stepped else None)

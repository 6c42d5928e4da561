"""What a stage is told of machines that are brought for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.plan.brought import VARIABLE, Kind, brought, told

AMOUNTS = st.floats(min_value=0, max_value=1e6)


@given(st.dictionaries(st.text(max_size=20), st.builds(Kind, AMOUNTS, AMOUNTS), max_size=5))
def test_what_is_told_is_understood(kinds: dict[str, Kind]) -> None:
    assert brought(told(kinds)) == kinds


def test_where_none_are_brought_nothing_is_told() -> None:
    assert told({}) == {}
    assert brought({}) == {}
    assert brought({VARIABLE: ""}) == {}


def test_something_else_is_an_error() -> None:
    with pytest.raises(ValueError, match="unpack"):
        brought({VARIABLE: '{"l4": [1, 2, 3]}'})

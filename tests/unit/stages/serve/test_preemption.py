"""Who gives way: nobody for nothing, never an equal, and exactly as many as are needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastserve.stages.serve.preemption import Room, Running, Waiting, victims


def runs(kind: int, arrival: float = 0, tokens: int = 1, blocks: int = 0, movable: bool = True) -> Running:
    return Running((kind, arrival, f"r{arrival}"), tokens, blocks, movable)


def waits(kind: int, arrival: float = 100, tokens: int = 16, blocks: int = 1) -> Waiting:
    return Waiting((kind, arrival, f"w{arrival}"), tokens, blocks)


FULL = Room(slots=0, blocks=100, tokens=100)


def test_a_slot_is_taken_from_the_last_of_the_worst() -> None:
    running = [runs(0, 1), runs(2, 2), runs(2, 3), runs(1, 4)]
    assert victims(FULL, running, [waits(0)], lambda _: 1) == [runs(2, 3)]


def test_equals_do_not_preempt_each_other() -> None:
    assert victims(FULL, [runs(1, 1), runs(0, 2)], [waits(1, 0)], lambda _: 1) == []


def test_nobody_gives_way_where_there_is_room() -> None:
    assert victims(Room(1, 10, 10), [runs(2)], [waits(0)], lambda _: 1) == []


def test_blocks_are_taken_only_when_they_are_enough() -> None:
    room, running = Room(4, 1, 100), [runs(2, 1), runs(2, 2)]
    assert victims(room, running, [waits(0, blocks=5)], lambda _: 2) == [runs(2, 2), runs(2, 1)]
    assert victims(room, running, [waits(0, blocks=6)], lambda _: 2) == []


def test_what_a_victim_would_have_taken_in_the_next_step_is_free_too() -> None:
    running = [runs(2, 1, blocks=1)]
    assert victims(Room(1, -1, 100), running, [waits(0, blocks=2)], lambda _: 2) == running
    assert victims(Room(1, -1, 100), running, [waits(0, blocks=3)], lambda _: 2) == []


def test_a_long_prompt_gives_way_when_it_takes_the_whole_step() -> None:
    running = [runs(0, 1), runs(2, 2, tokens=500), runs(2, 3)]
    assert victims(Room(2, 100, 0), running, [waits(0)], lambda _: 1) == [runs(2, 2, tokens=500)]
    assert victims(Room(2, 100, 0), [runs(2, 3)], [waits(0)], lambda _: 1) == [], "one token is no prompt"


def test_a_prompt_that_may_not_be_cut_needs_room_for_all_of_it() -> None:
    whole = Waiting((0, 100, "w"), tokens=90, blocks=1, least=90)
    running = [runs(2, 1), runs(2, 2)]
    assert victims(Room(0, 100, 80), running, [whole], lambda _: 1) == []
    assert victims(Room(0, 100, 90), running, [whole], lambda _: 1) == [runs(2, 2)]


def test_the_first_who_does_not_fit_ends_it() -> None:
    running = [runs(2, 1), runs(2, 2)]
    assert victims(Room(0, 0, 100), running, [waits(0, 10, blocks=9), waits(0, 11)], lambda _: 2) == []


def test_who_cannot_be_moved_stays() -> None:
    assert victims(FULL, [runs(2, movable=False)], [waits(0)], lambda _: 1) == []


running_lists = st.lists(
    st.builds(runs, st.integers(0, 3), st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 2), st.booleans()),
    max_size=8,
    unique_by=lambda one: one.rank[2],
)
waiting_lists = st.lists(
    st.builds(waits, st.integers(0, 3), st.integers(0, 10**6), st.integers(1, 50), st.integers(0, 6)), max_size=8
)
rooms = st.builds(Room, st.integers(0, 2), st.integers(-3, 8), st.integers(0, 60))


@given(rooms, running_lists, waiting_lists, st.integers(0, 4))
def test_whoever_gives_way_lets_a_better_one_in(
    room: Room, running: list[Running], waiting: list[Waiting], held: int
) -> None:
    waiting.sort(key=lambda one: one.rank)
    gone = victims(room, running, waiting, lambda _: held)
    assert len(set(gone)) == len(gone) <= len(running)
    assert all(one.movable for one in gone)
    for one in gone:
        room = room.after(one, held)
    let_in = []
    for one in waiting:
        if not room.holds(one):
            break
        room = room.without(one)
        let_in.append(one)
    for victim in gone:
        assert any(one.rank[0] < victim.rank[0] for one in let_in)
    if gone:
        assert let_in

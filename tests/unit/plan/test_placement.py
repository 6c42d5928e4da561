"""Replicas over unequal profiles: promises as properties, then each rule by example and in a small world."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.plan.placement import Bounds, Place, ordered, place

NOW = 1000.0


@st.composite
def places(draw: st.DrawFn) -> list[Place]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        room = draw(st.integers(0, 5))
        ready = draw(st.integers(0, room))
        busy = draw(st.floats(0, 1))
        found.append(
            Place(
                profile=f"p{number}",
                room=room,
                ready=ready,
                wanted=ready + draw(st.integers(0, 2)),
                waiting_since=draw(st.sampled_from([None, 900.0, 990.0])),
                failed=draw(st.sampled_from([False, False, False, True])),
                busy=busy,
                busy_peak=min(1.0, busy + draw(st.floats(0, 0.5))),
                kind=draw(st.sampled_from(["", "a", "b"])),
                spot=draw(st.booleans()),
                price_per_hour=draw(st.sampled_from([None, 1.0, 3.0])),
                tokens_per_s=draw(st.sampled_from([0.0, 50.0, 200.0])),
            )
        )
    return found


@given(places(), st.integers(0, 4), st.integers(0, 5))
@settings(max_examples=400, deadline=None)
def test_bounds_keep_what_replicas_promises(looks: list[Place], least: int, spread: int) -> None:
    most = max(1, least + spread)
    found = place(looks, least, most, NOW)
    assert sorted(bounds.profile for bounds in found) == sorted(item.profile for item in looks), "none but those named"
    assert all(0 <= bounds.least <= bounds.most for bounds in found)
    assert all(bounds.because.endswith(".") for bounds in found)
    by_name = {item.profile: item for item in looks}
    assert all(bounds.most == 0 for bounds in found if by_name[bounds.profile].failed)
    usable = [item for item in looks if not item.failed]
    total = sum(bounds.most for bounds in found)
    assert total <= most + 1
    if usable:
        assert total >= 1, "somebody is always asked"
        held = [min(item.room, item.ready if _stuck(item) else item.room) for item in usable]
        assert sum(bounds.least for bounds in found) >= min(least, sum(held))


def _stuck(item: Place) -> bool:
    return item.waiting_since is not None and NOW - item.waiting_since > 30


@given(places(), st.integers(0, 4), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_without_anything_behind_the_largest_numbers_do_not_exceed_replicas_max(
    looks: list[Place], least: int, spread: int
) -> None:
    most = max(1, least + spread)
    calm = [replace(item, waiting_since=None, ready=0, wanted=0, failed=False) for item in looks]
    found = place(calm, least, most, NOW)
    assert sum(bounds.most for bounds in found) <= most
    room = sum(item.room for item in calm)
    assert sum(bounds.least for bounds in found) == least or room < least


@dataclass
class World:
    """Machines and replicas; each profile's policy follows the load that the gateway gives it, preferred first."""

    rooms: dict[str, int]
    spot: frozenset[str] = frozenset()
    taken: dict[str, int] = field(default_factory=dict)
    """Machines of a profile that somebody else holds: they count as room and cannot be had."""

    slots: int = 10
    now: float = NOW
    ready: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    since: dict[str, float | None] = field(default_factory=dict)
    quiet: dict[str, float] = field(default_factory=dict)
    loads: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    changes: list[tuple[float, str, int]] = field(default_factory=list)
    least_ready: int = 99

    def beat(self, load: float, least: int, most: int) -> tuple[Bounds, ...]:
        self.now += 2
        share = self._route(load)
        looks = [self._place(name, share[name]) for name in self.rooms]
        found = place(looks, least, most, self.now)
        for bounds in found:
            self._scale(bounds, share[bounds.profile])
        self.least_ready = min(self.least_ready, sum(self.ready.values()))
        return found

    def run(self, seconds: float, load: float, least: int = 1, most: int = 4) -> tuple[Bounds, ...]:
        for _ in range(round(seconds / 2) - 1):
            self.beat(load, least, most)
        return self.beat(load, least, most)

    def _route(self, load: float) -> dict[str, float]:
        share, left = {}, load
        for name in self.rooms:
            share[name] = min(left, self.ready.get(name, 0) * self.slots)
            left -= share[name]
        return share

    def _place(self, name: str, load: float) -> Place:
        loads = self.loads.setdefault(name, [])
        loads.append((self.now, load))
        ready = self.ready.get(name, 0)
        slots = max(1, ready) * self.slots
        peak = max(value for at, value in loads if at > self.now - 60)
        return Place(
            profile=name, room=self.rooms[name], ready=ready, wanted=self.wanted.get(name, 0),
            waiting_since=self.since.get(name), busy=load / slots, busy_peak=min(1.0, peak / slots),
            spot=name in self.spot,
        )  # fmt: skip

    def _scale(self, bounds: Bounds, load: float) -> None:
        name = bounds.profile
        wanted = self.wanted.get(name, 0)
        asked = max(wanted, -(-int(load) // 4))
        if load > 0:
            self.quiet[name] = self.now
        if self.now - self.quiet.get(name, 0) > 60:
            asked = 0
        new = min(bounds.most, max(bounds.least, asked))
        if new != wanted:
            self.changes.append((self.now, name, new))
        self.wanted[name] = new
        self.quiet.setdefault(name, self.now)
        had = min(self.ready.get(name, 0), new, self.rooms[name])
        self.ready[name] = min(new, max(had, self.rooms[name] - self.taken.get(name, 0)))
        waits = self.ready[name] < new
        self.since[name] = (self.since.get(name) or self.now) if waits else None


def test_the_preferred_profile_gets_everything_while_it_suffices() -> None:
    world = World({"a": 4, "b": 4})
    found = world.run(60, 12)
    assert [(bounds.profile, bounds.most) for bounds in found] == [("a", 4), ("b", 0)]
    assert world.ready == {"a": 3, "b": 0}
    assert found[0].because == "Profile a has 1 to 4: it is preferred."


def test_without_a_machine_the_next_one_takes_all_of_it_and_gives_it_back() -> None:
    world = World({"a": 0, "b": 2})
    found = world.run(20, 3)
    assert [(bounds.profile, bounds.least, bounds.most) for bounds in found] == [("a", 0, 0), ("b", 1, 2)]
    assert "a cannot be had" in found[1].because
    world.rooms["a"], world.least_ready = 2, 99
    world.run(300, 3)
    assert world.ready == {"a": 1, "b": 0}
    assert world.least_ready >= 1, "what serves stays until the other is ready"


def test_a_replica_that_waits_too_long_is_started_on_the_next_profile() -> None:
    world = World({"a": 1, "b": 1}, taken={"a": 1})
    world.run(20, 3)
    assert world.ready == {"a": 0, "b": 0}
    found = world.run(20, 3)
    assert world.ready == {"a": 0, "b": 1}
    assert "still does" in found[0].because, "it goes on trying, and so notices when it can be had"
    changed = len(world.changes)
    world.run(600, 3)
    assert len(world.changes) == changed, "no back and forth while it cannot be had"
    world.taken = {}
    world.run(200, 3)
    assert world.ready == {"a": 1, "b": 0}


def test_a_preferred_profile_that_is_full_is_helped_and_then_left_alone() -> None:
    world = World({"a": 2, "b": 4})
    found = world.run(40, 35)
    assert world.ready["a"] == 2
    assert world.ready["b"] >= 1
    assert found[1].spilled
    changed = len(world.changes)
    world.run(600, 35)
    assert len(world.changes) - changed <= 2, world.changes
    world.run(300, 4)
    assert world.ready == {"a": 2, "b": 0}


def test_a_load_at_the_edge_does_not_open_and_close_the_next_profile() -> None:
    for load in (17, 18, 19, 20, 21):
        world = World({"a": 2, "b": 2})
        world.run(1200, load)
        assert sum(name == "b" for _, name, _ in world.changes) <= 2, (load, world.changes)


def test_the_least_is_kept_on_machines_that_stay() -> None:
    world = World({"spot": 4, "own": 2}, spot=frozenset({"spot"}))
    found = world.run(60, 2)
    assert {bounds.profile: (bounds.least, bounds.most) for bounds in found} == {"spot": (0, 0), "own": (1, 1)}
    world.run(60, 25)
    assert world.ready["spot"] >= 1, "and more go where it is preferred"
    world.rooms["spot"] = 0
    world.least_ready = 99
    world.run(60, 25)
    assert world.ready["own"] == 2
    assert world.least_ready >= 1, "spot machines that are lost are fewer machines, nothing else"


def test_an_engine_that_did_not_come_up_is_left_and_the_next_one_serves() -> None:
    found = place([Place(profile="a", room=2, failed=True), Place(profile="b", room=2)], 1, 2, NOW)
    assert [(bounds.profile, bounds.least, bounds.most) for bounds in found] == [("a", 0, 0), ("b", 1, 2)]
    assert "did not come up on a" in found[0].because


def test_without_any_machine_the_preferred_profile_waits_for_one() -> None:
    found = place([Place(profile="a", room=0), Place(profile="b", room=0)], 1, 2, NOW)
    assert (found[0].least, found[0].most, found[1].most) == (1, 1, 0) or (found[0].least, found[0].most) == (1, 2)
    assert "waits for one" in found[0].because


def test_equals_are_chosen_by_price_of_a_measured_token() -> None:
    dear = Place(profile="dear", room=1, kind="L4", price_per_hour=2.0, tokens_per_s=100)
    cheap = Place(profile="cheap", room=1, kind="L4", price_per_hour=1.5, tokens_per_s=50)
    fast = Place(profile="fast", room=1, kind="L4", price_per_hour=3.0, tokens_per_s=200)
    assert [item.profile for item in ordered([dear, cheap, fast])] == ["fast", "dear", "cheap"]
    unmeasured = [replace(item, tokens_per_s=0.0) for item in (dear, cheap, fast)]
    assert [item.profile for item in ordered(unmeasured)] == ["cheap", "dear", "fast"]
    other = Place(profile="other", room=1, kind="A100", price_per_hour=9.0, tokens_per_s=100)
    assert [item.profile for item in ordered([other, dear, cheap])] == ["other", "dear", "cheap"], "preference first"


def test_fewer_replicas_than_run_are_asked_of_the_last_first() -> None:
    looks = [Place(profile="a", room=2, ready=2, wanted=2), Place(profile="b", room=2, ready=2, wanted=2)]
    found = place(looks, 1, 2, NOW)
    assert [(bounds.profile, bounds.most) for bounds in found] == [("a", 2), ("b", 0)]

"""The line of those who wait for a slot: its order, its bounds, who leaves it."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.gateway.answers import Refusal
from fastserve.gateway.config import Hold as Limits
from fastserve.gateway.config import Revision, Served, Target
from fastserve.gateway.hold import LONGEST_LINE_BYTES, Hold
from fastserve.gateway.routes import Router


def served(*revisions, requests=100, seconds=10.0):
    return Served("generate", 0, revisions, hold=Limits(requests, seconds))


def hold_of(**models):
    router = Router(models, Random(0))
    return Hold(router)


def small(slots=1, name="http://1", digest="r", weight=1):
    return Revision(digest, weight, (Target(name, slots),))


def running(scenario):
    async def whole():
        async with asyncio.timeout(100):
            await scenario()
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert left == []

    asyncio.run(whole())


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def code_of(wait):
    with pytest.raises(Refusal) as caught:
        await wait
    return caught.value.status, caught.value.code


def waits(hold, *names, model="m", seconds=10.0, tried=()):
    """Tasks that wait in this order; each gives its name and slot."""

    async def one(name):
        return name, await hold.take(model, seconds, tried)

    return [asyncio.create_task(one(name)) for name in names]


def test_first_come_first_served():
    async def scenario():
        hold = hold_of(m=served(small()))
        slot = await hold.take("m", 1)
        tasks = waits(hold, *"abc")
        await settle()
        assert hold.waiting("m") == 3
        order = []
        for _ in "abc":
            hold.give_back(slot)
            await settle()
            (task,) = [task for task in tasks if task.done()]
            tasks.remove(task)
            name, slot = task.result()
            order.append(name)
        assert order == list("abc")
        assert hold.waiting("m") == 0

    running(scenario)


def test_a_newcomer_does_not_pass_those_who_wait():
    async def scenario():
        hold = hold_of(m=served(small()))
        slot = await hold.take("m", 1)
        (first,) = waits(hold, "first")
        await settle()
        hold.give_back(slot)  # the slot is the first one's, though it has not run yet
        (late,) = waits(hold, "late")
        await settle()
        assert first.done()
        assert not late.done()
        hold.give_back(first.result()[1])
        await late

    running(scenario)


def test_a_full_line_refuses_at_once_and_a_lost_request_is_let_in():
    async def scenario():
        hold = hold_of(m=served(small(), requests=2))
        slot = await hold.take("m", 1)
        tasks = waits(hold, "a", "b")
        await settle()
        assert await code_of(hold.take("m", 10)) == (429, "overloaded")
        (again,) = waits(hold, "again", tried=["http://1"])
        await settle()
        hold.give_back(slot)
        assert (await again)[0] == "again"  # it has waited before
        hold.give_back(again.result()[1])
        for task in tasks:
            hold.give_back((await task)[1])

    running(scenario)


def test_a_line_is_bounded_in_bytes_too():
    async def scenario():
        hold = hold_of(m=served(small()))
        slot = await hold.take("m", 1)
        first = asyncio.create_task(hold.take("m", 10, size_bytes=LONGEST_LINE_BYTES))
        await settle()
        assert await code_of(hold.take("m", 10, size_bytes=1)) == (429, "overloaded")
        hold.give_back(slot)
        await first
        again = asyncio.create_task(hold.take("m", 10, size_bytes=1))
        await settle()
        assert hold.waiting("m") == 1
        hold.give_back(first.result())
        await again

    running(scenario)


def test_with_no_place_to_wait_nothing_waits():
    async def scenario():
        hold = hold_of(m=served(small(), requests=0))
        slot = await hold.take("m", 1)
        assert await code_of(hold.take("m", 10)) == (429, "overloaded")
        hold.give_back(slot)
        assert await hold.take("m", 1)

    running(scenario)


def test_who_waits_too_long_is_told_and_leaves_its_place():
    async def scenario():
        hold = hold_of(m=served(small(), requests=1), none=served())
        slot = await hold.take("m", 1)
        for model in ("m", "none"):
            assert await code_of(hold.take(model, 0.02)) == (503, "model_loading")
            assert hold.waiting(model) == 0
        assert await code_of(hold.take("none", -1)) == (503, "model_loading")
        hold.give_back(slot)
        assert (await hold.take("m", 1)).target == "http://1"

    running(scenario)


def test_who_goes_away_frees_its_place_and_passes_a_slot_on():
    async def scenario():
        hold = hold_of(m=served(small()))
        slot = await hold.take("m", 1)
        first, second, third = waits(hold, *"abc")
        await settle()
        second.cancel()
        await settle()
        assert hold.waiting("m") == 2
        hold.give_back(slot)  # given to the first ...
        first.cancel()  # ... which goes away before it has noticed
        name, slot = await third
        assert name == "c"
        hold.give_back(slot)
        assert hold._router.running("http://1") == 0

    running(scenario)


def test_models_do_not_wait_for_each_other():
    async def scenario():
        hold = hold_of(
            full=served(small(name="http://1")), free=served(small(name="http://2")), none=served(requests=1)
        )
        await hold.take("full", 1)
        tasks = [*waits(hold, *"abc", model="full"), *waits(hold, "d", model="none")]
        await settle()
        for _ in range(3):
            hold.give_back(await hold.take("free", 1))
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await settle()

    running(scenario)


def test_models_that_share_targets_take_turns():
    async def scenario():
        base = served(small())
        adapter = Served("generate", 0, base.revisions, parent="base", hold=base.hold)
        hold = hold_of(base=base, adapter=adapter)
        slot = await hold.take("base", 1)
        tasks = [*waits(hold, *"bbbb", model="base"), *waits(hold, *"aaaa", model="adapter")]
        await settle()
        order = ""
        while tasks:
            hold.give_back(slot)
            await settle()
            (task,) = [task for task in tasks if task.done()]
            tasks.remove(task)
            name, slot = task.result()
            order += name
        assert order in ("babababa", "abababab")

    running(scenario)


def test_a_revision_that_becomes_ready_takes_who_waits():
    async def scenario():
        hold = hold_of(m=served())
        tasks = waits(hold, *"abc")
        await settle()
        assert hold.waiting("m") == 3
        hold.replace({"m": served(small(2))})
        await settle()
        assert [task.done() for task in tasks] == [True, True, False]
        hold.give_back(tasks[0].result()[1])
        assert (await tasks[2])[1].revision == "r"

    running(scenario)


def test_who_waits_for_a_revision_that_goes_draws_again_and_keeps_its_turn():
    async def scenario():
        hold = hold_of(m=served(small()))
        await hold.take("m", 1)
        tasks = waits(hold, "a")
        await settle()
        hold.replace({"m": served(small(weight=0), small(digest="new", name="http://2"))})
        await settle()
        tasks += waits(hold, "b")
        await settle()
        assert tasks[0].result()[1].revision == "new"
        assert not tasks[1].done()
        hold.replace({"m": served(small(2, digest="new", name="http://2"))})
        await tasks[1]

    running(scenario)


def test_a_waiting_request_waits_for_the_revision_that_it_drew():
    async def scenario():
        both = served(small(digest="full", weight=1e9), small(digest="idle", name="http://2", weight=1e-9))
        hold = hold_of(m=both)
        slot = await hold.take("m", 1)
        tasks = waits(hold, "a")
        (again,) = waits(hold, "again", tried=["http://1"])
        await settle()
        assert not tasks[0].done()
        assert (await again)[1].revision == "idle"  # a lost one goes wherever there is room
        hold.give_back(slot)
        assert (await tasks[0])[1].revision == "full"

    running(scenario)


def test_a_model_that_is_taken_away_says_so():
    async def scenario():
        hold = hold_of(m=served())
        (task,) = waits(hold, "a")
        await settle()
        hold.replace({})
        assert await code_of(task) == (404, "model_not_found")
        assert await code_of(hold.take("m", 1)) == (404, "model_not_found")
        assert hold.waiting("m") == 0

    running(scenario)


def test_a_closed_hold_sends_everybody_away_and_gives_free_slots_still():
    async def scenario():
        hold = hold_of(m=served(small()))
        slot = await hold.take("m", 1)
        (task,) = waits(hold, "a")
        await settle()
        hold.close()
        assert await code_of(task) == (503, "gateway_stopping")
        assert await code_of(hold.take("m", 1)) == (503, "gateway_stopping")
        hold.give_back(slot)
        assert await hold.take("m", 1)

    running(scenario)


class Request:
    """A request that keeps its slot until it is told to end, as the proxy does."""

    def __init__(self, hold, tried):
        self.end = asyncio.Event()
        self.task = asyncio.create_task(self._live(hold, tried))

    async def _live(self, hold, tried):
        slot = await hold.take("m", 10.0, tried)
        try:
            await self.end.wait()
        finally:
            hold.give_back(slot)


steps = st.lists(st.tuples(st.sampled_from(["come", "again", "end", "go", "reload"]), st.booleans()), max_size=60)
reloads = st.lists(st.lists(st.sampled_from([0, 1]), max_size=2), min_size=1)


@settings(max_examples=60)
@given(steps, st.integers(1, 3), st.integers(0, 6), reloads, st.integers(0, 100))
def test_no_slot_and_no_place_is_ever_lost(todo, slots, places, reload, which):
    """Requests come, end, go away and wait through reloads, in any order: then all slots are free, all lines empty."""

    def config(turn):
        weights = reload[turn % len(reload)]
        revisions = [small(slots, f"http://{at}", f"r{at}", weight) for at, weight in enumerate(weights)]
        return {"m": served(*revisions, requests=places)}

    async def scenario():
        hold = hold_of(**config(0))
        requests = []
        for turn, (step, pauses) in enumerate(todo):
            some = requests[which % len(requests)] if requests else None
            if step in ("come", "again"):
                requests.append(Request(hold, ["http://0"] if step == "again" else []))
            elif step == "end" and some:
                some.end.set()
            elif step == "go" and some:
                some.task.cancel()
            elif step == "reload":
                hold.replace(config(turn))
            if pauses:
                await settle()
            assert all(hold._router.running(f"http://{at}") <= slots for at in range(2))
        for request in requests:
            request.end.set()
        hold.replace({"m": served(small(slots), requests=places)})  # whoever waits still gets its turn
        ends = await asyncio.gather(*(request.task for request in requests), return_exceptions=True)
        codes = {end.code if isinstance(end, Refusal) else type(end) for end in ends}
        assert codes <= {"overloaded", asyncio.CancelledError, type(None)}
        assert hold.waiting("m") == 0
        assert [hold._router.running(f"http://{at}") for at in range(2)] == [0, 0]

    running(scenario)

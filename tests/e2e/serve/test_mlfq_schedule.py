"""vLLM's real scheduler under mlfq, in virtual time: nobody starves, nothing is lost, and it costs no throughput."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import write_tiny_llama
from virtual_engine import Answer, Asked, VirtualEngine, make_scheduler, right_tokens

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
DEPTHS = pytest.mark.parametrize("depth", [1, 2], ids=["in turn", "overlapping"])

Make = Callable[..., VirtualEngine]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`engine("mlfq", depth=1, slots=2, ...)`: an engine in virtual time."""
    model = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")

    def make(kind: str = "mlfq", depth: int = 1, **settings: Any) -> VirtualEngine:
        return VirtualEngine(make_scheduler(model, kind, pipelined=depth > 1, **settings), depth)

    return make


def asked(name: str, arrives: float, prompt: int, tokens: int, priority: int = 0) -> Asked:
    start = 0 if name.startswith("same") else sum(map(ord, name)) * 7919
    return Asked(name, arrives, [(start + place) % 200 + 10 for place in range(prompt)], tokens, priority)


def mixed(count: int, rate: float, seed: int) -> list[Asked]:
    """80 % short answers, 20 % long ones, at random times."""
    draw, now, found = random.Random(seed), 0.0, []
    for number in range(count):
        now += draw.expovariate(rate)
        tokens = draw.randint(400, 600) if draw.random() < 0.2 else draw.randint(8, 32)
        found.append(asked(str(number), now, draw.randint(16, 128), tokens))
    return found


@st.composite
def workloads(draw: st.DrawFn) -> list[Asked]:
    """Requests of all kinds, most at nearly the same time; some share their prompt's beginning."""
    count = draw(st.integers(1, 14))
    return [
        asked(
            f"{'same' if draw(st.booleans()) else number}-{number}"[:8],
            draw(st.floats(0, 1.5)),
            draw(st.sampled_from([1, 15, 16, 17, 40, 130])),
            draw(st.sampled_from([1, 2, 9, 40, 90])),
            draw(st.sampled_from([0, 0, 0, 1, -1])),
        )
        for number in range(count)
    ]


def free_blocks(engine: VirtualEngine) -> int:
    return int(engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def nothing_is_left(engine: VirtualEngine, blocks: int) -> bool:
    scheduler = engine.scheduler
    queues = (scheduler.running, scheduler.waiting, scheduler.kv_holding_waiting, scheduler.requests)
    return free_blocks(engine) == blocks - 1 and not any(map(len, queues))  # one block is vLLM's own


@DEPTHS
@QUICK
@given(
    work=workloads(),
    slots=st.integers(1, 4),
    blocks=st.sampled_from([16, 24, 60]),
    options=st.fixed_dictionaries(
        {"quantum": st.sampled_from([1, 4, 20]), "starvation": st.sampled_from([0.05, 0.5, 30.0])},
        optional={"levels": st.integers(2, 5)},
    ),
    budget=st.sampled_from([16, 64, 512]),
)
def test_every_request_ends_with_its_own_tokens_once(
    engine: Make, depth: int, work: list[Asked], slots: int, blocks: int, options: dict[str, Any], budget: int
) -> None:
    found = engine(depth=depth, slots=slots, blocks=blocks, options=options, budget=budget)
    answers = found.run(work)
    assert all(answer.tokens == right_tokens(answer.asked) for answer in answers.values())
    assert {answer.end for answer in answers.values()} == {"length"}
    assert nothing_is_left(found, blocks)


@DEPTHS
@QUICK
@given(work=workloads(), moments=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 120)), max_size=10))
def test_a_client_may_go_at_any_moment(
    engine: Make, depth: int, work: list[Asked], moments: list[tuple[int, int]]
) -> None:
    found = engine(depth=depth, slots=2, blocks=24, options={"quantum": 4, "starvation": 0.2})
    for one in work:
        found.submit(one)
    gone = set()
    while found.busy:
        for which, when in moments:
            if when == found.steps and which < len(work):
                gone.add(work[which].name)
                found.abort(work[which].name)
        found.step()
    for name, answer in found.answers.items():
        right = right_tokens(answer.asked)
        assert answer.tokens == right[: len(answer.tokens)]
        assert answer.tokens == right or name in gone
    found.step()
    assert nothing_is_left(found, 24)


@DEPTHS
@QUICK
@given(work=workloads(), starvation=st.sampled_from([0.1, 0.4, 1.0]), quantum=st.sampled_from([2, 8]))
def test_nobody_overtakes_the_starved(
    engine: Make, depth: int, work: list[Asked], starvation: float, quantum: int
) -> None:
    """The bound: after `starvation` without a token, a waiting request is at level 0, and until it has had a whole
    quantum again nobody of its tenant who came later is let in before it."""
    found = engine(depth=depth, slots=2, blocks=40, options={"quantum": quantum, "starvation": starvation})
    coming = sorted(work, key=lambda one: one.arrives)
    scheduler = found.scheduler
    while coming or found.busy:
        if not found.busy:
            found.now = max(found.now, coming[0].arrives)
        while coming and coming[0].arrives <= found.now:
            found.submit(coming.pop(0))
        starved = [
            request
            for request in scheduler.waiting
            if found.now - request.place.since > starvation and not request.num_stale_output_tokens
        ]
        inside = {request.request_id for request in scheduler.running}
        found.step()
        let_in = [request for request in scheduler.running if request.request_id not in inside]
        for one in starved:
            still = one.request_id in scheduler.requests and one not in scheduler.running
            if not still:
                continue
            assert one.place.level == 0
            late = [
                other
                for other in let_in
                if other.place.priority >= one.place.priority and other.arrival_time > one.arrival_time
            ]
            assert late == []


@DEPTHS
def test_a_long_answer_goes_on_under_endless_short_ones(engine: Make, depth: int) -> None:
    """Short requests alone are more than the engine can do; without promotion the long one would never end."""
    work = [asked("long", 0.0, 16, 400), *(asked(f"s{n}", 0.05 * n, 16, 20) for n in range(900))]
    starved = engine(depth=depth, slots=2, blocks=200, options={"quantum": 24, "starvation": 1e9}).run(work)["long"]
    fair = engine(depth=depth, slots=2, blocks=200, options={"quantum": 24, "starvation": 2.0}).run(work)["long"]
    last = max(one.arrives for one in work)
    assert starved.times[-1] > last, "the load is endless enough"
    assert fair.times[-1] < starved.times[-1]
    # 2 s, and then two running short requests end (20 steps) before it is let in.
    gaps = [later - earlier for earlier, later in zip(fair.times, fair.times[1:], strict=False)]
    assert max(gaps) < 2.0 + 1.0


def test_a_tenant_of_better_priority_goes_first_at_any_level(engine: Make) -> None:
    work = [asked(f"low{n}", 0.0, 16, 30, priority=1) for n in range(6)]
    work += [asked("high", 0.2, 16, 200, priority=0)]
    found = engine(slots=2, blocks=200, options={"quantum": 16})
    answers = found.run(work)
    request_alone = engine(slots=2, blocks=200, options={"quantum": 16}).run([asked("high", 0.2, 16, 200)])["high"]
    assert answers["high"].seconds < 1.1 * request_alone.seconds
    assert found.scheduler.preemptions > 0


def watched(engine: VirtualEngine, work: list[Asked]) -> list[tuple[float, int, set[str]]]:
    """(time, preemptions so far, who runs) after each step."""
    found, coming = [], sorted(work, key=lambda one: one.arrives)
    while coming or engine.busy:
        while coming and coming[0].arrives <= engine.now:
            engine.submit(coming.pop(0))
        engine.step()
        running = {request.request_id for request in engine.scheduler.running}
        found.append((engine.now, engine.scheduler.preemptions, running))
    return found


@DEPTHS
def test_nobody_gives_way_to_a_request_whose_grammar_is_not_compiled(engine: Make, depth: int) -> None:
    """While it waits, and all slots are taken; as soon as the grammar is there, somebody does."""
    work = [asked(f"long{n}", 0.0, 16, 300) for n in range(2)]
    work.append(replace(asked("strict", 0.5, 16, 8), grammar_after=1.0))
    found = engine(depth=depth, slots=2, blocks=200, options={"quantum": 16})
    steps = watched(found, work)
    assert max(preemptions for now, preemptions, _ in steps if now < 1.5) == 0
    assert found.answers["strict"].first < 1.5
    assert min(now for now, _, running in steps if "strict" in running) < 1.6
    assert all(answer.tokens == right_tokens(answer.asked) for answer in found.answers.values())


def test_a_request_without_its_grammar_keeps_nobody_behind_it_waiting(engine: Make) -> None:
    work = [asked(f"long{n}", 0.0, 16, 300) for n in range(2)]
    work.append(replace(asked("strict", 0.5, 16, 8), grammar_after=5.0))
    work.append(asked("short", 0.6, 16, 8))
    answers = engine(slots=2, blocks=200, options={"quantum": 16}).run(work)
    assert answers["short"].seconds < 0.3
    assert answers["strict"].first > 4.9


@DEPTHS
def test_nobody_gives_way_to_a_request_whose_adapter_has_no_place(engine: Make, depth: int) -> None:
    """A batch has room for one adapter; requests for it and for none go on as ever."""
    work = [replace(asked(f"long{n}", 0.0, 16, 200), adapter=1) for n in range(2)]
    work += [replace(asked("other", 0.5, 16, 8), adapter=2), replace(asked("same", 1.0, 16, 8), adapter=1)]
    work.append(asked("plain", 1.5, 16, 8))
    found = engine(depth=depth, slots=2, blocks=200, options={"quantum": 16}, adapters=1)
    steps = watched(found, work)
    assert max(preemptions for now, preemptions, _ in steps if now < 1.0) == 0
    assert found.answers["same"].seconds < 0.3
    assert found.answers["plain"].seconds < 0.3
    assert steps[-1][1] == 2
    last = min(found.answers[f"long{n}"].times[-1] for n in range(2))
    assert found.answers["other"].times[0] > last
    assert all(answer.tokens == right_tokens(answer.asked) for answer in found.answers.values())


def test_of_two_new_adapters_the_one_that_fits_makes_room_alone(engine: Make) -> None:
    work = [asked(f"long{n}", 0.0, 16, 200) for n in range(2)]
    work += [replace(asked(f"new{n}", 0.5, 16, 8), adapter=n) for n in (1, 2)]
    found = engine(slots=2, blocks=200, options={"quantum": 16}, adapters=1)
    steps = watched(found, work)
    assert max(len(running & {"new1", "new2"}) for _, _, running in steps) == 1
    assert steps[-1][1] == 1  # the second one takes the place of the first
    assert max(found.answers[f"new{n}"].seconds for n in (1, 2)) < 0.5


def test_a_long_prompt_does_not_hold_up_short_ones(engine: Make) -> None:
    work = [asked("long", 0.0, 3500, 20), *(asked(f"s{n}", 0.01 + 0.01 * n, 16, 8) for n in range(4))]
    mine = engine(slots=8, blocks=400, budget=256, options={"quantum": 40}).run(work)
    theirs = engine("fcfs", slots=8, blocks=400, budget=256).run(work)
    assert max(mine[f"s{n}"].first for n in range(4)) < 0.5 * max(theirs[f"s{n}"].first for n in range(4))


@DEPTHS
def test_a_prompt_that_is_stopped_again_and_again_is_in_the_queue_once(engine: Make, depth: int) -> None:
    """Stopped before its first token it has been without one since it came, however often it is stopped."""
    work = [asked("long", 0.0, 400, 5), *(asked(f"s{n}", 0.03 * n, 16, 3) for n in range(1, 40))]
    found = engine(depth=depth, slots=1, blocks=60, budget=16, options={"quantum": 2, "starvation": 0.5})
    coming = list(work)
    while coming or found.busy:
        while coming and coming[0].arrives <= found.now:
            found.submit(coming.pop(0))
        found.step()
        names = [request.request_id for request in [*found.scheduler.waiting, *found.scheduler.running]]
        assert len(set(names)) == len(names)
    assert found.scheduler.promotions >= 1
    assert found.answers["long"].first < 2.0


def test_a_resumed_request_finds_its_blocks_in_the_prefix_cache(engine: Make) -> None:
    work = [asked("long", 0.0, 64, 300), *(asked(f"s{n}", 1.0 + 0.3 * n, 16, 8) for n in range(8))]
    scheduled = {}
    for caching in (True, False):
        found = engine(slots=1, blocks=200, options={"quantum": 16}, caching=caching)
        found.run(work)
        assert found.scheduler.preemptions >= 8
        scheduled[caching] = found.scheduled_tokens
    assert scheduled[True] < sum(len(one.prompt) + one.tokens for one in work) + 9 * found.scheduler.block_size
    assert scheduled[False] > scheduled[True] + 8 * 100


def figures(answers: dict[str, Answer]) -> dict[str, float]:
    each = list(answers.values())
    long = [one.seconds for one in each if one.asked.tokens >= 400]
    return {
        "mean": statistics.mean(one.seconds for one in each),
        "first": statistics.mean(one.first for one in each),
        "normalised": statistics.mean(one.seconds / one.asked.tokens for one in each),
        "long": statistics.mean(long) if long else 0.0,
    }


@pytest.fixture(scope="module", params=[(4.2, 1000), (5.3, 1000), (4.8, 130)], ids=["busy", "saturated", "few blocks"])
def compared(engine: Make, request: pytest.FixtureRequest) -> tuple[VirtualEngine, VirtualEngine]:
    rate, blocks = request.param
    pair = []
    for kind in ("fcfs", "mlfq"):
        found = engine(kind, slots=8, blocks=blocks, block_size=32)
        found.run(mixed(250, rate, seed=1))
        pair.append(found)
    return pair[0], pair[1]


def test_mixed_loads_keep_their_throughput_and_short_answers_win(
    compared: tuple[VirtualEngine, VirtualEngine],
) -> None:
    fcfs, mlfq = compared
    assert {name: one.tokens for name, one in fcfs.answers.items()} == {
        name: one.tokens for name, one in mlfq.answers.items()
    }
    before, after = figures(fcfs.answers), figures(mlfq.answers)
    assert mlfq.produced / mlfq.now >= 0.97 * fcfs.produced / fcfs.now
    assert after["first"] * 10 < before["first"]
    assert after["normalised"] * 2 < before["normalised"]
    assert after["mean"] * 1.1 < before["mean"]
    assert after["long"] < 1.5 * before["long"]


@pytest.mark.parametrize("lengths", [(200, 200), (100, 300)])
def test_answers_that_are_alike_lose_next_to_nothing(engine: Make, lengths: tuple[int, int]) -> None:
    draw = random.Random(5)
    work = [asked(one.name, one.arrives, 64, draw.randint(*lengths)) for one in mixed(150, 3.0, seed=2)]
    before, after = (figures(engine(kind, slots=8, blocks=1000).run(work)) for kind in ("fcfs", "mlfq"))
    assert after["mean"] < 1.03 * before["mean"]


def test_below_saturation_nobody_is_worse_off(engine: Make) -> None:
    work = mixed(150, 1.5, seed=3)
    before, after = (figures(engine(kind, slots=8, blocks=1000).run(work)) for kind in ("fcfs", "mlfq"))
    assert after["mean"] < 1.01 * before["mean"]
    assert after["long"] < 1.03 * before["long"]


def test_the_engine_picks_the_scheduler_that_fits_how_it_runs(engine: Make) -> None:
    from fastserve.stages.serve.mlfq import MlfqAsyncScheduler, MlfqScheduler

    assert type(engine().scheduler) is MlfqScheduler
    assert type(engine(depth=2).scheduler) is MlfqAsyncScheduler

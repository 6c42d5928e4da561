"""The planner of shares: batch by speed, state by speed and memory, and a refusal that says what is missing."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import InsufficientMemory
from fastserve.plan.shares import SharePlan, TrainingFacts, WorkerFacts, plan_shares, replan

GB = 10**9

SMALL = TrainingFacts(
    state_bytes=16 * 10**8,
    frozen_bytes=0,
    unit_bytes=10**7,
    root_bytes=4 * 10**7,
    activation_bytes_per_token=10_000.0,
    process_bytes=GB,
    longest_tokens=512,
    working_bytes=4 * 10**8 + 1,
)
"""A full fine-tuning of 100 million numbers; a byte more than fp32, so that one worker needs a copy to compute with."""

ADAPTED = replace(
    SMALL,
    state_bytes=16 * 10**6,
    frozen_bytes=20 * GB,
    unit_bytes=10**5,
    root_bytes=0,
    frozen_unit_bytes=5 * 10**8,
    frozen_root_bytes=10**9,
    working_bytes=2 * 10**6,
)
"""LoRA on 10 billion numbers."""


def workers(*facts: tuple[float, float]) -> list[WorkerFacts]:
    """Each from tokens/s and GB."""
    return [WorkerFacts(f"worker-{i}", "local", speed, int(memory * GB)) for i, (speed, memory) in enumerate(facts)]


many = st.lists(
    st.builds(
        WorkerFacts,
        name=st.just("w"),
        profile=st.sampled_from(["a", "b"]),
        tokens_per_s=st.floats(1, 1e5),
        memory_bytes=st.integers(10**8, 40 * GB),
        most_tokens=st.sampled_from([0, 1024, 16_384]),
    ),
    min_size=1,
    max_size=12,
)


@given(many, st.sampled_from([SMALL, ADAPTED]), st.integers(12, 10**6))
def test_a_plan_fits_is_exact_and_comes_out_the_same_again(
    found: list[WorkerFacts], facts: TrainingFacts, batch_tokens: int
) -> None:
    refusal = ""
    try:
        plan = plan_shares(found, facts, batch_tokens)
    except InsufficientMemory as error:
        refusal = str(error)
    if refusal:
        assert re.search(r"are missing\. (Add|Leave|Take|Lower|Use) .*train\.\w+.*\.$", refusal, re.DOTALL)
        return
    assert sum(plan.batch) == sum(plan.state) == 1
    assert min(plan.state) >= 0
    assert plan == plan_shares(list(found), facts, batch_tokens)
    for worker, peak, kept, micro in zip(found, plan.peak_bytes, plan.kept_bytes, plan.micro_tokens, strict=True):
        assert kept < peak <= worker.memory_bytes * (1 + 1e-9) + 2 * facts.activation_bytes_per_token
        assert micro >= facts.longest_tokens
    for share, micro in zip(plan.batch, plan.micro_tokens, strict=True):
        assert plan.micro_batches * micro >= share * batch_tokens * (1 - 1e-9)
    assert SharePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(st.lists(st.floats(1, 1e4), min_size=2, max_size=8), st.data())
def test_no_other_split_of_the_batch_is_faster(speeds: list[float], data: st.DataObject) -> None:
    plan = plan_shares(workers(*((speed, 40) for speed in speeds)), SMALL, 100_000)
    other = data.draw(st.lists(st.floats(0.01, 1), min_size=len(speeds), max_size=len(speeds)))
    slowest = max(100_000 * part / sum(other) / speed for part, speed in zip(other, speeds, strict=True))
    assert plan.step_seconds <= slowest * (1 + 1e-6)
    assert plan.step_seconds == pytest.approx(100_000 / sum(speeds))


def test_batch_and_state_go_by_speed_where_there_is_memory() -> None:
    plan = plan_shares(workers((100, 8), (200, 8), (400, 8)), SMALL, 7000)
    assert plan.batch == pytest.approx((1 / 7, 2 / 7, 4 / 7))
    assert plan.state == pytest.approx((1 / 7, 2 / 7, 4 / 7))
    assert plan.kept_bytes == pytest.approx([16e8 / 7, 32e8 / 7, 64e8 / 7])
    assert plan.step_seconds == pytest.approx(10)
    assert "the state are shared by speed" in plan.because


def test_a_fast_worker_without_room_keeps_nothing_and_computes_most() -> None:
    base = GB + 2 * 4 * 10**7 + 4 * 10**7
    tight = replace(workers((900, 1))[0], memory_bytes=base + 10_000 * 600)
    plan = plan_shares([tight, *workers((100, 4))], SMALL, 6000)
    assert plan.batch == pytest.approx((0.9, 0.1))
    assert plan.state[0] < 0.01
    assert plan.peak_bytes[0] <= tight.memory_bytes
    assert plan.micro_batches >= 9
    assert "as far as each worker's memory goes" in plan.because


def test_the_fewest_micro_batches_are_taken_that_leave_room() -> None:
    def parts(memory: float) -> int:
        return plan_shares(workers((100, memory)), SMALL, 51_200).micro_batches

    everything = 1 + 1.6 + 0.4  # process, state, working copy in another precision
    assert parts(everything + 0.512 + 0.001) == 1
    assert parts(everything + 0.256 + 0.001) == 2
    assert parts(everything + 0.00512 + 0.00001) == 100


def test_more_tokens_at_once_than_are_worthwhile_are_not_planned() -> None:
    (worker,) = workers((100, 64))
    plan = plan_shares([replace(worker, most_tokens=1024)], SMALL, 10_240)
    assert (plan.micro_batches, plan.micro_tokens) == (10, (1024,))
    # A single sample is never cut.
    assert plan_shares([replace(worker, most_tokens=100)], SMALL, 10_240).micro_tokens == (512,)


def test_frozen_weights_are_whole_where_every_worker_has_the_room_and_cut_elsewhere() -> None:
    roomy = plan_shares(workers((100, 24), (100, 24)), ADAPTED, 4096)
    assert roomy.frozen_whole
    # 1 million trained numbers: half of the state, the working copy in 16 bits and the gradient in fp32.
    assert roomy.kept_bytes[0] == 20 * GB + 8 * 10**6 + 2 * 10**6 + 4 * 10**6
    tight = plan_shares(workers((100, 24), (100, 16)), ADAPTED, 4096)
    assert not tight.frozen_whole
    assert sum(tight.kept_bytes) == pytest.approx(20 * GB + 16 * 10**6 + 2 * 6 * 10**6, abs=2)
    assert "the frozen weights are cut as well" in tight.because


def test_the_copy_for_checkpoints_is_in_the_peak_and_not_in_what_the_engine_keeps() -> None:
    without = plan_shares(workers((100, 8)), SMALL, 512)
    with_copy = plan_shares(workers((100, 8)), replace(SMALL, copy_bytes=12 * 10**8), 512)
    assert with_copy.kept_bytes == without.kept_bytes
    assert with_copy.peak_bytes[0] - without.peak_bytes[0] == 12 * 10**8


def test_a_worker_has_room_for_the_whole_model_at_the_start() -> None:
    loaded = replace(SMALL, loaded_bytes=4 * 10**8)
    small, large = workers((100, 1.45), (100, 8))
    plan = plan_shares([small, large], loaded, 1024)
    assert plan.kept_bytes[0] <= 5 * 10**7
    assert max(plan.peak_bytes[0] - small.memory_bytes, 0) == 0
    with pytest.raises(InsufficientMemory, match="even with no share"):
        plan_shares([replace(small, memory_bytes=14 * 10**8 - 1), large], loaded, 1024)


def test_a_worker_with_too_little_even_for_no_share_is_named_with_what_is_missing() -> None:
    small = replace(workers((100, 1))[0], profile="l4")
    with pytest.raises(InsufficientMemory) as caught:
        plan_shares([small, *workers((100, 64))], SMALL, 4096)
    told = str(caught.value)
    for words in ("1 x l4", "1 x local", "A worker of profile l4 uses", "even with no share", "are missing."):
        assert words in told
    assert told.endswith(
        "Leave l4 out of train.workers, lower train.maxLength, or write train.activationCheckpointing: true."
    )


def test_a_state_that_is_larger_than_all_rooms_is_refused_with_the_shortfall() -> None:
    with pytest.raises(InsufficientMemory) as caught:
        plan_shares(workers((100, 2), (100, 2)), replace(SMALL, state_bytes=16 * 10**9), 4096)
    told = str(caught.value)
    assert "2 x local" in told
    assert "There are 14.9 GiB of state to share, and room for" in told
    assert "are missing. Lower train.maxLength, or write" in told
    elsewhere = [replace(worker, profile="cpu") for worker in workers((100, 2), (100, 2))]
    with pytest.raises(InsufficientMemory, match=r"are missing\. Add train\.workers, lower train\.maxLength"):
        plan_shares(elsewhere, replace(SMALL, state_bytes=16 * 10**9), 4096)


def test_workers_of_one_machine_have_more_memory_each_when_there_are_fewer() -> None:
    with pytest.raises(InsufficientMemory, match=r"are missing\. Use fewer train\.workers, lower"):
        plan_shares(workers((100, 1), (100, 1)), SMALL, 4096)
    with pytest.raises(InsufficientMemory, match=r"are missing\. Lower train\.maxLength"):
        plan_shares(workers((100, 1)), SMALL, 4096)
    with pytest.raises(InsufficientMemory, match=r"are missing\. Take a profile with more memory, lower"):
        plan_shares([replace(workers((100, 1))[0], profile="cpu")], SMALL, 4096)


def test_even_shares_do_not_look_at_speed() -> None:
    plan = plan_shares(workers((100, 8), (300, 8)), SMALL, 4000, even=True)
    assert plan.batch == plan.state == (0.5, 0.5)
    assert plan.step_seconds == pytest.approx(20)
    assert replan(plan, [1.0, 0.001]) is plan
    with pytest.raises(InsufficientMemory, match=r"Write train\.engine: sharded"):
        plan_shares(workers((100, 1.5), (300, 8)), SMALL, 4000, even=True)


def test_communication_is_added_to_the_step_where_it_is_known() -> None:
    found = [replace(worker, most_tokens=1000) for worker in workers((100, 8), (100, 8))]
    plan = plan_shares(found, SMALL, 4000, exchange_seconds=0.5)
    assert plan.step_seconds == pytest.approx(20 + 2 * 0.5)


class TestReplan:
    plan = plan_shares(workers((100, 8), (200, 8), (400, 8)), SMALL, 7000)

    def test_a_slowed_worker_gets_less_and_the_state_stays(self) -> None:
        found = replan(self.plan, [1 / 100, 1 / 200, 4 / 400])
        assert found.batch == pytest.approx((0.25, 0.5, 0.25))
        assert sum(found.batch) == 1
        assert found.state == self.plan.state
        assert found.kept_bytes == self.plan.kept_bytes
        assert found.step_seconds == pytest.approx(17.5)
        assert [worker.tokens_per_s for worker in found.workers] == pytest.approx([100, 200, 100])

    def test_a_recovered_worker_gets_its_part_back(self) -> None:
        slow = replan(self.plan, [1 / 100, 1 / 200, 4 / 400])
        assert replan(slow, [1 / 100, 1 / 200, 1 / 400]).batch == pytest.approx(self.plan.batch)

    def test_a_small_gain_changes_nothing(self) -> None:
        assert replan(self.plan, [1 / 100, 1 / 200, 1 / 390]) is self.plan
        assert replan(self.plan, [1 / 100, 1 / 200, 1 / 390], gain=0.001) is not self.plan

    def test_a_worker_that_had_nothing_to_measure_keeps_its_planned_speed(self) -> None:
        assert replan(self.plan, [0.0, float("nan"), float("inf")]) is self.plan
        found = replan(self.plan, [0.0, 1 / 200, 4 / 400])
        assert found.batch == pytest.approx((0.25, 0.5, 0.25))

    def test_more_micro_batches_are_planned_where_a_part_outgrows_the_memory(self) -> None:
        found = [replace(worker, most_tokens=1000) for worker in workers((100, 8), (100, 8))]
        plan = plan_shares(found, SMALL, 2000)
        assert plan.micro_batches == 1
        assert replan(plan, [1 / 100, 1 / 300]).micro_batches == 2


def test_ten_thousand_workers_are_planned() -> None:
    kinds = [(400.0, 80.0), (200.0, 80.0), (150.0, 48.0), (40.0, 24.0)]
    plan = plan_shares(workers(*(kinds[i % 4] for i in range(10_000))), SMALL, 10**7)
    assert sum(plan.batch) == sum(plan.state) == 1
    assert len(set(plan.peak_bytes)) < 20

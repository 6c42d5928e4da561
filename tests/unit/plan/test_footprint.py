"""The parts of a worker's memory, as the engine moves them."""

from __future__ import annotations

from dataclasses import replace

from fastserve.plan.facts import TrainingFacts
from fastserve.plan.footprint import TOGETHER_BYTES, footprint

FULL = TrainingFacts(
    state_bytes=16_000,
    frozen_bytes=0,
    unit_bytes=100,
    root_bytes=300,
    activation_bytes_per_token=1.0,
    process_bytes=7,
    longest_tokens=1,
    copy_bytes=12_000,
    working_bytes=2000,
)
ADAPTERS = replace(
    FULL, unit_bytes=10, root_bytes=0, frozen_bytes=50_000, frozen_unit_bytes=5000, frozen_root_bytes=9000
)


def test_full_training_gathers_the_root_and_two_blocks_and_has_as_many_gradients_on_their_way() -> None:
    found = footprint(FULL, 4, frozen_whole=True)
    assert found.gathered == found.gradients == 300 + 2 * 100
    assert found.received == 4 * 300
    assert found.fixed == 7 + 500 + 500
    assert found.by_share == 16_000 + 12_000 + 1200
    assert found.kept(0.25) == 4000
    assert found.kept(0) == 0


def test_one_worker_gathers_nothing_and_keeps_a_working_copy_unless_it_computes_on_the_masters() -> None:
    found = footprint(FULL, 1, frozen_whole=False)
    assert (found.gathered, found.gradients, found.received) == (0, 0, 0)
    assert found.kept(1) == 16_000 + 2000
    assert footprint(replace(FULL, working_bytes=4000), 1, frozen_whole=True).kept(1) == 16_000


def test_adapters_stay_gathered_with_their_gradient_on_every_worker() -> None:
    found = footprint(ADAPTERS, 2, frozen_whole=True)
    assert found.together == 2000 + 4000
    assert found.kept(0.5) == 8000 + 50_000 + 6000
    assert found.kept(0) == 50_000 + 6000


def test_many_trained_numbers_beside_frozen_ones_are_gathered_block_by_block() -> None:
    many = replace(ADAPTERS, state_bytes=4 * TOGETHER_BYTES + 16)
    assert footprint(many, 2, frozen_whole=True).together == 0
    assert footprint(many, 2, frozen_whole=True).gathered == 2 * 10


def test_the_model_is_whole_before_it_is_cut() -> None:
    found = footprint(replace(FULL, loaded_bytes=100_000), 4, frozen_whole=True)
    assert found.at_start(0.5) == found.peak(0.5, 10.0) == 7 + 100_000 + 8000
    assert found.peak(0.5, 1e6) == found.fixed + found.by_share // 2 + 10**6


def test_frozen_weights_that_are_cut_are_gathered_without_a_gradient() -> None:
    found = footprint(ADAPTERS, 2, frozen_whole=False)
    assert found.cut == 16_000 + 50_000
    assert found.frozen == 0
    assert found.gathered == 9000 + 2 * 5000
    assert found.gradients == 0

"""The order of samples: each once an epoch, the same for any number of workers, found again from the step alone."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.stages.train.order import MOST_FILLING, Order, epoch_batches, micro_batches, share
from fastserve.stages.train.schedule import learning_rate

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 500), st.integers(0, 3), st.integers(0, 3))
def test_every_sample_is_in_exactly_one_batch_of_an_epoch(
    lengths: list[int], batch_tokens: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, batch_tokens, seed, epoch)
    assert sorted(sample for batch in batches for sample in batch.samples) == list(range(len(lengths)))
    assert all(batch.samples for batch in batches)
    assert batches == epoch_batches(lengths, batch_tokens, seed, epoch)


@given(LENGTHS, st.integers(1, 500))
def test_batches_are_of_nearly_equal_size(lengths: list[int], batch_tokens: int) -> None:
    sizes = [sum(lengths[sample] for sample in batch.samples) for batch in epoch_batches(lengths, batch_tokens, 0, 0)]
    assert max(sizes) < batch_tokens + 2 * max(lengths)


@given(LENGTHS, st.integers(1, 4))
def test_the_shares_of_all_workers_are_the_batch_however_many_they_are(lengths: list[int], workers: int) -> None:
    batch = epoch_batches(lengths, 200, 0, 0)[0]
    shares = [share(batch, lengths, workers, rank) for rank in range(workers)]
    assert sorted(sample for part in shares for sample in part) == sorted(batch.samples)
    loads = [sum(lengths[sample] for sample in part) for part in shares]
    assert max(loads) - min(loads) <= max(lengths)


@given(LENGTHS, st.integers(1, 300))
def test_micro_batches_hold_every_sample_once_within_the_limit(lengths: list[int], limit: int) -> None:
    samples = share(epoch_batches(lengths, 10**6, 0, 0)[0], lengths, 1, 0)
    groups = micro_batches(samples, lengths, limit)
    assert [sample for group in groups for sample in group] == samples
    for group in groups:
        sizes = [lengths[sample] for sample in group]
        assert len(group) == 1 or max(sizes) * len(group) <= limit
        assert min(sizes) >= max(sizes) * (1 - MOST_FILLING)


def test_a_run_that_goes_on_sees_the_very_next_batches() -> None:
    order = Order([7, 30, 12, 50, 3, 22, 41, 9], batch_tokens=60, seed=5)
    whole = list(islice(order.since(0), 12))
    assert {batch.epoch for batch in whole} == {0, 1, 2, 3}
    for step in range(12):
        assert list(islice(order.since(step), 12 - step)) == whole[step:]


def test_epochs_differ_and_seeds_differ() -> None:
    lengths = [5] * 20
    assert epoch_batches(lengths, 50, 0, 0)[0].samples != epoch_batches(lengths, 50, 0, 1)[0].samples
    assert epoch_batches(lengths, 50, 0, 0)[0].samples != epoch_batches(lengths, 50, 1, 0)[0].samples


def test_steps_of_epochs_steps_and_neither() -> None:
    order = Order([10] * 20, batch_tokens=50, seed=0)
    assert order.steps_of(None, None) == order.steps_of(1, None) == 4
    assert order.steps_of(2.5, None) == 10
    assert order.steps_of(0.01, None) == 1
    assert order.steps_of(None, 7) == 7


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_to_its_peak_and_never_below_zero(schedule: str) -> None:
    rates = [learning_rate(step, 20, 1.0, schedule, warmup_steps=4) for step in range(20)]  # type: ignore[arg-type]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == rates[4] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))
    assert (rates[-1] == 1.0) if schedule == "constant" else (0 < rates[-1] < 0.1)


def test_warm_up_longer_than_the_run_does_no_harm() -> None:
    assert 0 < learning_rate(2, 3, 1.0, "cosine", warmup_steps=10) < 0.5

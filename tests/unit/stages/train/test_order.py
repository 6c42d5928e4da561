"""The order of samples: each once an epoch, the same for any number of workers, found again from the step alone."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.stages.train.order import Order, epoch_batches
from fastserve.stages.train.schedule import learning_rate

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 500), st.integers(0, 3), st.integers(0, 3))
def test_every_sample_is_in_exactly_one_batch_of_an_epoch(
    lengths: list[int], batch_tokens: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, batch_tokens, seed, epoch)
    assert sorted(sample for batch in batches for sample in batch.samples) == list(range(len(lengths)))
    assert all(batch.samples for batch in batches)
    assert {batch.epoch for batch in batches} == {epoch}
    assert batches == epoch_batches(lengths, batch_tokens, seed, epoch)


@given(LENGTHS, st.integers(1, 500))
def test_batches_are_of_nearly_equal_size(lengths: list[int], batch_tokens: int) -> None:
    sizes = [sum(lengths[sample] for sample in batch.samples) for batch in epoch_batches(lengths, batch_tokens, 0, 0)]
    assert max(sizes) < batch_tokens + 2 * max(lengths)


@given(LENGTHS, st.integers(1, 500))
def test_a_batch_ends_with_the_sample_that_reaches_its_share(lengths: list[int], batch_tokens: int) -> None:
    batches = epoch_batches(lengths, batch_tokens, 0, 0)
    total, count = sum(lengths), len(batches)
    if max(lengths) * count > total:
        return  # a sample longer than a batch takes the place of several
    seen = 0
    for number, batch in enumerate(batches, start=1):
        sizes = [lengths[sample] for sample in batch.samples]
        seen += sum(sizes)
        assert (seen - sizes[-1]) * count < total * number <= seen * count


def test_a_run_that_goes_on_sees_the_very_next_batches() -> None:
    order = Order([7, 30, 12, 50, 3, 22, 41, 9], batch_tokens=60, seed=5)
    whole = list(islice(order.since(0), 12))
    assert {batch.epoch for batch in whole} == {0, 1, 2, 3}
    for step in range(12):
        assert list(islice(order.since(step), 12 - step)) == whole[step:]
        assert order.at(step) == whole[step]


def test_epochs_differ_and_seeds_differ() -> None:
    lengths = [5] * 20
    assert epoch_batches(lengths, 50, 0, 0)[0].samples != epoch_batches(lengths, 50, 0, 1)[0].samples
    assert epoch_batches(lengths, 50, 0, 0)[0].samples != epoch_batches(lengths, 50, 1, 0)[0].samples


def test_the_order_is_the_same_in_every_version() -> None:
    """A checkpoint of an older version goes on with the right samples; what this says must never change."""
    assert epoch_batches([1] * 12, 12, 7, 3)[0].samples == (10, 3, 4, 9, 11, 1, 8, 0, 6, 7, 2, 5)


def test_the_order_has_no_pattern() -> None:
    places = np.array(epoch_batches([1] * 20_000, 20_000, 0, 0)[0].samples)
    assert abs(np.corrcoef(places, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.03


def test_steps_of_epochs_steps_and_neither() -> None:
    order = Order([10] * 20, batch_tokens=50, seed=0)
    assert order.steps_of(None, None) == order.steps_of(1, None) == 4
    assert order.steps_of(2.5, None) == 10
    assert order.steps_of(0.01, None) == 1
    assert order.steps_of(None, 7) == 7


def test_ten_million_samples_take_a_few_bytes_each() -> None:
    code = """
import resource
import numpy as np
from fastserve.stages.train.order import Order
lengths = np.full(10_000_000, 300, np.int32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
order = Order(lengths, 65536, 0)
assert order.at(5).samples != order.at(order.batches_an_epoch + 5).samples
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert int(ran.stdout) < 200_000, "kB"


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_to_its_peak_and_never_below_zero(schedule: str) -> None:
    rates = [learning_rate(step, 20, 1.0, schedule, warmup_steps=4) for step in range(20)]  # type: ignore[arg-type]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == rates[4] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))
    assert (rates[-1] == 1.0) if schedule == "constant" else (0 < rates[-1] < 0.1)


def test_warm_up_longer_than_the_run_does_no_harm() -> None:
    assert 0 < learning_rate(2, 3, 1.0, "cosine", warmup_steps=10) < 0.5

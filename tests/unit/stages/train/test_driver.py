"""What the driver hands to its workers."""

import os

import pytest

from fastserve.stages.train.driver import worker_environment, worker_threads

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize("workers", [1, 2, 3, 64])
def test_the_workers_of_one_machine_have_no_more_threads_than_it_has_cores(workers: int) -> None:
    threads = worker_threads(workers, nodes=1)
    assert threads >= 1
    assert threads * workers <= max(CORES, workers)
    assert worker_environment(threads, one_machine=True)["OMP_NUM_THREADS"] == str(threads)


def test_a_worker_with_a_machine_of_its_own_has_all_its_cores() -> None:
    assert worker_threads(4, nodes=4) == CORES

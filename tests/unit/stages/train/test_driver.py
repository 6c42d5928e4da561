"""What the driver hands to its workers."""

import os
from typing import Any

import pytest

from fastserve.errors import AttemptFenced, InsufficientMemory, NotExecutable, StageFailed
from fastserve.stages.train.driver import one_host, raise_for
from fastserve.stages.train.machines import worker_environment, worker_threads

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize("workers", [1, 2, 3, 64])
def test_the_workers_of_one_machine_have_no_more_threads_than_it_has_cores(workers: int) -> None:
    threads = worker_threads(workers, nodes=1)
    assert threads >= 1
    assert threads * workers <= max(CORES, workers)
    assert worker_environment(threads, one_machine=True)["OMP_NUM_THREADS"] == str(threads)


def test_a_worker_with_a_machine_of_its_own_has_all_its_cores() -> None:
    assert worker_threads(4, nodes=4) == CORES


def ended(**changed: Any) -> dict[str, Any]:
    return {"step": 10, "reason": "", "message": "", "early": False, **changed}


def test_what_the_workers_say_in_the_end_is_what_the_stage_raises() -> None:
    raise_for(ended(), 10)
    raise_for(ended(step=4, early=True), 10)
    with pytest.raises(StageFailed, match="at step 4 of 10"):
        raise_for(ended(step=4), 10)
    with pytest.raises(StageFailed, match="without a word"):
        raise_for(None, 10)
    with pytest.raises(AttemptFenced, match="a newer attempt"):
        raise_for(ended(step=-1, reason="AttemptFenced", message="a newer attempt"), 10)
    with pytest.raises(InsufficientMemory):
        raise_for(ended(step=-1, reason="InsufficientMemory", message="3 GiB are missing"), 10)
    with pytest.raises(NotExecutable, match="fp8 does not run"):
        raise_for(ended(step=-1, reason="NotExecutable", message="fp8 does not run"), 10)
    with pytest.raises(StageFailed, match="not a finite number"):
        raise_for(ended(step=-1, reason="StageFailed", message="the loss is not a finite number"), 10)


def test_a_worker_sleeps_while_it_waits_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_environment(2, one_machine=True)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert worker_environment(2, one_machine=True)["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("several", [False, True])
def test_nodes_of_one_machine_talk_over_loopback(several: bool) -> None:
    nodes = [
        {"Alive": True, "NodeManagerAddress": "10.0.0.1"},
        {"Alive": True, "NodeManagerAddress": "10.0.0.2" if several else "10.0.0.1"},
        {"Alive": False, "NodeManagerAddress": "10.0.0.3"},
    ]
    assert one_host(nodes) is not several

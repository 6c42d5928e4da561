"""CPU quotas: what a process gets is what its group was given, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tests.bench.cgroup import NoQuotas, Quotas, why_no_quotas


def _spin(quotas: Quotas, to_parent: Connection) -> None:
    quotas.join("slow")
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < 0.6:
        pass
    to_parent.send((time.process_time() - used) / (time.perf_counter() - began))


@pytest.fixture
def quotas_work(missing: Callable[[str], None]) -> None:
    reason = why_no_quotas()
    if reason:
        missing(reason)


@pytest.mark.usefixtures("quotas_work")
def test_a_process_gets_its_quota_and_no_more() -> None:
    with Quotas() as quotas:
        quotas.limit("slow", 0.2)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_spin, args=(quotas, sender))
        process.start()
        assert receiver.poll(30)
        cores = receiver.recv()
        process.join()
    # Other work on the machine may take from it; the kernel's slices let it run over a little in so short a time.
    assert cores < 0.3


def _break_in_a_group() -> None:
    with Quotas() as quotas:
        quotas.limit("slow", 0.2)
        quotas.join("slow")
        assert f"quotas-{os.getpid()}/slow" in Path("/proc/self/cgroup").read_text()
        raise RuntimeError


@pytest.mark.usefixtures("quotas_work")
def test_nothing_is_left_behind_even_by_a_block_that_raises() -> None:
    with pytest.raises(RuntimeError):
        _break_in_a_group()
    assert "quotas" not in Path("/proc/self/cgroup").read_text()
    assert why_no_quotas() == ""


def test_where_quotas_cannot_be_set_it_says_why(tmp_path: Path) -> None:
    with pytest.raises(NoQuotas, match="cannot set CPU quotas below"), Quotas(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NoQuotas), Quotas(tmp_path / "not there"):
        pass

"""A real Ray head of a home: found again, closed to the network, and gone without a trace."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import httpx
import last_words
import psutil
import pytest

from fastserve.cluster.home import Home
from fastserve.cluster.processes import Process, find
from fastserve.cluster.ray_head import RayHead
from fastserve.cluster.ray_jobs import Jobs, JobState
from fastserve.errors import ClusterFailed

pytestmark = pytest.mark.ray


Heads = Callable[[str], RayHead]


def until(true: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Wait for something to become true; `seconds` is for a machine that is very busy."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what}"
        time.sleep(0.1)


def sockets(processes: Iterable[Process]) -> set[Path]:
    """The unix sockets that processes have under a name."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it may end at any moment
            those = psutil.Process(process.pid).net_connections("unix")
            found |= {Path(one.laddr) for one in those if one.laddr.startswith("/")}
    return found


@pytest.fixture
def heads(tmp_path: Path) -> Iterator[Heads]:
    made: dict[str, RayHead] = {}

    def make(name: str = "home") -> RayHead:
        made[name] = RayHead(tmp_path / name)
        last_words.WATCHED[name] = Home(tmp_path / name)
        return made[name]

    yield make
    for name, head in made.items():
        head.stop()
        del last_words.WATCHED[name]


def test_a_head_starts_answers_and_leaves_nothing_behind(
    heads: Heads,
    tmp_path: Path,
    open_to_the_network: Callable[[Iterable[int]], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    head = heads("home")
    home = Home(tmp_path / "home")
    assert head.load() is None
    endpoint = head.start()
    assert head.alive()
    assert head.start() == endpoint, "a head that runs is not started again"
    assert endpoint.token_path.stat().st_mode & 0o777 == 0o600
    processes = find(home.id)
    assert {process.pid for process in processes} >= set(endpoint.pids)
    assert open_to_the_network(process.pid for process in processes) == []
    made = sockets(processes)
    assert made
    assert [path for path in made if endpoint.temp_dir not in path.parents] == [], "each goes with the head's folder"
    headers = {"Authorization": "Bearer wrong"}
    assert httpx.get(endpoint.dashboard_url + "/api/jobs/").status_code == 401
    assert httpx.get(endpoint.dashboard_url + "/api/jobs/", headers=headers).status_code == 403
    head.stop()
    assert find(home.id) == []
    assert not endpoint.temp_dir.exists()
    assert head.load() is None


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home whose head runs."""
    home = Home(tmp_path_factory.mktemp("shared") / "home")
    last_words.WATCHED["shared"] = home
    head = RayHead(home.path)
    head.start()
    yield home
    head.stop()
    del last_words.WATCHED["shared"]


def test_two_homes_do_not_meet_and_a_killed_head_starts_anew(heads: Heads, tmp_path: Path) -> None:
    one, two = heads("one"), heads("two")
    first, second = one.start(), two.start()
    assert first.dashboard_url != second.dashboard_url
    assert first.token != second.token
    with pytest.raises(ClusterFailed, match="403"):
        Jobs(first.dashboard_url, second.token).all()

    # Another command finds the head that this one started.
    assert RayHead(tmp_path / "one").load() == first

    jobs = Jobs(first.dashboard_url, first.token)
    jobs.submit("long", "sleep 600", {})
    until(lambda: jobs.state("long") is JobState.RUNNING, "the job runs")
    main = Process.of(first.pids[0])
    assert main is not None
    os.kill(main.pid, signal.SIGKILL)
    until(lambda: not main.alive, "the head is dead")
    assert one.load() is None
    again = one.start()
    assert Jobs(again.dashboard_url, again.token).all() == {}
    assert not first.temp_dir.exists()
    sleeping = [process for process in find(Home(tmp_path / "one").id) if process.command.startswith("sleep 600")]
    assert sleeping == [], "what the dead head ran does not outlive it"
    assert two.load() == second


def test_jobs_run_once_stop_when_told_and_say_how_they_ended(home: Home) -> None:
    endpoint = RayHead(home.path).start()
    jobs = Jobs(endpoint.dashboard_url, endpoint.token)
    jobs.submit("good", "echo hello $WORD", {"WORD": "world"})
    jobs.submit("good", "echo never", {})
    assert jobs.await_end("good", 300).state is JobState.SUCCEEDED
    assert "hello world" in jobs.logs("good")
    assert "never" not in jobs.logs("good")

    jobs.submit("bad", "echo oops; exit 7", {})
    bad = jobs.await_end("bad", 300)
    assert (bad.state, bad.exit_code) == (JobState.FAILED, 7)

    jobs.submit("long", "trap 'echo cleaned up; exit 0' TERM; echo listening; sleep 600 & wait", {})
    until(lambda: jobs.state("long") is JobState.RUNNING, "the job runs")
    until(lambda: "listening" in jobs.logs("long"), "the job listens")
    jobs.stop("long")
    assert jobs.await_end("long", 300).state is JobState.STOPPED
    assert "cleaned up" in jobs.logs("long"), "a stage has time to clean up"
    assert jobs.all().keys() >= {"good", "bad", "long"}

    jobs.submit("env", "env", {})
    jobs.await_end("env", 300)
    assert "tcp://" not in jobs.logs("env")


def test_workers_run_at_normal_priority_and_keep_their_mark(home: Home) -> None:
    endpoint = RayHead(home.path).start()
    jobs = Jobs(endpoint.dashboard_url, endpoint.token)
    jobs.submit("asleep", "sleep 600", {})
    until(lambda: jobs.state("asleep") is JobState.RUNNING, "the job runs")

    def workers() -> list[Process]:
        return [process for process in find(home.id) if process.command.startswith("ray::")]

    # A title comes a moment after its process.
    until(lambda: any("JobSupervisor" in process.command for process in workers()), "renamed processes are found")
    priorities = set()
    for process in workers():
        with contextlib.suppress(ProcessLookupError):  # one that idles may end
            priorities.add(os.getpriority(os.PRIO_PROCESS, process.pid))
    assert priorities == {os.getpriority(os.PRIO_PROCESS, 0)}

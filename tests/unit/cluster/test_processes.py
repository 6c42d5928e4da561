"""Processes of a home are found by the mark they carry, and ended without hitting anyone else."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastserve.cluster.processes import (
    HOME_VARIABLE,
    PART_VARIABLE,
    Process,
    clean_environment,
    end_each,
    environment,
    find,
    free_port,
    free_ports,
    kill_home,
    port_is_free,
)
from fastserve.errors import ClusterFailed

Spawn = Callable[..., "subprocess.Popen[bytes]"]

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)
PARENT = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    "start_new_session=True); print(child.pid, flush=True); time.sleep(600)"
)


@pytest.fixture
def home_id() -> Iterator[str]:
    found = secrets.token_hex(8)
    yield found
    kill_home(found, grace_seconds=0.1)


@pytest.fixture
def spawn(home_id: str) -> Iterator[Spawn]:
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str = "import time; time.sleep(600)", **extra: str) -> subprocess.Popen[bytes]:
        env = clean_environment({HOME_VARIABLE: home_id, **extra})
        process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
        started.append(process)
        # The kernel shows a new program's environment a moment after it has begun.
        until = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):  # one that ends at once has none
            while home_id.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes():
                if time.monotonic() > until:
                    break
                time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_home_finds_its_own_processes_and_no_others(home_id: str, spawn: Spawn) -> None:
    ours, other = spawn(), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert [process.pid for process in find(home_id)] == [ours.pid]
    finally:
        other.kill()
        other.wait()


def test_parts_of_a_home_are_told_apart(home_id: str, spawn: Spawn) -> None:
    ray = spawn(**{PART_VARIABLE: "ray"})
    spawn(**{PART_VARIABLE: "gateway"})
    assert [process.pid for process in find(home_id, "ray")] == [ray.pid]
    assert len(find(home_id)) == 2


def test_a_child_that_outlives_its_parent_is_still_found(home_id: str, spawn: Spawn) -> None:
    parent = spawn(PARENT)
    child = int(_line(parent))
    parent.kill()
    parent.wait()
    assert [process.pid for process in find(home_id)] == [child]


def test_ending_a_home_ends_all_of_it(home_id: str, spawn: Spawn) -> None:
    spawn(), _line(spawn(PARENT))
    assert kill_home(home_id, grace_seconds=5) == 3
    assert find(home_id) == []


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace(home_id: str, spawn: Spawn) -> None:
    process = spawn(STUBBORN)
    _line(process)
    began = time.monotonic()
    kill_home(home_id, grace_seconds=0.5)
    assert time.monotonic() - began > 0.4
    assert process.wait() == -signal.SIGKILL


def test_one_that_listens_ends_long_before_the_grace_is_over(home_id: str, spawn: Spawn) -> None:
    spawn()
    began = time.monotonic()
    kill_home(home_id, grace_seconds=200)
    assert time.monotonic() - began < 100


def test_nobody_waits_for_those_alone_that_have_nothing_to_tidy_up(home_id: str, spawn: Spawn, tmp_path: Path) -> None:
    tidies = (
        "import signal, sys, time; from pathlib import Path; signal.signal(signal.SIGTERM, "
        f"lambda *_: (time.sleep(1), Path({str(tmp_path / 'tidy')!r}).touch(), sys.exit())); "
        "print('ready', flush=True); time.sleep(600)"
    )
    both = [spawn(STUBBORN + "  # is_idle"), spawn(tidies)]
    for process in both:
        assert _line(process) == b"ready\n"
    # With a grace beyond the deadline, waiting for the stubborn one would be an error.
    assert kill_home(home_id, grace_seconds=120, deadline_seconds=100, idle=["is_idle"]) == 2
    assert (tmp_path / "tidy").exists(), "the other one had its time"
    assert [process.wait(60) for process in both] == [-signal.SIGKILL, 0]


def test_a_process_never_finds_itself_nor_those_it_descends_from(home_id: str) -> None:
    code = (
        "import os, subprocess, sys; from fastserve.cluster.processes import find, kill_home; "
        "id = os.environ['FASTSERVE_HOME_ID']; print(len(find(id)), kill_home(id))"
    )
    outer = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {code!r}]))"
    env = clean_environment({HOME_VARIABLE: home_id})
    run = subprocess.run([sys.executable, "-c", outer], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == ["0", "0"]


def test_what_will_not_end_is_named(home_id: str, spawn: Spawn) -> None:
    process = spawn(STUBBORN)
    _line(process)
    with pytest.raises(ClusterFailed, match=str(process.pid)):
        kill_home(home_id, grace_seconds=0.05, deadline_seconds=0)


def test_a_later_process_with_the_same_number_is_not_hit(spawn: Spawn) -> None:
    process = spawn()
    now = Process.of(process.pid)
    assert now is not None
    assert now.alive
    earlier = Process(process.pid, now.start_ticks - 1)
    assert not earlier.alive
    end_each([earlier], signal.SIGKILL, 1)
    assert process.poll() is None


def test_a_zombie_is_no_process(spawn: Spawn) -> None:
    process = spawn("pass")
    deadline = time.monotonic() + 60
    while Process.of(process.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert Process.of(process.pid) is None


def test_the_environment_of_a_gone_process_is_none() -> None:
    assert environment(2**22 - 3) is None


@pytest.fixture
def ambient() -> Iterator[Callable[[str, str], None]]:
    """Sets variables of this very process, as a shell would have, and puts them back."""
    before = dict(os.environ)
    yield os.environ.__setitem__
    os.environ.clear()
    os.environ.update(before)


def test_addresses_that_a_cluster_injects_do_not_reach_the_engine(ambient: Callable[[str, str], None]) -> None:
    for name in ("VLLM_PORT", "RAY_PORT", "REDIS_PORT", "AWS_PORT", "HF_PORT", "FASTSERVE_PORT"):
        ambient(name, "tcp://10.96.0.10:8000")
    assert [name for name, value in clean_environment({}).items() if value.startswith("tcp://")] == []


def test_variables_of_engines_that_are_named_are_kept(ambient: Callable[[str, str], None]) -> None:
    for name, value in {"VLLM_NAMED": "1", "VLLM_OTHER": "1", "FASTSERVE_ENGINE_VARIABLES": "VLLM_NAMED"}.items():
        ambient(name, value)
    built = clean_environment({})
    assert built["VLLM_NAMED"] == "1"
    assert "FASTSERVE_ENGINE_VARIABLES" in built, "the replica has to know them too"
    assert "VLLM_OTHER" not in built


def test_settings_of_another_ray_or_vllm_are_left_out_and_credentials_are_kept(
    ambient: Callable[[str, str], None],
) -> None:
    for name in ("RAY_ADDRESS", "VLLM_USE_V1", "PYTHONDONTWRITEBYTECODE", "LD_PRELOAD"):
        ambient(name, "1")
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "LC_ALL", "OPENBLAS_CORETYPE"):
        ambient(name, "kept")
    built = clean_environment({"X": "y"})
    assert not {"RAY_ADDRESS", "VLLM_USE_V1", "PYTHONDONTWRITEBYTECODE", "LD_PRELOAD"} & set(built)
    assert [built[name] for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "LC_ALL", "OPENBLAS_CORETYPE")] == [
        "kept"
    ] * 4
    assert built["X"] == "y"


def test_a_built_environment_runs_this_fastserve(ambient: Callable[[str, str], None]) -> None:
    code = "import fastserve; print(fastserve.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment({}), capture_output=True, text=True, cwd="/"
    )
    import fastserve

    assert run.stdout.strip() == fastserve.__file__


def test_a_proxy_never_stands_between_us_and_loopback(ambient: Callable[[str, str], None]) -> None:
    ambient("no_proxy", "intern.example")
    assert clean_environment({})["no_proxy"] == "intern.example,127.0.0.1,localhost"


def test_a_taken_port_is_not_given_out() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        assert not port_is_free(taken)
        assert free_port(taken) != taken


def test_a_port_that_somebody_holds_on_all_interfaces_is_taken() -> None:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        assert not port_is_free(server.getsockname()[1])


def test_a_free_port_that_was_asked_for_is_given() -> None:
    port = free_port()
    assert free_port(port) == port


def test_free_ports_are_all_different() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20

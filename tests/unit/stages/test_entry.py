"""Around every stage: a record or a readable failure, progress that stays fresh, nothing left in scratch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.errors import AttemptFenced, DatasetInvalid, EngineFailed, InsufficientMemory, StoreFailed, StoreFull
from fastserve.plan.stages import Stage, StageRequest
from fastserve.stages.entry import Heartbeat, Interrupted, is_final, run_attempt
from fastserve.stages.work import Outcome, Work

KEY = "a" * 64


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path) -> Iterator[Path]:
    base = tmp_path / "scratch"
    os.environ["FASTSERVE_SCRATCH"] = str(base)
    yield base
    del os.environ["FASTSERVE_SCRATCH"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def _claim(store: Store, attempt: int = 1, **more: Any) -> StageRequest:
    request = StageRequest("chat", Stage.SOURCE, KEY, attempt, {}, **more)
    attempts.claim(store, request)
    return request


def _makes(text: str = "weights") -> Callable[[Work], Outcome]:
    def stage(work: Work) -> Outcome:
        folder = work.scratch / "out"
        folder.mkdir()
        (folder / "file").write_text(text)
        work.report.update(1, 1, "files")
        return Outcome(folder, {"files": 1})

    return stage


def _raises(error: BaseException) -> Callable[[Work], Outcome]:
    def stage(work: Work) -> Outcome:
        (work.scratch / "half").write_text("half")
        raise error

    return stage


def test_an_outcome_becomes_a_committed_artifact(store: Store) -> None:
    assert run_attempt(store, _claim(store), _makes()) == 0
    record = attempts.find(store, Stage.SOURCE, KEY)
    assert record is not None
    assert (record.attempt, dict(record.metrics), [entry.path for entry in record.files]) == (1, {"files": 1}, ["file"])


def test_the_digests_of_the_inputs_stand_in_the_record(store: Store) -> None:
    run_attempt(store, _claim(store), _makes())
    child = StageRequest(
        "chat", Stage.COMPRESS, "b" * 64, 1, {}, inputs={"model": KEY}, input_stages={"model": Stage.SOURCE}
    )
    attempts.claim(store, child)
    assert run_attempt(store, child, _makes("smaller")) == 0
    parent, record = attempts.find(store, Stage.SOURCE, KEY), attempts.find(store, Stage.COMPRESS, "b" * 64)
    assert parent is not None
    assert record is not None
    assert record.parents == {"model": parent.digest}


def test_running_a_committed_attempt_again_does_nothing(store: Store) -> None:
    request = _claim(store)
    run_attempt(store, request, _makes())
    assert run_attempt(store, request, _raises(RuntimeError("must not run"))) == 0


@pytest.mark.parametrize(
    ("error", "code", "reason", "final"),
    [
        (DatasetInvalid("rows.jsonl:3: is not JSON"), 2, "DatasetInvalid", True),
        (InsufficientMemory("too big"), 3, "InsufficientMemory", True),
        (StoreFull("no space left"), 5, "StoreFull", True),
        (StoreFailed("timed out"), 5, "StoreFailed", False),
        (EngineFailed("died"), 5, "EngineFailed", False),
        (MemoryError(), 5, "OutOfMemory", False),
        (RuntimeError("boom"), 5, "StageFailed", False),
    ],
)
def test_a_failure_is_written_down_with_its_reason(
    store: Store, error: BaseException, code: int, reason: str, final: bool
) -> None:
    assert run_attempt(store, _claim(store), _raises(error)) == code
    failure = attempts.failure(store, Stage.SOURCE, KEY, 1)
    assert failure is not None
    assert (failure["reason"], failure["final"]) == (reason, final)
    assert attempts.find(store, Stage.SOURCE, KEY) is None


def test_only_what_trying_again_cannot_change_is_final() -> None:
    assert is_final(DatasetInvalid("x"))
    assert not is_final(EngineFailed("x"))


def test_an_unknown_error_names_itself_and_the_log(store: Store) -> None:
    run_attempt(store, _claim(store), _raises(ValueError("bad shape")))
    failure = attempts.failure(store, Stage.SOURCE, KEY, 1)
    assert failure is not None
    assert failure["message"] == "ValueError: bad shape; see `fastserve logs chat source`"


def test_being_told_to_stop_is_not_final(store: Store) -> None:
    assert run_attempt(store, _claim(store), _raises(Interrupted())) == 143
    failure = attempts.failure(store, Stage.SOURCE, KEY, 1)
    assert failure is not None
    assert (failure["reason"], failure["final"]) == ("Interrupted", False)


@pytest.mark.parametrize("stage", [_makes(), _raises(RuntimeError("boom")), _raises(Interrupted())])
def test_scratch_is_gone_afterwards_whatever_happens(
    store: Store, scratch: Path, stage: Callable[[Work], Outcome]
) -> None:
    run_attempt(store, _claim(store), stage)
    assert list(scratch.iterdir()) == []


def test_scratch_of_a_killed_attempt_at_the_same_key_goes_first(store: Store, scratch: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = scratch / f"fastserve-source-{KEY[:12]}-{dead.pid}-x"
    other = scratch / f"fastserve-train-{KEY[:12]}-{dead.pid}-x"
    for folder in (left, other):
        folder.mkdir(parents=True)
    run_attempt(store, _claim(store), _makes())
    assert list(scratch.iterdir()) == [other]


def test_an_older_attempt_gives_way_to_a_newer_one(store: Store) -> None:
    def stage(work: Work) -> Outcome:
        _claim(store, 2)  # meanwhile
        return _makes()(work)

    assert run_attempt(store, _claim(store, 1), stage) == 5
    assert attempts.find(store, Stage.SOURCE, KEY) is None
    assert attempts.failure(store, Stage.SOURCE, KEY, 1) is None


def test_an_attempt_that_is_submitted_late_does_not_begin(store: Store) -> None:
    late = _claim(store)
    _claim(store, 2)
    assert run_attempt(store, late, _raises(RuntimeError("must not run"))) == AttemptFenced.exit_code
    assert attempts.failure(store, Stage.SOURCE, KEY, 1) is None


def test_a_commit_removes_what_torn_attempts_before_it_left(store: Store) -> None:
    _claim(store, 1)
    torn = f"artifacts/source/{KEY}/attempts/1/files/half"
    store.write(torn, b"half")
    assert run_attempt(store, _claim(store, 2), _makes()) == 0
    assert torn not in store.names(f"artifacts/source/{KEY}/attempts/1/files/")


def test_progress_says_what_the_stage_reported(store: Store) -> None:
    run_attempt(store, _claim(store), _makes())
    progress = attempts.read_progress(store, Stage.SOURCE, KEY, 1)
    assert progress is not None
    assert (progress["done"], progress["total"], progress["unit"]) == (1, 1, "files")


def test_progress_is_there_before_the_stage_reports_anything(store: Store) -> None:
    seen: list[dict[str, Any] | None] = []

    def stage(work: Work) -> Outcome:
        seen.append(attempts.read_progress(store, Stage.SOURCE, KEY, 1))
        return _makes()(work)

    run_attempt(store, _claim(store), stage)
    assert seen[0] is not None
    assert seen[0]["note"] == "starting"


def test_a_heartbeat_repeats_the_last_progress_with_a_fresh_time() -> None:
    written: list[dict[str, Any]] = []
    clock = iter(range(1000))
    with Heartbeat(lambda value: written.append(dict(value)), every_seconds=0.01, now=lambda: next(clock)) as heart:
        heart.take({"done": 3, "at": 0})
        deadline = time.monotonic() + 60
        while len(written) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [value["done"] for value in written[1:]] == [3] * len(written[1:])
    assert [value["at"] for value in written] == sorted({value["at"] for value in written})


def test_progress_that_cannot_be_written_does_not_stop_the_stage() -> None:
    def full(_: object) -> None:
        raise StoreFull("no space left")

    with Heartbeat(full, every_seconds=0.01) as heart:
        heart.take({"done": 1})


def test_many_threads_may_report_at_once() -> None:
    written: list[Any] = []
    with Heartbeat(written.append, every_seconds=0.001) as heart:
        threads = [threading.Thread(target=lambda: [heart.take({"done": n}) for n in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(written) > 200


STAGE = """
import sys, time
from pathlib import Path
from fastserve.artifacts.stores import open_store
from fastserve.artifacts import attempts
from fastserve.plan.stages import Stage
from fastserve.stages import entry
from fastserve.stages.work import Outcome

def run(work):
    out = work.scratch / "out"; out.mkdir(); (out / "file").write_text("x")
    print("running", flush=True)
    time.sleep(float(sys.argv[1]))
    return Outcome(out)

entry.stage_function = lambda stage: run
sys.exit(entry.main(["--store", sys.argv[2], "--stage", "source", "--key", "a" * 64, "--attempt", "1"]))
"""


@pytest.fixture
def job(store: Store) -> Callable[[float], subprocess.Popen[str]]:
    def start(seconds: float) -> subprocess.Popen[str]:
        _claim(store)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-c", STAGE, str(seconds), store.uri],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        return process

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_stage_cleanly_and_soon(
    store: Store, scratch: Path, job: Callable[[float], subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = job(600)
    process.send_signal(number)
    process.send_signal(number)  # an impatient second one does not tear the clean-up
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert list(scratch.iterdir()) == []
    failure = attempts.failure(store, Stage.SOURCE, KEY, 1)
    assert failure is not None
    assert not failure["final"]


def test_a_killed_stage_leaves_neither_record_nor_failure(
    store: Store, job: Callable[[float], subprocess.Popen[str]]
) -> None:
    process = job(600)
    process.kill()
    process.communicate(timeout=100)
    assert attempts.find(store, Stage.SOURCE, KEY) is None
    assert attempts.failure(store, Stage.SOURCE, KEY, 1) is None


def test_a_log_that_nobody_reads_any_more_is_no_reason_to_fail(
    store: Store, job: Callable[[float], subprocess.Popen[str]]
) -> None:
    process = job(0.5)
    assert process.stderr is not None
    assert process.stdout is not None
    process.stderr.close()
    assert process.wait(timeout=100) == 0
    process.stdout.close()
    assert attempts.find(store, Stage.SOURCE, KEY) is not None


def test_arguments_that_name_no_stage_are_refused(store: Store) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "fastserve.stages.entry",
            "--store",
            store.uri,
            "--stage",
            "serve",
            "--key",
            KEY,
            "--attempt",
            "1",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "--stage" in run.stderr


def test_failures_are_json_that_an_observer_can_read(store: Store) -> None:
    run_attempt(store, _claim(store), _raises(RuntimeError("ü \x00 \ud800 odd")))
    name = f"artifacts/source/{KEY}/attempts/1/failure.json"
    assert json.loads(store.read(name))["reason"] == "StageFailed"


def test_services_of_a_cluster_are_gone_before_a_stage_loads_anything(store: Store, tmp_path: Path) -> None:
    """Public case 16: the evaluate stage loads vLLM in the driver's own process, which `VLLM_PORT` would end."""
    _claim(store)
    told = tmp_path / "told"
    code = (
        "import os, sys; from pathlib import Path; from fastserve.stages import entry; from fastserve.errors import *\n"
        "def stage(work):\n"
        f"    Path({str(told)!r}).write_text(' '.join(name for name in os.environ if name.startswith('VLLM_')))\n"
        "    raise DatasetInvalid('enough')\n"
        "entry.stage_function = lambda name: stage\n"
        "sys.exit(entry.main(sys.argv[1:]))"
    )
    arguments = ["--store", store.uri, "--stage", "source", "--key", KEY, "--attempt", "1"]
    links = {"VLLM_PORT": "tcp://10.96.0.10:8000", "VLLM_SERVICE_HOST": "10.96.0.10", "VLLM_USE_V1": "0"}
    named = {"VLLM_NAMED": "yes", "FASTSERVE_ENGINE_VARIABLES": "VLLM_NAMED"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env={**os.environ, **links, **named}, check=False)
    assert done.returncode == DatasetInvalid.exit_code
    assert told.read_text() == "VLLM_NAMED"

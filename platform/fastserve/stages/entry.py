"""Runs one attempt of one stage: what a Ray job starts, on a laptop and on a cluster.

    python -m fastserve.stages.entry --store URI --stage S --key K --attempt N

Everything that is the same for all stages happens here: the request is read, progress is kept fresh, the outcome is
committed, a failure is written down, the scratch folder goes away. Broad `except` lives here because this is where
errors of stages become what an observer sees.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fastserve.artifacts import attempts
from fastserve.artifacts.checkpoints import prune_checkpoints
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.errors import AttemptFenced, FastServeError, StageFailed, StoreFailed, StoreFull
from fastserve.plan.environment import foreign
from fastserve.plan.stages import Stage, StageRequest
from fastserve.stages.work import Outcome, Work
from fastserve.telemetry.progress import Reporter

HEARTBEAT_SECONDS = 3.0
"""A progress that is much older than this belongs to an attempt that is lost."""

INTERRUPTED = 143
"""Exit code of a process that SIGTERM ended, as a shell reports it."""

SCRATCH_VARIABLE = "FASTSERVE_SCRATCH"
"""Folder for scratch folders; the system's own when it is not set."""

log = logging.getLogger("fastserve.stage")


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C: not a failure of the stage, and nothing that a stage may catch by accident."""


class Heartbeat:
    """Hands progress to the store and repeats the last one, so that silence means loss. Safe from any thread."""

    def __init__(
        self,
        write: Callable[[Mapping[str, Any]], None],
        every_seconds: float = HEARTBEAT_SECONDS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._write = write
        self._every_seconds = every_seconds
        self._now = now
        self._lock = threading.Lock()
        self._last: dict[str, Any] = {"done": 0, "total": 0, "unit": "", "note": "starting", "metrics": {}}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def take(self, progress: dict[str, Any]) -> None:
        """A new progress from the stage."""
        with self._lock:
            self._last = progress
            self._hand_on()

    def beat(self) -> None:
        """The last progress again, as of now."""
        with self._lock:
            self._hand_on()

    def _hand_on(self) -> None:
        try:
            self._write({**self._last, "at": self._now()})
        except StoreFailed as error:
            log.warning("progress was not written: %s", error)  # the stage itself goes on; its commit will tell

    def _run(self) -> None:
        while not self._stopped.wait(self._every_seconds):
            self.beat()


def main(argv: list[str] | None = None) -> int:
    """Run the attempt that the arguments name; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastserve.stages.entry", description="Run one attempt of one stage."
    )
    parser.add_argument("--store", required=True, help="URI of the artifact store")
    parser.add_argument("--stage", required=True, type=Stage, choices=list(Stage))
    parser.add_argument("--key", required=True, help="key of the artifact, 64 hex digits")
    parser.add_argument("--attempt", required=True, type=int)
    args = parser.parse_args(argv)
    _log_to_stderr()
    for name in foreign(os.environ):  # the evaluate stage loads vLLM in this process
        del os.environ[name]
    # Ray gives a driver one thread; the stage is the only one that computes. Read by OpenMP when torch is imported.
    os.environ.setdefault("FASTSERVE_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ["OMP_NUM_THREADS"] = os.environ["FASTSERVE_THREADS"]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    store = open_store(args.store)
    request = attempts.request_of(store, args.stage, args.key, args.attempt)
    return run_attempt(store, request, stage_function(request.stage))


def stage_function(stage: Stage) -> Callable[[Work], Outcome]:
    """The stage's own function; only now are torch and the like imported."""
    function: Callable[[Work], Outcome] = importlib.import_module(f"fastserve.stages.{stage.value}").run
    return function


def run_attempt(store: Store, request: StageRequest, stage: Callable[[Work], Outcome]) -> int:
    """Run `stage` for an attempt that is claimed, and leave behind a record or a failure. Returns the exit code."""
    name = f"{request.stage} of {request.model}, attempt {request.attempt} at {request.key[:12]}"
    if attempts.find(store, request.stage, request.key) is not None:
        log.info("%s: already committed", name)
        return 0
    log.info("%s: begins", name)
    try:
        # Submitted late, by one who thought that he still decides: a newer attempt has its place.
        attempts.check_fence(store, request.stage, request.key, request.attempt)
        _run(store, request, stage)
    except AttemptFenced as error:
        log.warning("%s: gives way: %s", name, error)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt):
        _note_failure(store, request, "Interrupted", "it was told to stop", final=False)
        log.info("%s: stopped", name)
        return INTERRUPTED
    except FastServeError as error:
        _note_failure(store, request, error.reason, str(error), final=is_final(error))
        log.error("%s: %s: %s", name, error.reason, error)
        return error.exit_code
    except MemoryError as error:
        _note_failure(
            store,
            request,
            "OutOfMemory",
            f"the stage ran out of memory ({error}); use fewer tokens at a time",
            final=False,
        )
        log.exception("%s: out of memory", name)
        return StageFailed.exit_code
    except Exception as error:
        # Whatever else a stage raises must become a failure that can be read.
        last = "".join(traceback.format_exception_only(error)).strip()
        _note_failure(
            store, request, "StageFailed", f"{last}; see `fastserve logs {request.model} {request.stage}`", final=False
        )
        log.exception("%s: failed", name)
        return StageFailed.exit_code
    log.info("%s: committed", name)
    return 0


def _run(store: Store, request: StageRequest, stage: Callable[[Work], Outcome]) -> None:
    with (
        _scratch(request) as scratch,
        Heartbeat(lambda value: attempts.write_progress(store, request, value)) as heartbeat,
    ):
        report = Reporter(heartbeat.take, min_interval_seconds=2.0 if store.uri.startswith("s3://") else 0.5)
        work = Work(request=request, store=store, scratch=scratch, report=report)
        outcome = stage(work)
        report.close()
        parents = {role: work.input_record(role).digest for role in request.inputs}
        attempts.commit(store, request, outcome.folder, outcome.metrics, parents)
    # Committed: what older attempts left, and what a later one would have resumed from, is of no use now.
    for older in range(1, request.attempt):
        attempts.discard(store, request.stage, request.key, older)
    prune_checkpoints(store, request.stage, request.key, keep=0)


def is_final(error: FastServeError) -> bool:
    """Whether trying again cannot help: the input or the plan is refused, or there is no room."""
    return error.exit_code in (2, 3) or isinstance(error, StoreFull)


def _note_failure(store: Store, request: StageRequest, reason: str, message: str, final: bool) -> None:
    readable = message.encode(errors="replace").decode()  # an error may quote bytes that are no text
    try:
        attempts.fail(store, request, reason, readable, final)
        attempts.discard(store, request.stage, request.key, request.attempt)
    except StoreFailed as error:
        log.error("the failure could not be written down: %s", error)


@contextmanager
def _scratch(request: StageRequest) -> Iterator[Path]:
    """An empty folder for the attempt, gone afterwards; what a killed attempt at the same key left goes first."""
    base = Path(os.environ.get(SCRATCH_VARIABLE) or tempfile.gettempdir())
    base.mkdir(parents=True, exist_ok=True)
    prefix = f"fastserve-{request.stage}-{request.key[:12]}-"
    for left in base.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the clean-up that follows is not to be interrupted in its turn
    raise Interrupted


def _log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.raiseExceptions = False  # a reader of the log that went away is no reason to fail
    for chatty in ("httpx", "httpcore", "urllib3", "botocore", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())

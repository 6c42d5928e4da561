"""Checkpoints beside the steps: a save costs the step path one copy of the state, the rest happens in a thread.

The thread talks to those of the other workers over a process group of its own, so that its exchanges never mix with
the training's. Each worker uploads its own slices; the first one writes the marker, last, once it knows that all files
are there. What goes wrong on one worker is told to all, and all raise it alike from the next `check`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import logging
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from fastserve.artifacts.checkpoints import (
    begin_checkpoint,
    commit_checkpoint,
    prune_checkpoints,
    put_files,
    withdraw_checkpoint,
)
from fastserve.artifacts.durable import disk_errors
from fastserve.artifacts.record import FileEntry
from fastserve.artifacts.store import Store
from fastserve.artifacts.temporary import temporary_folder
from fastserve.errors import AttemptFenced, StoreFailed, StoreFull
from fastserve.plan.stages import StageRequest
from fastserve.stages.train.chunk import Chunk
from fastserve.stages.train.group import Group
from fastserve.stages.train.state import ALONE, FACTS, PURPOSE, TENSORS, RunState, flattened, write_facts

PATIENCE_SECONDS = 1800.0
"""Longest that a worker waits for the others, or for the save before: a large share over a slow network takes long. A
worker that dies is noticed at once, since its connection closes."""

_CLOSE_SECONDS = 5.0
_KINDS: tuple[type[StoreFailed], ...] = (AttemptFenced, StoreFull, StoreFailed)
"""What can go wrong, the worst first: nothing helps a fenced attempt, another group of workers may help the last."""

_LOG = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class _Job:
    """What one save writes."""

    tensors: Mapping[str, torch.Tensor]
    run: RunState


class Saver:
    """Saves the state of a run; the same calls in the same order on every worker of `group`.

    keep: newest checkpoints that stay; the best one (`RunState.best_step`) stays besides.
    patience_seconds: see PATIENCE_SECONDS.
    """

    def __init__(
        self,
        store: Store,
        request: StageRequest,
        group: Group,
        keep: int,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._store, self._request, self._group, self._keep = store, request, group, keep
        self._patience_seconds = patience_seconds
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._fault: StoreFailed | None = None
        self._peers: dist.ProcessGroup | None = None
        # Once and here: to change the filters for a while is not safe in a thread.
        warnings.filterwarnings("ignore", message=ALONE)
        if group.size > 1:
            # gloo whatever the training uses: what is told here lies in the memory of the machine.
            limit = datetime.timedelta(seconds=patience_seconds)
            self._peers = dist.new_group(backend="gloo", timeout=limit)

    @property
    def fault_code(self) -> int:
        """What is known here of the last save: 0 nothing bad, else 1 fenced, 2 full, 3 failed.

        For a caller that gathers numbers anyway: `check` needs to be called only when any worker's is not 0.
        """
        return _code(self._fault)

    def save(self, tensors: Mapping[str, torch.Tensor], run: RunState) -> None:
        """Copy this worker's part of the state after `run.step` steps, and return; writing goes on in the background.

        tensors: slices (Chunk), or whole tensors that are equal on every worker, by name. They may change, and move on
        to the next step, as soon as this returns. The first worker's `run` is the one that is kept.

        Waits for the save before, and raises what went wrong in it, like `wait`.
        """
        self.wait()
        job = _Job(
            self._copied(tensors), dataclasses.replace(run, curve=list(run.curve), extra=copy.deepcopy(run.extra))
        )
        self._fault = None
        self._thread = threading.Thread(target=self._work, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise, on every worker alike, what has gone wrong in the background on any of them.

        Raises AttemptFenced, StoreFull, or StoreFailed, which also tells of a worker that was lost.
        """
        codes = self._codes()
        code = min((code for code in codes if code), default=0)
        if not code:
            return
        # All background threads come to the same end; this one may not have heard of it yet.
        self._join(self._patience_seconds)
        fault, self._fault = self._fault, None
        if fault is not None and _code(fault) == code:
            raise fault
        raise _KINDS[code - 1](
            f"worker {codes.index(code)} could not save a checkpoint; see its log, then run `fastserve up` again"
        )

    def wait(self) -> None:
        """Wait until the last save counts, then `check`."""
        if not self._join(self._patience_seconds):
            self._fault = StoreFailed(
                f"a checkpoint was not saved within {self._patience_seconds:g} s; "
                "look at the store's speed, or save less often with checkpoint.everySteps"
            )
        self.check()

    def close(self) -> None:
        """Give up what is under way after a few seconds, and leave the group of the background. Raises nothing."""
        if self._join(_CLOSE_SECONDS):
            self._thread = None
            if self._peers is not None and dist.is_initialized():
                dist.destroy_process_group(self._peers)
            self._peers = None
        self._buffers.clear()

    def _codes(self) -> list[int]:
        """Every worker's `fault_code`, by rank."""
        try:
            return [int(row[0]) for row in self._group.gather_numbers([float(self.fault_code)])]
        except RuntimeError as error:
            if self._fault is None:
                raise
            raise self._fault from error  # the worker that is missing here is the one that the save has missed

    def _join(self, seconds: float) -> bool:
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _copied(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in host memory that is used again by the next save."""
        copies: dict[str, torch.Tensor] = {}
        old, self._buffers = self._buffers, {}
        for name, tensor in flattened(tensors).items():
            plain = tensor.plain() if isinstance(tensor, Chunk) else tensor
            buffer = old.pop(name, None)
            if buffer is None or buffer.numel() != plain.numel() or buffer.dtype != plain.dtype:
                buffer = torch.empty(plain.shape, dtype=plain.dtype, pin_memory=plain.is_cuda)
            self._buffers[name] = buffer.copy_(plain, non_blocking=plain.is_cuda)
            copies[name] = Chunk.make(buffer, tensor.offset, tensor.total) if isinstance(tensor, Chunk) else buffer
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def _work(self, job: _Job) -> None:
        """The thread: whatever happens, the fault that stands at the end is the truth."""
        fault: StoreFailed | None = StoreFailed("saving a checkpoint broke off; see the worker's log")
        try:
            self._write(job)
            fault = None
        except StoreFailed as error:
            fault = error
        except RuntimeError as error:
            # What torch.distributed raises when a peer is gone.
            fault = _lost(job.run.step, error)
        finally:
            self._fault = fault

    def _write(self, job: _Job) -> None:
        began_at = time.monotonic()
        rank, stage, key, step = self._group.rank, self._request.stage, self._request.key, job.run.step
        with contextlib.ExitStack() as held:
            begun = self._told(lambda: self._begin(job, held))
            folder, own = begun[rank][0], begun[0][1]
            if own is None:
                return  # a whole checkpoint of this step is there
            try:
                self._write_tensors(job, folder / TENSORS)
                files = self._told(lambda: self._put(step, own, folder))
            except BaseException:
                if rank == 0:
                    withdraw_checkpoint(self._store, stage, key, step, own)
                raise
            self._told(lambda: self._commit(job.run, own, [entry for entries in files for entry in entries]))
        _LOG.info("checkpoint of step %d kept after %.1f s", step, time.monotonic() - began_at)

    def _begin(self, job: _Job, held: contextlib.ExitStack) -> tuple[Path, str | None]:
        """A folder of this machine, and the upload's name from the first worker: None when the step has a whole one."""
        folder = held.enter_context(temporary_folder(PURPOSE))
        if self._group.rank:
            return folder, None
        stage, key, attempt = self._request.stage, self._request.key, self._request.attempt
        own = begin_checkpoint(self._store, stage, key, job.run.step, attempt)
        with disk_errors(str(folder), FACTS):
            write_facts(folder, job.run)
        return folder, own

    def _write_tensors(self, job: _Job, folder: Path) -> None:
        """Every worker's slices into a folder of its own machine, and what they are into the first one's."""
        # The upload reads the files at once: there is no need to flush them to this machine's disk.
        writer = dcp.FileSystemWriter(folder, sync_files=False)
        try:
            dcp.save(dict(job.tensors), storage_writer=writer, process_group=self._peers, no_dist=self._peers is None)
        except CheckpointException as error:
            cause = error  # raised on all workers alike, so that all of them come here
            self._told(lambda: self._explain(job, folder, cause))

    def _explain(self, job: _Job, folder: Path, error: CheckpointException) -> None:
        """Raise what the trouble of writing slices is: torch does not tell a full disk from other things."""
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in job.tensors.values())
        if shutil.disk_usage(folder.parent).free < size_bytes:
            raise StoreFull(
                f"no space left in {folder.parent.parent} of worker {self._group.rank}, through which its part of a "
                "checkpoint goes; free space there, or set TMPDIR"
            )
        rank, (cause, _) = min(error.failures.items())
        raise StoreFailed(f"worker {rank} could not write its part of a checkpoint: {cause}; check its disk")

    def _put(self, step: int, own: str, folder: Path) -> tuple[FileEntry, ...]:
        if not any(path.is_file() for path in folder.rglob("*")):
            return ()  # a worker without a share of the state
        return put_files(self._store, self._request.stage, self._request.key, step, own, folder)

    def _commit(self, run: RunState, own: str, files: list[FileEntry]) -> None:
        """The marker, then room for the next one; on the first worker."""
        if self._group.rank:
            return
        stage, key = self._request.stage, self._request.key
        commit_checkpoint(self._store, stage, key, run.step, self._request.attempt, own, files)
        try:
            prune_checkpoints(self._store, stage, key, self._keep, kept_besides=[run.best_step])
        except StoreFailed as error:
            _LOG.warning("older checkpoints stay until the next one is saved: %s", error)

    def _told(self, work: Callable[[], Answer]) -> list[Answer]:
        """Every worker's answer, by rank. Raises, on every worker alike, the worst that `work` raised on any."""
        answer, code, message = None, 0, ""
        try:
            answer = work()
        except StoreFailed as error:
            code, message = _code(error), str(error)
        except Exception as error:  # noqa: BLE001 - the others wait to be told, whatever it is
            _LOG.exception("worker %d could not save a checkpoint", self._group.rank)
            code, message = len(_KINDS), f"worker {self._group.rank} could not save a checkpoint: {error!r}"
        told: list[Any] = [(answer, code, message)]
        if self._peers is not None:
            told = [None] * self._group.size
            dist.all_gather_object(told, (answer, code, message), group=self._peers)
        _, code, message = min((one for one in told if one[1]), key=itemgetter(1), default=(None, 0, ""))
        if code:
            raise _KINDS[code - 1](message)
        return [answer for answer, _, _ in told]


def _code(fault: StoreFailed | None) -> int:
    """0 for none, else 1 and up: the place of its kind in _KINDS."""
    if fault is None:
        return 0
    return next(place for place, kind in enumerate(_KINDS, 1) if isinstance(fault, kind))


def _lost(step: int, error: RuntimeError) -> StoreFailed:
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    fault = StoreFailed(
        f"a worker was lost while the checkpoint of step {step} was saved, so it does not count ({cause}); "
        "the run goes on from the one before"
    )
    fault.__cause__ = error
    return fault

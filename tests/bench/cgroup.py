"""CPU quotas for single processes, so that one machine stands for several unequal ones.

A worker with a quota of 0.25 computes at a quarter of a core's speed, and so does everything that it does: its copies,
its share of an exchange, its optimizer. Works with the cpu controller of cgroup v1 (`cpu.cfs_quota_us`) and of cgroup
v2 (`cpu.max`), below the root that this process sees; both are described in the kernel's own documentation
(admin-guide/cgroup-v1 and cgroup-v2, scheduler/sched-bwc).
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PERIOD_MICROSECONDS = 20_000
"""Over which a quota holds: short against a training step, and a twentieth of it is above the kernel's 1 ms."""

LEAST_CORES = 1_000 / PERIOD_MICROSECONDS
_PREFIX = "fastserve-quotas-"
_V1 = Path("/sys/fs/cgroup/cpu")
_V2 = Path("/sys/fs/cgroup")


class NoQuotas(Exception):
    """This machine lets this process set no CPU quotas; the message says why."""


class Quotas:
    """Named groups with a CPU quota each: `with Quotas() as quotas: quotas.limit("slow", 0.25); quotas.join("slow")`.

    All groups lie below one that stands above other work on the machine, so that a quota is what a worker really gets
    as long as the quotas together leave the other processes some room. Leaving the block takes every process out and
    removes the groups, also those that an earlier, killed run left behind.

    Raises NoQuotas on entering where quotas cannot be set.
    """

    def __init__(self, root: Path | None = None) -> None:
        """root: mount of the cpu controller; found when left out."""
        self._root, self._is_v2 = (root, False) if root is not None else _mount()
        self._parent = self._root / f"{_PREFIX}{os.getpid()}"
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        try:
            self._clear(dead_only=True)
            self._parent.mkdir(exist_ok=True)
            if self._is_v2:
                _write(self._root / "cgroup.subtree_control", "+cpu")
                _write(self._parent / "cgroup.subtree_control", "+cpu")
                _write(self._parent / "cpu.weight", "10000")
            else:
                _write(self._parent / "cpu.shares", str(1024 * 64))
            self.limit("probe", 0.5)
        except OSError as error:
            self._clear()
            raise NoQuotas(f"cannot set CPU quotas below {self._root}: {error.strerror or error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if os.getpid() == self._owner:  # not in a worker that was forked inside the block
            self._clear()

    def limit(self, name: str, cores: float | None) -> None:
        """Give the group `name` so many cores' time from now on; None takes the limit away.

        The group is made when it is not there; processes in it stay. Raises OSError when the kernel refuses.
        """
        group = self._parent / name
        group.mkdir(exist_ok=True)
        quota = None if cores is None else max(1_000, round(PERIOD_MICROSECONDS * cores))
        if self._is_v2:
            _write(group / "cpu.max", f"{'max' if quota is None else quota} {PERIOD_MICROSECONDS}")
        else:
            _write(group / "cpu.cfs_quota_us", "-1")
            _write(group / "cpu.cfs_period_us", str(PERIOD_MICROSECONDS))
            _write(group / "cpu.cfs_quota_us", "-1" if quota is None else str(quota))

    def join(self, name: str, pid: int | None = None) -> None:
        """Move a process with all its threads, by default this one, into the group `name`."""
        _write(self._parent / name / "cgroup.procs", str(os.getpid() if pid is None else pid))

    def leave(self, pid: int | None = None) -> None:
        """Move a process, by default this one, out of all groups of this block."""
        _write(self._root / "cgroup.procs", str(os.getpid() if pid is None else pid))

    def _clear(self, dead_only: bool = False) -> None:
        if not self._root.is_dir():
            return
        for parent in self._root.glob(f"{_PREFIX}*"):
            owner = parent.name.removeprefix(_PREFIX)
            alive = owner.isdigit() and Path(f"/proc/{owner}").exists()
            if (dead_only and alive) or (not dead_only and parent != self._parent):
                continue
            for group in [*(item for item in parent.iterdir() if item.is_dir()), parent]:
                self._remove(group)

    def _remove(self, group: Path) -> None:
        for _ in range(50):  # a process that has just ended stays in its group for a moment
            with contextlib.suppress(OSError):
                for pid in (group / "cgroup.procs").read_text().split():
                    with contextlib.suppress(OSError):
                        self.leave(int(pid))
            with contextlib.suppress(OSError):
                group.rmdir()
            if not group.exists():
                return
            time.sleep(0.02)


def why_no_quotas() -> str:
    """Empty where quotas can be set, else the reason."""
    try:
        with Quotas():
            return ""
    except NoQuotas as error:
        return str(error)


def _mount() -> tuple[Path, bool]:
    if (_V1 / "cpu.shares").is_file() or (_V1 / "cgroup.procs").is_file():
        return _V1, False
    return _V2, True


def _write(file: Path, text: str) -> None:
    # Without O_CREAT: what is not there as the kernel's file must not be made as one of ours.
    handle = os.open(file, os.O_WRONLY)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)

"""Temporary folders that do not outlive their owner for long.

A checkpoint on its way to the store is as large as the training state. A process that is killed in the middle cannot
remove it, so every folder is locked by its owner (flock(2), which ends with the process), and whoever makes the next
one removes those whose lock is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastserve.artifacts.durable import disk_errors

_PREFIX = "fastserve-"


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A new, empty folder of this machine, removed at the end; what killed owners left for `purpose` goes first.

    Raises StoreFull or StoreFailed when the folder cannot be made.
    """
    place = tempfile.gettempdir()
    sweep_temporary(purpose)
    with disk_errors(place, purpose):
        folder, lock = _locked_folder(f"{_PREFIX}{purpose}-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep_temporary(purpose: str) -> None:
    """Remove the folders for `purpose` whose owner is gone. What cannot be removed is left to the next sweep."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}{purpose}-*"):
        with contextlib.suppress(OSError):
            lock = _open(folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _locked_folder(prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        with contextlib.suppress(FileNotFoundError):
            lock = _open(folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Between its making and its locking a sweep may have taken it for an orphan.
            if folder.exists():
                return folder, lock
            os.close(lock)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)

"""Folder stores that are real, and slow, full or deadly at a chosen place."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from fastserve.artifacts.folder_store import FolderStore
from fastserve.artifacts.store import Checksum

Trouble = Callable[[str], None]
"""Told the name of each object before it is put; may wait, raise, or end the process."""


class TroubledStore(FolderStore):
    """A folder store in which `trouble(name)` happens before an object is put, and `after(name)` once it is there."""

    def __init__(self, root: Path, trouble: Trouble, after: Trouble = lambda name: None) -> None:
        super().__init__(root)
        self.trouble, self.after = trouble, after

    def write(self, name: str, data: bytes) -> None:
        self.trouble(name)
        super().write(name, data)
        self.after(name)

    def create(self, name: str, data: bytes) -> bool:
        self.trouble(name)
        created = super().create(name, data)
        self.after(name)
        return created

    def put_file(self, name: str, source: Path) -> Checksum:
        self.trouble(name)
        checksum = super().put_file(name, source)
        self.after(name)
        return checksum


def slow_store(root: Path, seconds: float) -> TroubledStore:
    """A store in which every put takes `seconds` longer."""
    return TroubledStore(root, lambda name: time.sleep(seconds))


def kill_at(part: str) -> Trouble:
    """SIGKILL of this process at an object whose name holds `part`."""

    def trouble(name: str) -> None:
        if part in name:
            os.kill(os.getpid(), signal.SIGKILL)

    return trouble


def nothing(name: str) -> None:
    """No trouble."""

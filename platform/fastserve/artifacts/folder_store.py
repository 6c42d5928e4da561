"""The store as a folder: the laptop's, or a shared file system's.

Single objects are whole or absent through `durable`. `create` is a hard link (or renameat2 where there are none), so
its content is complete when its name appears, and exactly one of many writers wins, also over NFS.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from fastserve.artifacts.durable import copy_hashed, create_file, disk_errors, expect, replace_file
from fastserve.artifacts.store import RESERVED, Checksum, Store, check_name, check_prefix
from fastserve.errors import StoreFailed

_READ_ONLY = 0o444


class FolderStore(Store):
    """Objects are files below `root`, which is made when the first one is written."""

    parallel = 2

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.uri = self.root.as_uri()

    def read(self, name: str) -> bytes:
        """All bytes of the file."""
        with disk_errors(self._place, check_name(name)):
            return self._path(name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Temporary file, flush, rename."""

        def fill(file: BinaryIO) -> Checksum:
            file.write(data)
            return Checksum(len(data), "")

        with disk_errors(self._place, check_name(name)):
            replace_file(self._path(name), fill)

    def create(self, name: str, data: bytes) -> bool:
        """Temporary file, flush, hard link."""
        with disk_errors(self._place, check_name(name)):
            return create_file(self._path(name), data)

    def delete(self, name: str) -> None:
        """Unlink."""
        with disk_errors(self._place, check_name(name)):
            self._path(name).unlink(missing_ok=True)

    def names(self, prefix: str) -> list[str]:
        """Walk the deepest folder that the prefix names."""
        top = self.root / check_prefix(prefix).rpartition("/")[0]
        found = []
        with disk_errors(self._place, prefix):
            for folder, folders, files in os.walk(top, onerror=_raise_unless_gone):
                folders[:] = [name for name in folders if not name.startswith(RESERVED)]
                shown = os.path.relpath(folder, self.root)
                base = "" if shown == "." else f"{shown}/"
                found += [base + name for name in files if not name.startswith(RESERVED)]
        return sorted(name for name in found if name.startswith(prefix))

    def put_file(self, name: str, source: Path) -> Checksum:
        """Copy, flush, rename; the copy is read-only, so that a stage which maps it cannot change it by mistake."""
        with open_local(source) as file, disk_errors(self._place, check_name(name)):
            return replace_file(self._path(name), lambda target: copy_hashed(file, target), _READ_ONLY)

    def get_file(self, name: str, into: Path, sha256: str | None = None) -> Checksum:
        """Copy out."""
        with disk_errors(self._place, check_name(name)):
            source = open(self._path(name), "rb")  # noqa: SIM115 - closed below, apart from errors of the target
        with source, disk_errors(str(into.parent), into.name):

            def fill(target: BinaryIO) -> Checksum:
                checksum = copy_hashed(source, target)
                expect(self._place, name, checksum.sha256, sha256)
                return checksum

            return replace_file(into, fill)

    def delete_under(self, prefix: str) -> None:
        """Remove the folder."""
        with disk_errors(self._place, check_prefix(prefix)):
            _remove_tree(self._folder(prefix))

    def sweep(self, prefix: str, older_than_seconds: float = 86400.0) -> None:
        """Remove old temporary files; a living writer keeps touching its own."""
        limit = time.time() - older_than_seconds
        with disk_errors(self._place, check_prefix(prefix)):
            for folder, _, files in os.walk(self._folder(prefix), onerror=_raise_unless_gone):
                for name in files:
                    path = Path(folder, name)
                    if name.startswith(RESERVED) and path.lstat().st_mtime < limit:
                        path.unlink(missing_ok=True)

    def folder(self, prefix: str) -> Path | None:
        """The folder itself."""
        return self._folder(prefix)

    @property
    def _place(self) -> str:
        return f"the store {self.root}"

    def _path(self, name: str) -> Path:
        return self.root / name

    def _folder(self, prefix: str) -> Path:
        if not prefix.endswith("/"):
            raise StoreFailed(f"'{prefix}' names no folder of the store; end it with a '/'")
        return self.root / check_prefix(prefix)


def open_local(source: Path) -> BinaryIO:
    """Open a file that a stage made. Raises StoreFailed when it cannot be read."""
    with disk_errors(str(source.parent), source.name):
        return open(source, "rb")


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _remove_tree(folder: Path) -> None:
    """Remove a folder in which others may add and remove files meanwhile. Raises OSError."""
    for last in (False, False, False, True):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno == errno.ENOENT and not folder.exists():
                return
            if last or error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
        else:
            return

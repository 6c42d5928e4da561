"""Files of this machine that are whole or absent, whatever dies meanwhile.

A file is written under a temporary name in its own folder, flushed to the disk, and only then given its name. The
folder is flushed too: without that a crash of the machine may forget the name (fsync(2), "does not necessarily ensure
that the entry in the directory has also reached disk").
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from fastserve.artifacts.store import RESERVED, Checksum
from fastserve.errors import ArtifactNotFound, DigestMismatch, StoreFailed, StoreFull

CHUNK_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


@contextlib.contextmanager
def disk_errors(place: str, name: str) -> Iterator[None]:
    """Turn what the operating system says into the store's own errors. place: the store; name: a file in it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactNotFound(
            f"{place} has no {name}; check that the store is the one that the stage wrote to"
        ) from error
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(f"no space left in {place} for {name}; free space there, or use another store") from error
        if error.errno in _DENIED:
            raise StoreFailed(
                f"{place}: {name} may not be read or written by this user; "
                "give the user rights on it, or use another store"
            ) from error
        if error.errno == errno.EFBIG:
            raise StoreFull(
                f"{place} does not take a file as large as {name}; raise the limit (ulimit -f), or use another store"
            ) from error
        raise StoreFailed(
            f"{place}: {name}: {error.strerror or error}; check the disk, or use another store"
        ) from error


def replace_file(target: Path, fill: Callable[[BinaryIO], Checksum], mode: int = 0o644) -> Checksum:
    """Write `target` through `fill` and put it in place in one step, over an older one. Raises OSError."""
    with unfinished(target, mode) as (path, file):
        checksum = fill(file)
        flush(file)
        os.replace(path, target)
        flush_folder(target.parent)
    return checksum


def create_file(target: Path, data: bytes) -> bool:
    """Like replace_file, but False when `target` is there already; of many at once exactly one is told True."""
    with unfinished(target, 0o644) as (path, file):
        file.write(data)
        flush(file)
        try:
            os.link(path, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if not rename_if_free(path, target):
                return False
        flush_folder(target.parent)
    return True


@contextlib.contextmanager
def unfinished(target: Path, mode: int) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file under a temporary name beside `target`, removed at the end if it still has that name."""
    make_folder(target.parent)
    path = target.parent / f"{RESERVED}-{os.getpid()}-{secrets.token_hex(6)}.tmp"
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            os.fchmod(file.fileno(), mode)
            yield path, file
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def rename_if_free(source: Path, target: Path) -> bool:
    """Rename unless `target` exists, in one step (renameat2(2)), where there are no hard links. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    raise OSError(number, os.strerror(number), str(target))


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents, and flush the new names to the disk. Raises OSError."""
    new: list[Path] = []
    while not folder.is_dir():
        new.append(folder)
        folder = folder.parent
    for path in reversed(new):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        flush_folder(path.parent)


def flush(file: BinaryIO) -> None:
    """Everything written so far is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """The folder's names are on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_hashed(source: BinaryIO, target: BinaryIO) -> Checksum:
    """Copy to the end of `source`; the checksum is that of the bytes that passed."""
    digest, size_bytes = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        target.write(chunk)
        size_bytes += len(chunk)
    return Checksum(size_bytes, digest.hexdigest())


def hash_file(path: Path) -> Checksum:
    """Checksum of a local file. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return Checksum(file.tell(), digest.hexdigest())


def expect(place: str, name: str, found: str, wanted: str | None) -> None:
    """Raise DigestMismatch, naming the file, when bytes hash to something else than their record says."""
    if wanted is not None and found != wanted:
        raise DigestMismatch(
            f"{place}: {name} is damaged: its sha256 is {found[:16]}…, its record says {wanted[:16]}…; "
            "restore the file from a backup, or delete the artifact's folder so that the stage runs again"
        )

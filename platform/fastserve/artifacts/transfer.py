"""Whole folders in and out of a store: what an artifact or a checkpoint is made of.

Only plain files travel. A link could name a file outside the stage's folder, which its record would then not hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fastserve.artifacts.durable import disk_errors, expect, flush_folder, hash_file, make_folder
from fastserve.artifacts.record import FileEntry
from fastserve.artifacts.store import RESERVED, Store, check_name
from fastserve.errors import DigestMismatch, StoreFailed

DEFAULT_CACHE = Path("~/.cache/fastserve/artifacts")
Item = TypeVar("Item")
Result = TypeVar("Result")


def upload(store: Store, prefix: str, folder: Path, parallel: int | None = None) -> tuple[FileEntry, ...]:
    """Put every file below `folder` under `prefix` (ends with `/`); entries come back sorted by path.

    parallel: files at once; None leaves it to the store. One is put by the caller's own thread, so that nothing waits
    for it when the process ends.

    Raises StoreFailed for an empty folder, a link, or a name that the store cannot hold, before anything is sent.
    """
    paths = _plain_files(folder)

    def put(path: str) -> FileEntry:
        checksum = store.put_file(prefix + path, folder / path)
        return FileEntry(path, checksum.size_bytes, checksum.sha256)

    return tuple(_each(parallel or store.parallel, put, paths))


def download(
    store: Store, prefix: str, files: tuple[FileEntry, ...], digest: str, cache: Path | None, verify: bool
) -> Path:
    """A local folder with `files`: the store's own where it has one, else `cache/<digest>`.

    Raises DigestMismatch, naming the file, when bytes differ from their entry.
    """
    folder = store.folder(prefix)
    if folder is not None:
        _check(f"the store {folder}", folder, files, store.parallel, verify)
        return folder
    cache = (cache or DEFAULT_CACHE).expanduser()
    target = cache / digest
    with disk_errors(str(cache), digest), _only_one(cache, digest):
        if target.is_dir():
            try:
                _check(f"the cache {target}", target, files, store.parallel, verify)
                return target
            except (DigestMismatch, StoreFailed):
                # The store is the truth; a damaged copy is only thrown away.
                shutil.rmtree(target)
        return download_into(store, prefix, files, target)


def download_into(store: Store, prefix: str, files: Iterable[FileEntry], target: Path) -> Path:
    """Copy `files` into the folder `target`, which appears only when whole and checked.

    Raises DigestMismatch, which names the file, and StoreFailed when `target` is there already.
    """
    if target.exists():
        raise StoreFailed(f"{target} is there already; name a folder that does not exist yet")
    place, name = str(target.parent), target.name
    part = target.parent / f"{RESERVED}-{name}.part"
    try:
        with disk_errors(place, name):
            shutil.rmtree(part, ignore_errors=True)
            make_folder(part)

        def get(entry: FileEntry) -> None:
            into = part / entry.path
            store.get_file(prefix + entry.path, into, entry.sha256)
            into.chmod(0o444)

        _each(store.parallel, get, files)
        with disk_errors(place, name):
            os.rename(part, target)
            flush_folder(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _plain_files(folder: Path) -> list[str]:
    found: list[str] = []
    with disk_errors(str(folder.parent), folder.name):
        for root, folders, names in os.walk(folder, onerror=_raise):
            for name in (*folders, *names):
                path = Path(root, name)
                mode = path.lstat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise StoreFailed(f"{path} is a link or no plain file; a stage must write copies")
                if stat.S_ISREG(mode):
                    found.append(check_name(path.relative_to(folder).as_posix()))
    if not found:
        raise StoreFailed(f"{folder} holds no file; a stage must write what it hands on")
    return sorted(found)


def _check(place: str, folder: Path, files: Iterable[FileEntry], parallel: int, verify: bool) -> None:
    """Compare sizes, and the bytes themselves where `verify`."""

    def check(entry: FileEntry) -> None:
        with disk_errors(place, entry.path):
            path = folder / check_name(entry.path)
            if path.stat().st_size != entry.size_bytes:
                raise DigestMismatch(
                    f"{place}: {entry.path} is damaged: it has {path.stat().st_size} bytes, "
                    f"its record says {entry.size_bytes}; "
                    "restore the file from a backup, or delete the artifact's folder so that the stage runs again"
                )
            if verify:
                expect(place, entry.path, hash_file(path).sha256, entry.sha256)

    _each(parallel, check, files)


def _each(parallel: int, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    if parallel == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(parallel, thread_name_prefix="store") as pool:
        running = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in running]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _only_one(cache: Path, digest: str) -> Iterator[None]:
    """One process at a time fills the cache folder of a digest; the lock ends with its process."""
    make_folder(cache)
    with open(cache / f"{RESERVED}-{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _raise(error: OSError) -> None:
    raise error

"""What a source turned out to be, in words that all schemes share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastserve.errors import DigestMismatch
from fastserve.plan.digest import digest_of
from fastserve.plan.keys import Role

CHUNK_BYTES = 2**22

Tick = Callable[[int], None]
"""Takes the number of bytes that have come in since it was last called; may be called from any thread."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file that a source consists of."""

    path: str
    """Relative, with `/`: where it lies below the folder that `fetch` makes."""

    size_bytes: int
    at: str
    """Where it is now: a local path, an S3 key, a path in a repository."""

    stamp: str = ""
    """What its bytes must match: a sha256 (64 digits), a git blob's sha1 (40), an ETag of S3, or nothing."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A source, pinned to one content."""

    ident: str
    """`uri` or `uri@revision`, as the manifest names it."""

    scheme: str
    role: Role
    digest: str
    """64 hex digits; equal digest, equal content. A hub's begins with the commit."""

    files: tuple[SourceFile, ...]
    single: bool
    """The source names one file, not a folder."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)


class Opened(Protocol):
    """A source of one scheme; errors are SourceNotFound and SourceInvalid, and StageFailed for what may pass."""

    def resolve(self, digest: str | None = None) -> Resolved:
        """Find out what is there now, or for a digest that holds a commit what was there then."""

    def pull(self, file: SourceFile, target: Path, tick: Tick) -> None:
        """Bring one file to `target`, its bytes compared with its stamp."""

    def head(self, file: SourceFile, size_bytes: int) -> bytes:
        """The first bytes of a file, at most `size_bytes`."""

    def place(self, resolved: Resolved) -> Path | None:
        """Where the files lie already, if they are on this machine and nothing must be brought."""


def digest_of_hub(commit: str, role: Role, selection: str) -> str:
    """A digest from which the commit can be read back: a branch may have moved on when a worker fetches."""
    return commit + digest_of({"role": role, "selection": selection})[: 64 - len(commit)]


def copy_checked(source: Path, file: SourceFile, target: Path, tick: Tick) -> None:
    """Copy a local file, and see that what was copied is what was resolved.

    Raises DigestMismatch when it changed in between, or was damaged on its way.
    """
    digest = hashlib.sha1(usedforsecurity=False) if len(file.stamp) == 40 else hashlib.sha256()
    if len(file.stamp) == 40:
        digest.update(f"blob {file.size_bytes}\0".encode())  # how git names content
    copied = 0
    with source.open("rb") as old, target.open("xb") as new:
        while chunk := old.read(CHUNK_BYTES):
            digest.update(chunk)
            new.write(chunk)
            copied += len(chunk)
            tick(len(chunk))
    if copied != file.size_bytes or (file.stamp and digest.hexdigest() != file.stamp):
        raise DigestMismatch(
            f"'{file.path}' is not what it was when it was resolved: {copied} bytes instead of {file.size_bytes}, or "
            "others; "
            "leave the source alone while it is read, then run `fastserve up` again"
        )


def read_head(path: Path, size_bytes: int) -> bytes:
    """The first bytes of a local file."""
    with path.open("rb") as file:
        return file.read(size_bytes)


def sparse(head: bytes, size_bytes: int, target: Path) -> None:
    """A file of `size_bytes` that has only its head; the rest takes no space on the disk."""
    target.write_bytes(head)
    os.truncate(target, size_bytes)

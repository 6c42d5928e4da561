"""Where artifacts are kept: one small set of operations that a folder and an S3 bucket do alike.

Everything above (attempts, checkpoints, fetch) is written against `Store`, so that a laptop and a cluster fail in the
same ways. Two promises carry the rest: an object is whole or absent, and `create` lets exactly one writer win.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from fastserve.errors import StoreFailed

RESERVED = ".fastserve"
"""Parts of a name that begin so belong to the stores themselves (unfinished files, probes); `names` leaves them out."""

_MOST_NAME_BYTES = 900  # S3 allows 1024 for prefix and name together
_MOST_PART_BYTES = 255  # a file name on Linux


@dataclass(frozen=True, slots=True)
class Checksum:
    """Size and sha256 of bytes that passed through."""

    size_bytes: int
    sha256: str


class Store(ABC):
    """Named objects. Names are relative, parted by `/`, and checked by `check_name` (StoreFailed when refused).

    Every operation raises StoreFailed, or one of its kinds, with what to do; never an error of the library below.
    """

    uri: str
    """Opens the same store again through `open_store`, in another process too. Holds no secret."""

    parallel: int
    """How many transfers at once make sense."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All bytes of a small object. Raises ArtifactNotFound."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Put a small object, replacing it in one step if it is there."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Put a small object only if its name is free: True for exactly one of all writers, False for the others."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; it is no error when it is already gone."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """Names that begin with `prefix` (any text, `a/b/` or `a/b/c` alike), sorted."""

    @abstractmethod
    def put_file(self, name: str, source: Path) -> Checksum:
        """Stream a local file in; read-only once there. Returns its checksum, taken from the bytes that were sent."""

    @abstractmethod
    def get_file(self, name: str, into: Path, sha256: str | None = None) -> Checksum:
        """Stream an object out to the file `into`, which appears only when whole.

        sha256: what its bytes must hash to; DigestMismatch otherwise. Raises ArtifactNotFound.
        """

    @abstractmethod
    def delete_under(self, prefix: str) -> None:
        """Remove everything under `prefix`, which ends with `/`, unfinished writes included."""

    @abstractmethod
    def sweep(self, prefix: str, older_than_seconds: float = 86400.0) -> None:
        """Remove what killed writers left unfinished under `prefix` (ends with `/`), once it is that old."""

    @abstractmethod
    def folder(self, prefix: str) -> Path | None:
        """The local folder that holds the objects under `prefix`, where the store has one; else None."""


def check_name(name: str) -> str:
    """The name itself, when every store can hold it under that very name.

    Raises StoreFailed for an absolute name, an empty, `.` or `..` part, a backslash, a control character, text that is
    not Unicode, a part that is reserved, or too many bytes.
    """
    if problem := problem_of(name):
        raise StoreFailed(f"the store cannot hold the name {name!r}: {problem}; rename the file")
    return name


def check_prefix(prefix: str) -> str:
    """Like check_name, for a beginning of names: empty and a `/` at the end are fine."""
    if prefix:
        check_name(prefix.removesuffix("/"))
    return prefix


def problem_of(name: str) -> str:
    """Why a store cannot hold `name`; empty when it can."""
    if not name or name.startswith("/"):
        return "it must be relative and not empty"
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "it is not Unicode text"
    if "\\" in name or any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in name):
        return "it has a backslash or a control character"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "it has an empty, '.' or '..' part"
        if part.startswith(RESERVED):
            return f"parts that begin with {RESERVED} are reserved"
        if len(part.encode()) > _MOST_PART_BYTES:
            return f"a part is longer than {_MOST_PART_BYTES} bytes"
    return f"it is longer than {_MOST_NAME_BYTES} bytes" if len(encoded) > _MOST_NAME_BYTES else ""

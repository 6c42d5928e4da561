"""Where artifacts are kept: one small set of operations that a folder and an S3 bucket do alike.

Everything above (attempts, checkpoints, fetch) is written against `Store`, so that a laptop and a cluster fail in the
same ways. Two promises carry the rest: an object is whole or absent, and `create` lets exactly one writer win.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from fastserve.errors import StoreFailed, UsageInvalid

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


def open_store(uri: str) -> Store:
    """The store at `/path`, `path`, `file:///path` or `s3://bucket[/prefix][?endpoint=URL&region=NAME]`.

    Without `endpoint`, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL decide, then AWS itself. Nothing is read or made yet.
    Raises UsageInvalid for anything else.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme is None:
        return _folder(Path(uri).expanduser())
    if scheme[1] == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or parts.query or not parts.path.startswith("/"):
            raise UsageInvalid(f"'{uri}' is no folder of this machine; write file:///path or a plain path")
        return _folder(Path(unquote(parts.path)))
    if scheme[1] == "s3":
        return _bucket(uri)
    raise UsageInvalid(f"a store cannot be at '{scheme[0]}'; use a folder or s3://bucket/prefix")


def check_name(name: str) -> str:
    """The name itself, when every store can hold it under that very name.

    Raises StoreFailed for an absolute name, an empty, `.` or `..` part, a backslash, a control character, text that is
    not Unicode, a part that is reserved, or too many bytes.
    """
    if problem := _problem_of(name):
        raise StoreFailed(f"the store cannot hold the name {name!r}: {problem}; rename the file")
    return name


def check_prefix(prefix: str) -> str:
    """Like check_name, for a beginning of names: empty and a `/` at the end are fine."""
    if prefix:
        check_name(prefix.removesuffix("/"))
    return prefix


def _problem_of(name: str) -> str:
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


def _folder(path: Path) -> Store:
    from fastserve.artifacts.folder_store import FolderStore

    return FolderStore(path)


def _bucket(uri: str) -> Store:
    from fastserve.artifacts.s3_store import S3Store

    shown = uri.partition("?")[0]
    if "@" in shown:
        raise UsageInvalid(
            "an s3:// store must not carry credentials; put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    parts = urlsplit(uri)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", parts.netloc) or parts.fragment:
        raise UsageInvalid(
            f"'{shown}' names no bucket; write s3://bucket/prefix with 3 to 63 lower-case letters, digits, '.' or '-'"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(set(options) - {"endpoint", "region"}):
        raise UsageInvalid(f"'{shown}?{unknown[0]}=' is not known; a store takes ?endpoint= and &region=")
    prefix = unquote(parts.path).strip("/")
    if prefix and (problem := _problem_of(prefix)):
        raise UsageInvalid(f"'{shown}' has a prefix that cannot be used: {problem}")
    return S3Store(parts.netloc, prefix, endpoint=options.get("endpoint"), region=options.get("region"))

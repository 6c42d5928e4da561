"""What an artifact says of itself. The record is written last; without it there is no artifact."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from fastserve.plan.stages import Stage

RECORD_FORMAT = 1


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artifact."""

    path: str
    """Relative to the attempt's `files/` folder, with `/`."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Record:
    """A committed artifact."""

    stage: Stage
    key: str
    attempt: int
    files: tuple[FileEntry, ...]
    parents: Mapping[str, str] = field(default_factory=dict)
    """Digests of the artifacts it was made from, by role."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What the stage measured; plain JSON values."""

    made_at: float = 0.0
    """Unix seconds."""

    @property
    def digest(self) -> str:
        """sha256 over the sorted lines `sha256  path`: equal files, equal digest."""
        return digest_of_files(self.files)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size_bytes for entry in self.files)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the digest beside them for readers."""
        return {"format": RECORD_FORMAT, "digest": self.digest, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Back from plain values."""
        return cls(
            stage=Stage(value["stage"]),
            key=value["key"],
            attempt=value["attempt"],
            files=tuple(FileEntry(**entry) for entry in value["files"]),
            parents=value["parents"],
            metrics=value["metrics"],
            made_at=value["made_at"],
        )


def digest_of_files(files: Iterable[FileEntry]) -> str:
    """sha256 over the sorted lines `sha256  path`."""
    lines = sorted(f"{entry.sha256}  {entry.path}\n" for entry in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()

"""Reads the FILE argument: a path, or `-` for standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastserve.errors import ManifestInvalid, Problem, UsageInvalid
from fastserve.plan.executable import check_access_key
from fastserve.spec import load
from fastserve.spec.model import AccessKey


def read_manifests(file: Path) -> list[Any]:
    """The objects in a manifest. Raises ManifestInvalid with everything that is wrong, UsageInvalid when there is no
    file."""
    if str(file) == "-":
        return load.read(sys.stdin.read(), "standard input")
    if not file.exists():
        raise UsageInvalid(f"{file}: there is no such file")
    if file.is_dir():
        raise UsageInvalid(f"{file} is a folder; name a manifest in it")
    return load.read_file(file)


def read_as_written(file: Path) -> tuple[list[Any], list[Any]]:
    """The objects in a manifest twice: as `read_manifests` reads them, and with plain paths of sources as they stand
    there, which a cluster takes from the working directory of its pods, also after `kubectl apply`."""
    if str(file) == "-":
        found = read_manifests(file)
        return found, found
    return read_manifests(file), load.read(file.read_text(encoding="utf-8-sig"), str(file))


def require_keys_open(found: Iterable[Any]) -> None:
    """Refuse AccessKeys that would open nothing: with a limit that nothing keeps yet, or a last day that has passed.

    Raises NotExecutable, ManifestInvalid.
    """
    today = datetime.now(UTC).date()
    for item in found:
        if isinstance(item, AccessKey):
            check_access_key(item)
            if item.spec.expires is not None and item.spec.expires < today:
                told = (
                    f"{item.spec.expires} has passed, so {item.metadata.name} would open nothing; write a day to come"
                )
                raise ManifestInvalid([Problem("spec.expires", told)])

"""Reads the FILE argument: a path, or `-` for standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastserve.errors import UsageInvalid
from fastserve.spec import load


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

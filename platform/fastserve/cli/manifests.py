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

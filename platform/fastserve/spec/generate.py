"""Writes what is generated from the sections: `python -m fastserve.spec.generate [FOLDER]`.

A house test compares the committed files with what this writes, so that a changed section and an old page cannot both
be in the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastserve.spec.reference import page
from fastserve.spec.schema import schema_text

FOLDER = Path("docs/reference")
"""Below the repository's root."""


def generated() -> dict[str, str]:
    """Text of each generated file by its name."""
    return {"manifest.md": page(), "fastserve.schema.json": schema_text()}


def write(folder: Path) -> None:
    """Write the files into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in generated().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)

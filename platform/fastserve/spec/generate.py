"""Writes what is generated from the sections: `python -m fastserve.spec.generate [REPOSITORY]`.

A house test compares the committed files with what this writes, so that a changed section and an old page cannot both
be in the repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastserve.spec.crd import crd_texts
from fastserve.spec.reference import page
from fastserve.spec.schema import schema_text


def generated() -> dict[str, str]:
    """Text of each generated file by its path from the repository's root."""
    return {
        "docs/reference/manifest.md": page(),
        "docs/reference/fastserve.schema.json": schema_text(),
        **{f"helm/fastserve/crds/{plural}.yaml": text for plural, text in crd_texts().items()},
    }


def write(root: Path) -> None:
    """Write the files below `root`; folders are made if need be."""
    for name, text in generated().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())

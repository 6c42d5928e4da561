"""The reference page of the manifest, generated from the sections, so that it says what the reader does."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.spec.load import KINDS
from fastserve.spec.model import API_VERSION
from fastserve.spec.section import Section
from fastserve.spec.shape import FieldShape, one_line, walk
from fastserve.spec.source import Source

_OPENING = f"""<!-- Generated from the sections by `python -m fastserve.spec.generate`. Change those, not this page. -->

# Manifest reference

`apiVersion` is `{API_VERSION}`. A file may hold several manifests, with `---` between them. An unknown key is an error.

- A **duration** has a unit: `500ms`, `90s`, `2m`, `1h`, `30d`. A **size** too: `500MB`, `24GiB`. A **percentage** has
  its sign: `5%`.
- A **whole number** may be written `65536`, `1e5` or `2e8`; a **number** `0.0002` or `2e-4`.
- A **name** has at most 63 lower-case letters, digits and `-`, with a letter or digit at both ends.
- **Text** that reads as something else goes in quotes: `"on"`, `"no"`, `"0123"`, `"1.0"`.
- A **source** is a text, or a block with the keys under [Source](#source).
- A key without a default is absent, or derived, when it is left out.
"""


def page() -> str:
    """The page in Markdown; the same sections always give the same page."""
    parts = [_OPENING]
    for name, kind in KINDS.items():
        parts.append(f"## {name}\n\n{one_line(kind.__doc__ or '')}\n\n{_table(walk(kind))}")
    parts.append(f"## Source\n\n{one_line(Source.__doc__ or '')}\n\n{_table(walk(Source))}")
    return "\n".join(parts)


def undescribed(section: type[Section]) -> list[str]:
    """Paths of keys that say nothing of themselves; the house wants none."""
    return [path for path, field in walk(section) if not field.description]


def _table(fields: Iterable[tuple[str, FieldShape]]) -> str:
    lines = ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for path, field in fields:
        default = "**required**" if field.required else f"`{field.shown_default}`" if field.shown_default else ""
        lines.append(f"| `{path}` | {_takes(field)} | {default} | {_cell(field.description)} |")
    return "\n".join(lines) + "\n"


def _takes(field: FieldShape) -> str:
    if field.shape.choices:
        return " or ".join(f"`{choice}`" for choice in field.shape.choices)
    return "[source](#source)" if field.shape.is_source else _cell(field.shape.words)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

"""What `kubectl apply` notes beside an object, and what it loses on the way.

Client-side `kubectl apply` keeps the manifest in an annotation. That is a copy of the wishes, not one of them. But it
knows one thing that the object does not: kubectl leaves out every null, at creation and in patches, so a limit that
null switches off comes back with its default. Judged by a limit that the manifest switched off, a model would fail or
pass for a reason that stands nowhere; so the loss is a problem with a way out. Server-side apply keeps a null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastserve.errors import Problem
from fastserve.spec.section import Section
from fastserve.spec.shape import FieldShape, fields_of
from fastserve.spec.yaml_tree import Block, Entry, Items, Leaf, Tree

NOTE = "kubectl.kubernetes.io/last-applied-configuration"


def without_note(metadata: Block) -> Block:
    """Metadata without kubectl's annotation, and without annotations where there are no others."""
    notes = metadata.entries.get("annotations")
    if notes is None or not isinstance(notes.node, Block) or NOTE not in notes.node.entries:
        return metadata
    others = {key: entry for key, entry in notes.node.entries.items() if key != NOTE}
    entries = {key: entry for key, entry in metadata.entries.items() if key != "annotations"}
    if others:
        entries["annotations"] = Entry(notes.line, Block(others, notes.node.line, notes.node.size))
    return Block(entries, metadata.line, metadata.size)


def lost_nulls(tree: Block, kind: type[Section], file: str | None) -> Iterator[Problem]:
    """Each null of the manifest that was applied where the object now has the default."""
    at: Tree | None = tree
    for key in ("metadata", "annotations", NOTE):
        at = at.entries[key].node if isinstance(at, Block) and key in at.entries else None
    if not isinstance(at, Leaf) or not isinstance(at.value, str):
        return
    try:
        applied = json.loads(at.value)
    except ValueError:
        return  # not kubectl's: it writes JSON
    yield from _lost(tree, applied, kind, "", file)


def _lost(tree: Tree, applied: Any, section: type[Section], path: str, file: str | None) -> Iterator[Problem]:
    if isinstance(tree, Items) and isinstance(applied, list) and len(tree.items) == len(applied):
        for number, (item, wish) in enumerate(zip(tree.items, applied, strict=True)):
            yield from _lost(item, wish, section, f"{path}[{number}]", file)
    if not isinstance(tree, Block) or not isinstance(applied, dict):
        return
    for key, field in fields_of(section).items():
        if key not in tree.entries or key not in applied:
            continue
        entry, place = tree.entries[key], f"{path}.{key}".lstrip(".")
        if field.shape.section is not None:
            yield from _lost(entry.node, applied[key], field.shape.section, place, file)
        elif applied[key] is None and _is_default(entry.node, field):
            yield Problem(
                place,
                f"is null in the manifest, which kubectl apply left out, so the default {field.shown_default} came "
                f"back; apply it with --server-side, or write what is never reached: {_never_reached(field)}",
                entry.line,
                file=file,
            )


def _is_default(node: Tree, field: FieldShape) -> bool:
    if not field.nullable or field.default is None or not isinstance(node, Leaf):
        return False
    return node.value in (field.default, field.shown_default)


def _never_reached(field: FieldShape) -> str:
    if not field.shape.words.startswith("percentage"):
        return "1e9"
    return "100%" if "up to" in field.shape.words else "1000000%"

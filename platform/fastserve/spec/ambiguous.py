"""Values that are right by type and still could mean two things: refused by name, never guessed.

`serve:` with nothing behind it reads as null, which a cluster drops: a model that was meant to be served would not be.
`steps: 0123` is 83 to one reader and 123 to another. Both pass every check of types, so they are looked for here.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastserve.errors import Problem
from fastserve.spec.evaluate import TASK_KEY, Gate
from fastserve.spec.scalars import is_octal_or_decimal
from fastserve.spec.section import Section
from fastserve.spec.shape import FieldShape, fields_of
from fastserve.spec.yaml_tree import Block, Entry, Items, Leaf, Tree, join


def ambiguities(block: Block, section: type[Section], path: str = "", file: str | None = None) -> Iterator[Problem]:
    """Every ambiguous value below `block`, which stands at `path` and is read as `section`."""
    fields = fields_of(section)
    for key, entry in block.entries.items():
        here = join(path, key)
        if section is Gate and key == "tasks":
            message = f"a gate names its tasks one by one; write `{TASK_KEY}NAME: {{min: 0.8}}`"
            yield Problem(here, message, entry.line, f"{TASK_KEY}NAME", file)
        elif section is Gate and key.startswith(TASK_KEY):
            yield from _task_limits(fields["tasks"], entry, here, file)
        elif key in fields:
            yield from _value(fields[key], entry, here, file)


def _task_limits(field: FieldShape, entry: Entry, path: str, file: str | None) -> Iterator[Problem]:
    if isinstance(entry.node, Block) and field.shape.section:
        yield from ambiguities(entry.node, field.shape.section, path, file)


def _value(field: FieldShape, entry: Entry, path: str, file: str | None) -> Iterator[Problem]:
    section = field.shape.section
    if section and not field.shape.many and not field.required and _is_null(entry.node):
        message = (
            f"is empty, and a cluster would drop it; write `{field.key}: {{}}` for the defaults, or remove the line"
        )
        yield Problem(path, message, entry.line, f"{field.key}: {{}}", file)
        return
    for node, here in _each(entry.node, path):
        if section and isinstance(node, Block):
            yield from ambiguities(node, section, here, file)
        elif isinstance(node, Leaf) and field.shape.form and field.shape.form.number:
            yield from _number(node, entry.line if here == path else node.line, here, file)


def _each(node: Tree, path: str) -> Iterator[tuple[Tree, str]]:
    if isinstance(node, Items):
        for index, item in enumerate(node.items):
            yield item, join(path, index)
    else:
        yield node, path


def _number(leaf: Leaf, line: int, path: str, file: str | None) -> Iterator[Problem]:
    if not leaf.plain or isinstance(leaf.value, str) or not is_octal_or_decimal(leaf.raw):
        return
    decimal = str(int(leaf.raw.replace("_", "")))
    if float(decimal) == leaf.value:
        message = f"{leaf.raw} begins with a zero; write {decimal}"
    else:
        message = f"{leaf.raw} is {leaf.value} to kubectl, since it begins with a zero; write {decimal} or {leaf.value}"
    yield Problem(path, message, line, decimal, file)


def _is_null(node: Tree) -> bool:
    return isinstance(node, Leaf) and node.value is None

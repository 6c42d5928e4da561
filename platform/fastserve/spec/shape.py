"""The sections as data: which keys a block has, and what each of them takes.

Messages, the reference page and the search for the nearest key all read the same shape, so that none of them can name
a key or a type that the reader does not know.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fastserve.spec.evaluate import TASK_KEY, Gate
from fastserve.spec.section import Form, Section
from fastserve.spec.source import Source


@dataclass(frozen=True, slots=True)
class Shape:
    """What a key takes."""

    words: str
    """In a sentence behind `must be a ...`: `whole number from 1`, `list of blocks`."""

    section: type[Section] | None = None
    """The block, or the block of each item."""

    form: Form | None = None
    """The scalar type of the value, or of each item."""

    choices: tuple[str, ...] = ()
    """The texts that are allowed, where only some are."""

    many: bool = False
    """Whether it is a list or a mapping of such things."""

    @property
    def is_source(self) -> bool:
        """Whether a text may stand for the block."""
        return self.section is Source


@dataclass(frozen=True, slots=True)
class FieldShape:
    """One key of a block."""

    key: str
    """camelCase, as in the manifest."""

    shape: Shape
    required: bool
    default: Any
    """What it is when left out; None where it is then absent or derived."""

    description: str
    """One line."""

    nullable: bool
    """Whether null may stand there: a limit that it switches off."""

    @property
    def shown_default(self) -> str:
        """The default as a manifest would say it; empty where there is none."""
        if self.default is None:
            return ""
        if self.shape.form is not None and self.shape.form.write is not None:
            return self.shape.form.write(self.default)
        if isinstance(self.default, Section):
            return "{}"
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, list) and self.default and isinstance(self.default[0], Section):
            items = (item.model_dump(mode="json", by_alias=True, exclude_none=True) for item in self.default)
            return "[" + ", ".join("{" + ", ".join(f"{k}: {v}" for k, v in item.items()) + "}" for item in items) + "]"
        if isinstance(self.default, list):
            return "[" + ", ".join(str(item) for item in self.default) + "]"
        return "{}" if self.default == {} else str(self.default)


@cache
def fields_of(section: type[Section]) -> dict[str, FieldShape]:
    """The keys of a block by their names in the manifest, in the order in which they are documented."""
    shapes = {}
    for name, info in section.model_fields.items():
        key = info.alias or name
        default = info.get_default(call_default_factory=True, validated_data={})
        shapes[key] = FieldShape(
            key=key,
            shape=_shape(info.annotation, info.metadata),
            required=info.is_required(),
            default=None if default is PydanticUndefined else default,
            description=one_line(info.description or ""),
            nullable=_is_union(info.annotation) and types.NoneType in get_args(info.annotation),
        )
    return shapes


def walk(section: type[Section], path: str = "") -> Iterator[tuple[str, FieldShape]]:
    """Every key below a block with its path: `spec.train.workers[].profile`, `spec.evaluate.gate.task.<name>.min`.

    A source is named and not gone into: it looks the same wherever it stands.
    """
    for key, field in fields_of(section).items():
        if section is Gate and key == "tasks":
            # One mapping in Python, keys beside the other limits in the manifest.
            field = replace(field, key=f"{TASK_KEY}<name>", default=None, shape=Shape("block", field.shape.section))
        here = f"{path}.{field.key}" if path else field.key
        yield here, field
        if field.shape.section is not None and not field.shape.is_source:
            yield from walk(field.shape.section, f"{here}[]" if field.shape.many else here)


def one_line(text: str) -> str:
    """A wrapped docstring as one line."""
    return " ".join(text.split())


def _shape(annotation: Any, metadata: Sequence[Any]) -> Shape:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _shape(inner, [*metadata, *spread(more)])
    if _is_union(annotation):
        present = [item for item in get_args(annotation) if item is not types.NoneType]
        return _shape(present[0], metadata)
    if origin is Literal:
        choices = tuple(str(choice) for choice in get_args(annotation))
        return Shape(words=" or ".join(choices), choices=choices)
    if origin is list:
        item = _shape(get_args(annotation)[0], ())
        return Shape(f"list of {_plural(item.words)}", item.section, item.form, item.choices, many=True)
    if origin is dict:
        item = _shape(get_args(annotation)[1], ())
        return Shape(f"block of names and {_plural(item.words)}", item.section, item.form, many=True)
    form = next((item for item in metadata if isinstance(item, Form)), None)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return Shape("source" if annotation is Source else "block", annotation, form)
    words = form.words if form else {str: "text", bool: "true or false"}.get(annotation, "value")
    return Shape(words + _bounds(metadata, form), None, form)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def spread(metadata: Sequence[Any]) -> Iterator[Any]:
    """Annotations of a type, with what `Field(...)` among them holds."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _bounds(metadata: Sequence[Any], form: Form | None) -> str:
    write = form.write if form and form.write else str
    words = []
    for item in metadata:
        if isinstance(item, Ge):
            words.append(f" from {write(item.ge)}")
        elif isinstance(item, Gt):
            words.append(f" above {write(item.gt)}")
        elif isinstance(item, Le):
            words.append(f" up to {write(item.le)}")
        elif isinstance(item, Lt):
            words.append(f" below {write(item.lt)}")
    return "".join(words)


def _plural(words: str) -> str:
    head, blank, rest = words.partition(" from ")
    if head == "text":
        return f"texts{blank}{rest}"
    return f"{head}s{blank}{rest}" if head.split()[-1].isalpha() else words

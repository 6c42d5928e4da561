"""Sections as structural schemas: the dialect of OpenAPI v3 in which an API server checks custom resources.

A structural schema gives every key one type, so that unknown keys can be pruned and defaults be filled in. It knows no
`$ref`, no choice of types, and no closed block: an unknown key is refused by strict field validation, which kubectl
asks for by itself. Three things of the manifest do not fit. There, and only there, stands
`x-kubernetes-preserve-unknown-fields`:

- a **source**, a text or a block. Keywords for texts bind the text, keywords for blocks bind the block, and bounds that
  nothing can meet refuse the rest. The block is closed by counting its keys.
- a value of `scratch.config`: number, flag or text; bounds refuse lists and blocks.
- the **gate** keeps its type and is left open: `task.<name>` keys beside named ones need patterns of keys, which a
  structural schema does not have. What stands behind such a key only FastServe checks.

Patterns of quantities take what `fastserve.units` reads, but for its rounding: a size that rounds to 0 bytes or is
beyond 64 bits, and a percentage above 100% by less than a float can tell, are told apart by FastServe alone.

A default is written where an API server that fills it in changes nothing: read back, the Model is equal. Exceptions are
in `NO_DEFAULT`; empty lists and mappings are left out, since they say nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

from fastserve import units
from fastserve.spec.evaluate import Evaluate, Gate
from fastserve.spec.rules import rules_of
from fastserve.spec.section import NAME_PATTERN, Form, Section
from fastserve.spec.serve import Replicas, Serve
from fastserve.spec.shape import FieldShape, fields_of, spread
from fastserve.spec.source import SCHEMES, Source
from fastserve.spec.train import Scratch, Train

Schema = dict[str, Any]

NO_DEFAULT = {
    (Replicas, "max"): "as many as min, and at least 1",
    (Serve, "profiles"): "[local]",
    (Train, "workers"): "[{profile: local, count: 1}]",
}
"""Keys whose default stays with FastServe, each with what it is when left out. A max that was filled in would refuse
`replicas: {min: 3}`; `local` is another machine everywhere, and filled in it could not be told from a wish."""

NAMED_ITEMS = {(Evaluate, "tasks"), (Serve, "adapters")}
"""Lists in which a name stands once: the API server refuses a second one and merges lists by it."""

_OPEN = "x-kubernetes-preserve-unknown-fields"
_NO_NUMBER: Schema = {"minimum": 1, "maximum": 0}
_NO_LIST: Schema = {"minItems": 1, "maxItems": 0}
_NO_BLOCK: Schema = {"minProperties": 1, "maxProperties": 0}
_NO_FLAG: Schema = {"not": {"enum": [True, False]}}

_SOMETHING = r"[^\t-\r\x1c-\x20]"
"""A character that is seen."""

_PLAIN_PATH = r"^([^:]|:(:|/:)*([^:/]|/[^:/]))*(:(:|/:)*/?)?$"
"""A text without `://`; there is no looking ahead in the API server's patterns."""


def name_schema() -> Schema:
    """A DNS-1123 label."""
    return {"type": "string", "maxLength": 63, "pattern": NAME_PATTERN}


def block_schema(section: type[Section]) -> Schema:
    """A section as an object with its keys, defaults and rules; without a description of its own."""
    if section is Source:
        return _source()
    properties, required = {}, []
    for name, info in section.model_fields.items():
        field = fields_of(section)[info.alias or name]
        if section is Gate and name == "tasks":
            continue
        properties[field.key] = _key(section, field, info.annotation, info.metadata)
        if field.required:
            required.append(field.key)
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    if section is Gate:
        schema |= {_OPEN: True, "not": {"required": ["tasks"]}}
    if rules := rules_of(section):
        schema["x-kubernetes-validations"] = [rule.to_schema() for rule in rules]
    return schema


def _key(section: type[Section], field: FieldShape, annotation: Any, metadata: Sequence[Any]) -> Schema:
    """One key of a block."""
    schema = {"description": _description(section, field), **_value(annotation, metadata)}
    if (section, field.key) in NAMED_ITEMS:
        schema |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    if (section, field.key) == (Scratch, "config"):
        schema["not"] = {"required": ["vocab_size"]}
    if _has_default(section, field):
        schema["default"] = _written(field)
        if field.nullable:
            schema["nullable"] = True
    return schema


def _description(section: type[Section], field: FieldShape) -> str:
    """What `kubectl explain` says of a key."""
    words, form = field.description, field.shape.form
    if form is not None and form.write is not None and "such as" not in words:
        words += f" A {form.words}, such as {form.example}."
    if section is Evaluate and field.key == "gate":
        words += " A task's limits are a key `task.NAME: {min: 0.8, maxDrop: 1%}`."
    if (section, field.key) in NO_DEFAULT:
        words += f" Left out: {NO_DEFAULT[section, field.key]}."
    return words


def _has_default(section: type[Section], field: FieldShape) -> bool:
    return field.default not in (None, [], {}) and (section, field.key) not in NO_DEFAULT


def _written(field: FieldShape) -> Any:
    """The default as a manifest writes it; a block is written empty and filled in from its own keys."""
    if isinstance(field.default, Section):
        return {}
    if field.shape.form is not None and field.shape.form.write is not None:
        return field.shape.form.write(field.default)
    return field.default


def _value(annotation: Any, metadata: Sequence[Any]) -> Schema:
    """What a key takes, from its type and the bounds and forms that stand beside it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _value(inner, [*metadata, *spread(more)])
    form = next((item for item in metadata if isinstance(item, Form)), None)
    if form is not None and form.words in _SCALARS:
        return _SCALARS[form.words](metadata)
    if origin in (Union, types.UnionType):
        (present,) = (item for item in get_args(annotation) if item is not types.NoneType)
        return _value(present, metadata)
    if origin is Literal:
        return {"type": "string", "enum": list(get_args(annotation))}
    if origin is list:
        return {"type": "array", "items": _value(get_args(annotation)[0], ()), **_length(metadata)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(get_args(annotation)[1], ())}
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return block_schema(annotation)
    return {"type": {str: "string", bool: "boolean"}[annotation]}


def _length(metadata: Sequence[Any]) -> Schema:
    schema: Schema = {}
    for item in metadata:
        if isinstance(item, MinLen):
            schema["minItems"] = item.min_length
        elif isinstance(item, MaxLen):
            schema["maxItems"] = item.max_length
    return schema


def _whole(metadata: Sequence[Any]) -> Schema:
    """Bounds of whole numbers are inclusive; the format is that of 64 bits, which the reader keeps to as well."""
    schema: Schema = {"type": "integer", "format": "int64"}
    for item in metadata:
        if isinstance(item, Ge):
            schema["minimum"] = item.ge
        elif isinstance(item, Gt):
            schema["minimum"] = item.gt + 1  # type: ignore[operator]
        elif isinstance(item, Le):
            schema["maximum"] = item.le
    return schema


def _number(metadata: Sequence[Any]) -> Schema:
    """In OpenAPI v3.0 a bound is made exclusive by a flag beside it."""
    schema: Schema = {"type": "number"}
    for item in metadata:
        if isinstance(item, Ge):
            schema["minimum"] = item.ge
        elif isinstance(item, Gt):
            schema |= {"minimum": item.gt, "exclusiveMinimum": True}
        elif isinstance(item, Le):
            schema["maximum"] = item.le
        elif isinstance(item, Lt):
            schema |= {"maximum": item.lt, "exclusiveMaximum": True}
    return schema


_ANY = r"[0-9]+(\.[0-9]+)?"
_ABOVE_0 = r"(0*[1-9][0-9]*(\.[0-9]+)?|0+\.0*[1-9][0-9]*)"
_UP_TO_1 = r"(0*[0-9]{1,2}(\.[0-9]+)?|0*100(\.0+)?)"
_DIGITS = {(): _ANY, (Gt(0),): _ABOVE_0}
_DIGITS_OF_SHARES = {(): _ANY, (Le(1),): _UP_TO_1}


def _quantity(digits: dict[tuple[Any, ...], str], names: Sequence[str]) -> Callable[[Sequence[Any]], Schema]:
    """A number with one of the units `names`; `digits` are those of each bound that our sections have."""

    unit = names[0] if len(names) == 1 else f"({'|'.join(names)})"

    def schema(metadata: Sequence[Any]) -> Schema:
        bounds = tuple(item for item in metadata if isinstance(item, Ge | Gt | Le | Lt))
        return {"type": "string", "pattern": rf"^\s*{digits[bounds]}\s*{unit}\s*$"}

    return schema


def _day(metadata: Sequence[Any]) -> Schema:
    return {"type": "string", "format": "date", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}


def _plain(metadata: Sequence[Any]) -> Schema:
    return {_OPEN: True, **_NO_BLOCK, **_NO_LIST}


_SCALARS: dict[str, Callable[[Sequence[Any]], Schema]] = {
    "duration": _quantity(_DIGITS, units.DURATION_UNITS),
    "size": _quantity(_DIGITS, units.SIZE_UNITS),
    "percentage": _quantity(_DIGITS_OF_SHARES, ("%",)),
    "whole number": _whole,
    "number": _number,
    "day": _day,
    "name": lambda metadata: name_schema(),
    "plain value": _plain,
}
"""By the words of a form."""


def _source() -> Schema:
    """A text or a block with uri, revision and tokenSecret; a revision stands beside an hf:// URI without one."""
    described = {key: field.description for key, field in fields_of(Source).items()}
    places: Schema = {"pattern": _SOMETHING, "anyOf": [{"pattern": pattern} for pattern in _uris()]}
    with_revision: Schema = {"uri": {"pattern": "^hf://[^@]*$"}}
    return {
        _OPEN: True,
        **_NO_NUMBER,
        **_NO_LIST,
        **_NO_FLAG,
        "allOf": [places],
        "anyOf": [
            {"required": ["uri"], "maxProperties": 1},
            {"required": ["uri", "tokenSecret"], "maxProperties": 2},
            {"required": ["uri", "revision"], "maxProperties": 2, "properties": with_revision},
            {"required": ["uri", "revision", "tokenSecret"], "maxProperties": 3, "properties": with_revision},
        ],
        "properties": {
            "uri": {"description": described["uri"], "type": "string", **places},
            "revision": {"description": described["revision"], "type": "string", "pattern": _SOMETHING},
            "tokenSecret": {"description": described["tokenSecret"], **name_schema()},
        },
    }


def _uris() -> list[str]:
    """A path, or one pattern a scheme: something behind `://`, an absolute file, no `@` at the end of a hub's name."""
    of_scheme = {"file": "^file:///+[^/]", "hf": r"^hf://(.|\n)*([^/@]|[^/]/+)$"}
    return [_PLAIN_PATH, *(of_scheme.get(scheme, f"^{scheme}:///*[^/]") for scheme in SCHEMES)]

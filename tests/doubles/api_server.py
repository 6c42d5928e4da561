"""What an API server does with an object of a CustomResourceDefinition, as far as the schema decides.

Written from the Kubernetes documentation ("Extend the Kubernetes API with CustomResourceDefinitions"): nulls, strict
field validation, defaulting, then validation. CEL rules are not evaluated. Patterns are read as RE2 reads them: `$` is
the end, `\\s` is a blank of ASCII.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema

OPEN = "x-kubernetes-preserve-unknown-fields"


class Refused(Exception):
    """The object is not stored."""


class Resource:
    """One kind of object, as its definition has it."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._validator = VALIDATOR(translated(schema))

    def admit(self, value: Any) -> Any:
        """The object as it is stored. Raises Refused with everything that is wrong."""
        try:
            stored = json.loads(json.dumps(value, allow_nan=False))
        except ValueError as error:
            raise Refused(str(error)) from None
        problems = list(unknown_fields(self._schema, stored))
        fill(self._schema, stored)
        problems += [f"{error.json_path}: {error.message}" for error in self._validator.iter_errors(stored)]
        if problems:
            raise Refused("\n".join(problems))
        return stored


def unknown_fields(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[str]:
    """Keys that the schema does not name: with `fieldValidation: Strict`, kubectl's default, they are errors."""
    if path in (".metadata", ".apiVersion", ".kind"):
        return
    for key, item in _items(value):
        below = _below(schema, key)
        if below is not None:
            yield from unknown_fields(below, item, f"{path}.{key}")
        elif not schema.get(OPEN):
            yield f"{path}.{key}: unknown field"


def fill(schema: dict[str, Any], value: Any) -> None:
    """Drop each null that may not be one, and write defaults, from the outside in."""
    if isinstance(value, dict):
        for key, item in list(value.items()):
            below = _below(schema, key)
            if item is None and below is not None and not below.get("nullable"):
                del value[key]
        for key, below in schema.get("properties", {}).items():
            if "default" in below and key not in value:
                value[key] = copy.deepcopy(below["default"])
    for key, item in _items(value):
        below = _below(schema, key)
        if below is not None:
            fill(below, item)


def translated(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema in the words of JSON Schema 2020-12."""
    plain = dict(schema)
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if plain.get(exclusive) is True:
            plain[exclusive] = plain.pop(bound)
    if plain.pop("nullable", False):
        plain["type"] = [plain["type"], "null"]
    if plain.get("x-kubernetes-int-or-string"):
        plain["type"] = ["integer", "string"]
    for key in ("items", "additionalProperties", "not"):
        if isinstance(plain.get(key), dict):
            plain[key] = translated(plain[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in plain:
            plain[key] = [translated(item) for item in plain[key]]
    if "properties" in plain:
        plain["properties"] = {key: translated(item) for key, item in plain["properties"].items()}
    return plain


def matches(pattern: str, text: str) -> bool:
    """Whether RE2 finds the pattern in the text."""
    assert "(?" not in pattern, "RE2 looks neither ahead nor behind"
    blanks = pattern.replace(r"\s", r"[\t\n\f\r ]")
    return re.search(re.sub(r"\$$", r"\\Z", blanks), text, re.ASCII) is not None


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def _below(schema: dict[str, Any], key: str | int) -> dict[str, Any] | None:
    if isinstance(key, int):
        return schema.get("items")
    return schema.get("properties", {}).get(key, schema.get("additionalProperties"))


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and not matches(pattern, value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern}")


def _format(validator: Any, name: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if name == "int64" and isinstance(value, int | float) and not -(2**63) <= value < 2**63:
        yield jsonschema.ValidationError(f"{value} has more than 64 bits")
    if name == "date" and isinstance(value, str):
        try:
            datetime.date.fromisoformat(value)
        except ValueError:
            yield jsonschema.ValidationError(f"{value!r} is not a day")


def _list_map(validator: Any, keys: list[str], value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, list):
        named = [tuple(item.get(key) for key in keys) for item in value if isinstance(item, dict)]
        if len({str(name) for name in named}) < len(named):
            yield jsonschema.ValidationError(f"{named} holds one twice")


VALIDATOR = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"pattern": _pattern, "format": _format, "x-kubernetes-list-map-keys": _list_map},
)

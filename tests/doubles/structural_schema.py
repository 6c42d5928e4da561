"""The conditions of a structural schema, one by one, from the Kubernetes documentation.

"Specifying a structural schema" of "Extend the Kubernetes API with CustomResourceDefinitions", with what that page says
of defaults, list types, validation rules and pruning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from api_server import OPEN, VALIDATOR, fill, translated, unknown_fields

JUNCTORS = ("allOf", "anyOf", "oneOf")
INT_OR_STRING = [{"type": "integer"}, {"type": "string"}]
FORBIDDEN = {
    "$ref",
    "$schema",
    "$defs",
    "const",
    "definitions",
    "dependencies",
    "deprecated",
    "discriminator",
    "id",
    "patternProperties",
    "propertyNames",
    "readOnly",
    "writeOnly",
    "xml",
}
NOT_BELOW_JUNCTORS = ("description", "type", "default", "additionalProperties", "nullable", "title")
TYPES = {"object", "array", "string", "integer", "number", "boolean"}


def problems_of(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Everything for which an API server would refuse the schema or not call it structural."""
    yield from _node(schema, path)
    yield from _junctors(schema, schema, path)
    for key, below in schema.get("properties", {}).items():
        if (path, key) == ("", "metadata"):
            yield from _metadata(below)
        else:
            yield from problems_of(below, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from problems_of(schema[key], f"{path}.{key}")
        elif key in schema:
            yield f"{path}: {key} is not one schema"


def _node(schema: dict[str, Any], path: str) -> Iterator[str]:
    kind = schema.get("type")
    if kind is None and not schema.get("x-kubernetes-int-or-string") and not schema.get(OPEN):
        yield f"{path}: has no type"
    if kind is not None and (not isinstance(kind, str) or kind not in TYPES):
        yield f"{path}: type is {kind}"
    if path == "" and (kind != "object" or "additionalProperties" in schema):
        yield "the root is not an object with named keys"
    if kind == "array" and "items" not in schema:
        yield f"{path}: has no items"
    if schema.get(OPEN, True) is not True:
        yield f"{path}: {OPEN} is not true"
    if schema.get("x-kubernetes-int-or-string") and (schema.get(OPEN) or kind):
        yield f"{path}: int-or-string beside a type"
    if "properties" in schema and "additionalProperties" in schema:
        yield f"{path}: both properties and additionalProperties"
    if schema.get("uniqueItems"):
        yield f"{path}: uniqueItems"
    for key in FORBIDDEN & set(schema):
        yield f"{path}: {key}"
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if key in schema and not isinstance(schema[key], bool):
            yield f"{path}: {key} is no flag"
    yield from _list_type(schema, path)
    yield from _default(schema, path)
    yield from _rules(schema, path)


def _junctors(whole: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[str]:
    """Below allOf, anyOf, oneOf and not: no types, and only keys that stand outside as well."""
    for junctor in JUNCTORS:
        if schema.get(junctor) == INT_OR_STRING and whole.get("x-kubernetes-int-or-string"):
            continue
        for item in schema.get(junctor, ()):
            yield from _below_junctor(whole, item, f"{path}.{junctor}")
    if "not" in schema:
        yield from _below_junctor(whole, schema["not"], f"{path}.not")


def _below_junctor(outside: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[str]:
    for key in schema:
        if key in NOT_BELOW_JUNCTORS or key.startswith("x-kubernetes-") or key in FORBIDDEN:
            yield f"{path}: {key}"
    for key, below in schema.get("properties", {}).items():
        if key not in outside.get("properties", {}):
            yield f"{path}.{key}: is not outside"
        else:
            yield from _below_junctor(outside["properties"][key], below, f"{path}.{key}")
    if "items" in schema:
        yield from _below_junctor(outside.get("items", {}), schema["items"], f"{path}.items")
    yield from _junctors(outside, schema, path)


def _metadata(schema: dict[str, Any]) -> Iterator[str]:
    if schema.get("type") != "object" or set(schema) > {"type", "properties"}:
        yield ".metadata: restricts more than names"
    if not set(schema.get("properties", {})) <= {"name", "generateName"}:
        yield ".metadata: restricts more than names"


def _list_type(schema: dict[str, Any], path: str) -> Iterator[str]:
    kind, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys", [])
    if kind not in (None, "atomic", "set", "map"):
        yield f"{path}: list type {kind}"
    if kind is not None and schema.get("type") != "array":
        yield f"{path}: list type without a list"
    if (kind == "map") != bool(keys):
        yield f"{path}: list type map goes with keys, and keys with it"
    for key in keys:
        items = schema["items"]
        below = items.get("properties", {}).get(key, {})
        if below.get("type") not in ("string", "integer", "number", "boolean"):
            yield f"{path}: {key} is no plain value"
        if key not in items.get("required", ()) and "default" not in below:
            yield f"{path}: {key} is neither required nor has a default"


def _default(schema: dict[str, Any], path: str) -> Iterator[str]:
    """A default passes its own schema and holds nothing that would be pruned."""
    if "default" in schema:
        alone = {"properties": {"it": schema}}
        value = {"it": schema["default"]}
        yield from (f"{path}: default: {problem}" for problem in unknown_fields(alone, value))
        fill(alone, value)
        for error in VALIDATOR(translated(schema)).iter_errors(value["it"]):
            yield f"{path}: default: {error.message}"
        if path == "":
            yield "the root has a default"


def _rules(schema: dict[str, Any], path: str) -> Iterator[str]:
    """What can be said of rules without evaluating them: their words, and that what they name is there."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if not rule["rule"].strip() or set(rule) - {"rule", "message", "fieldPath", "reason", "messageExpression"}:
            yield f"{path}: a rule without a rule, or with more than one has"
        if not rule["message"].strip() or "\n" in rule["message"] or len(rule["message"]) > 2048:
            yield f"{path}: a rule's message is not one line"
        places = [f".{at}" for at in re.findall(r"\bself\.([\w.]+)(?![\w(])", rule["rule"])]
        if "fieldPath" in rule:
            places.append(rule["fieldPath"])
        for place in places:
            if not _is_there(schema, place):
                yield f"{path}: {place} is not there"


def _is_there(schema: dict[str, Any], place: str) -> bool:
    """Whether keys lead to a typed place; a method of a list ends the way."""
    at: dict[str, Any] | None = schema
    for key in place.strip(".").split("."):
        if at is not None and at.get("type") == "array":
            return True
        at = (at or {}).get("properties", {}).get(key)
        if at is None or "type" not in at:
            return False
    return True

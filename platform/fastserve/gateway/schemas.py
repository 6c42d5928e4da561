"""JSON schemas that clients send, checked before an engine compiles them.

A grammar compiler is the most expensive thing a request can reach: its input is bounded in depth and size here, its
types are known, its references point inside itself, and it has no regular expressions. Source of the keywords: JSON
Schema 2020-12.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastserve.gateway.answers import Refusal, bad_request, unsupported

DEPTH = 16
NODES = 4096
CHARACTERS = 32 * 1024
_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_ONE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "$defs", "definitions", "dependentSchemas")
_REFUSED = ("pattern", "patternProperties")


def schema(value: Any, param: str) -> dict[str, object]:
    """A JSON schema that can be compiled in bounded time, unchanged.

    Raises Refusal (400): `invalid_json_schema`, or `unsupported_parameter` for a regular expression.
    """
    if not isinstance(value, dict):
        raise _invalid(param, "is not an object")
    characters = 0
    for nodes, (depth, node) in enumerate(_nodes(value), start=1):
        characters += len(node) if isinstance(node, str) else 0
        if depth > DEPTH:
            raise _invalid(param, f"is nested deeper than {DEPTH}")
        if nodes > NODES or characters > CHARACTERS:
            raise _invalid(param, f"has more than {NODES} values or {CHARACTERS} characters")
    _check(value, param)
    return value


def _nodes(value: object) -> Iterator[tuple[int, object]]:
    """Every value and every key with its depth; lazily, so that a huge one costs no more than its limit."""
    waiting = [(1, value)]
    while waiting:
        depth, node = waiting.pop()
        yield depth, node
        if isinstance(node, dict):
            waiting.extend((depth + 1, inner) for pair in node.items() for inner in pair)
        elif isinstance(node, list):
            waiting.extend((depth + 1, inner) for inner in node)


def _check(node: object, param: str) -> None:
    """The keywords of one schema and of those inside it; values under enum and const are data and not looked at."""
    if isinstance(node, bool):
        return
    if not isinstance(node, dict):
        raise _invalid(param, "has a part that is neither an object nor true or false")
    _keywords(node, param)
    for name in _ONE:
        if name in node:
            _check(node[name], param)
    for name in _MANY:
        entries = node.get(name, [True])
        if not isinstance(entries, list) or not entries:
            raise _invalid(param, f"has {name} that is not a list with at least one schema")
        for entry in entries:
            _check(entry, param)
    for name in _NAMED:
        entries = node.get(name, {})
        if not isinstance(entries, dict):
            raise _invalid(param, f"has {name} that is not an object")
        for entry in entries.values():
            _check(entry, param)


def _keywords(node: dict[str, Any], param: str) -> None:
    for name in _REFUSED:
        if name in node:
            raise unsupported(f"{param}.{name}", f"'{name}' in a JSON schema is not supported; leave it out.")
    kinds = node.get("type", "object")
    if any(kind not in _TYPES for kind in (kinds if isinstance(kinds, list) else [kinds])):
        raise _invalid(param, f"has a type that is not one of {', '.join(_TYPES)}")
    reference = node.get("$ref", "#/")
    if not isinstance(reference, str) or not reference.startswith("#/"):
        raise _invalid(param, "has a $ref that is not a definition inside it, such as #/$defs/NAME")
    if "enum" in node and not (isinstance(node["enum"], list) and node["enum"]):
        raise _invalid(param, "has an enum that is not a list with at least one value")
    required = node.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _invalid(param, "has a required that is not a list of names")


def _invalid(param: str, what: str) -> Refusal:
    return bad_request(f"The JSON schema in '{param}' {what}.", param, "invalid_json_schema")

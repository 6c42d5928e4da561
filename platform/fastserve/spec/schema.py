"""The JSON schema that editors complete and check manifests with (JSON Schema draft 2020-12).

It is generated from the sections, so it allows what the reader allows: a source may be a text or a block, quantities
are text with a unit, and a gate's limits by task are keys of their own.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import models_json_schema

from fastserve.spec.load import KINDS
from fastserve.spec.model import API_VERSION
from fastserve.spec.section import Section
from fastserve.spec.shape import fields_of, one_line, walk
from fastserve.spec.source import Source

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def schema() -> dict[str, Any]:
    """One schema for all kinds; the same sections always give the same schema."""
    _, generated = models_json_schema([(kind, "validation") for kind in KINDS.values()], by_alias=True)
    sections = _sections()
    definitions = {}
    for name, definition in sorted(generated["$defs"].items()):
        definitions[name] = _tidy(definition)
        _write_defaults(definitions[name], sections[name])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "FastServe manifest",
        "description": f"A manifest of {API_VERSION}.",
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {"kind": {"enum": list(KINDS)}},
        "allOf": [_when(kind) for kind in KINDS],
        "$defs": definitions,
    }


def schema_text() -> str:
    """The schema as it is written to a file."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _sections() -> dict[str, type[Section]]:
    """Every block by the name under which pydantic defines it."""
    found: dict[str, type[Section]] = {"Source": Source, **KINDS}
    for kind in KINDS.values():
        for _, field in walk(kind):
            if field.shape.section is not None:
                found[field.shape.section.__name__] = field.shape.section
    return found


def _write_defaults(definition: dict[str, Any], section: type[Section]) -> None:
    """Defaults as a manifest writes them (`1m`, `5%`), since editors insert them; none where the key is just absent."""
    for key, field in fields_of(section).items():
        schema_of_key = definition["properties"].get(key, {})
        if field.default is None:
            schema_of_key.pop("default", None)
        elif field.shape.form is not None and field.shape.form.write is not None:
            schema_of_key["default"] = field.shown_default


def _when(kind: str) -> dict[str, Any]:
    return {
        "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
        "then": {"$ref": f"#/$defs/{kind}"},
    }


def _tidy(value: Any) -> Any:
    """Descriptions in one line, no titles made up from names, and no null where the reader refuses one."""
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if not isinstance(value, dict):
        return value
    tidy: dict[str, Any] = {}
    for key, item in value.items():
        if key == "title" and isinstance(item, str):
            continue
        tidy[key] = one_line(item) if key == "description" and isinstance(item, str) else _tidy(item)
    return _block_or_absent(_bounded(tidy))


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    """Bounds in the words of JSON Schema. Pydantic leaves its own behind a validator; of text with a unit they are
    bounds of the number, which a schema cannot say."""
    is_number = value.get("type") in ("integer", "number")
    named = {_BOUNDS.get(key, key): item for key, item in value.items() if key not in _BOUNDS or is_number}
    return named if "type" in value else value


def _block_or_absent(value: dict[str, Any]) -> dict[str, Any]:
    """An optional block is written or left out; `serve:` with nothing behind it is refused."""
    options = value.get("anyOf")
    if not isinstance(options, list) or {"type": "null"} not in options:
        return value
    others = [option for option in options if option != {"type": "null"}]
    if not any("$ref" in option for option in others):
        return value
    rest = {key: item for key, item in value.items() if key not in ("anyOf", "default")}
    return {**others[0], **rest} if len(others) == 1 else {"anyOf": others, **rest}

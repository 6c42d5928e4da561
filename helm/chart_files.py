"""Makes the chart's README, its schema of values and its defaults from values.yaml: `python helm/chart_files.py`.

A comment above a key is its description; "One of: a, b" at its end is a choice. Templates read values over
defaults.yaml, so that a value which an older release did not have, or which somebody set to null, has its default.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "fastserve"
HEADING = "# Made from values.yaml by `python helm/chart_files.py`. Change that, not this file.\n"
CHOICE = re.compile(r"\s*One of: (.+)$")
OPEN = {"resources", "annotations", "labels", "nodeSelector"}
"""Blocks that Kubernetes knows better than this chart; the API server checks them."""

_QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}
_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2147483647}
_ACCELERATOR = {
    "type": "object",
    "additionalProperties": False,
    "required": ["type", "memory", "resource"],
    "properties": {
        "type": {"type": "string", "description": "Such as L4."},
        "memory": {"type": "string", "description": "Of one accelerator, such as 24GiB."},
        "count": {"type": "integer", "minimum": 1, "description": "Accelerators in one machine; left out: 1."},
        "resource": {"type": "string", "description": "What Kubernetes calls it, such as nvidia.com/gpu."},
    },
}
ITEMS: dict[str, dict[str, Any]] = {
    "image.pullSecrets": {"type": "string"},
    "ray.tokenSecrets": _NAME,
    "ray.sourceClaims": _NAME,
    "networkPolicies.dnsPorts": {"type": "integer", "minimum": 1, "maximum": 65535},
    "networkPolicies.egressPorts": {"type": "integer", "minimum": 1, "maximum": 65535},
    "networkPolicies.egressCidrs": {"type": "string"},
    "ray.profiles": {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "cpus", "memory"],
        "properties": {
            "name": {**_NAME, "description": "Name that manifests use."},
            "cpus": {"type": "integer", "minimum": 1, "description": "CPU cores of one machine."},
            "memory": {**_QUANTITY, "description": "Main memory of one machine, such as 32Gi."},
            "min": {**_COUNT, "description": "Fewest machines; left out: 0."},
            "max": {**_COUNT, "description": "Most machines; left out: 10."},
            "accelerator": {**_ACCELERATOR, "description": "Left out: it computes on its CPUs."},
            "pricePerHour": {"type": "number", "minimum": 0, "description": "To compare profiles."},
            "spot": {"type": "boolean", "description": "Whether it may be taken away at short notice."},
            "nodeSelector": {"type": "object", "description": "Labels of its nodes."},
            "tolerations": {"type": "array", "description": "Taints that its pods tolerate."},
        },
    },
}
"""What items of a list are, where it is not any block."""

PATTERNS = {"store.uri": "^(s3://[^/]|/store(/|$))"}
"""Texts that only some will do: a folder anywhere else would be of the pod alone, and gone with it."""


@dataclass(frozen=True)
class Value:
    """One key of values.yaml."""

    path: str
    default: Any
    words: str
    choices: tuple[str, ...]


def values() -> list[Value]:
    """Every value that may be set, in the order of the file."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    return list(_values(yaml.compose("\n".join(lines)), lines, ""))


def _values(node: Any, lines: list[str], above: str) -> Iterator[Value]:
    for key, value in node.value:
        path = f"{above}.{key.value}".lstrip(".")
        is_block = isinstance(value, yaml.MappingNode) and value.value and key.value not in OPEN
        if is_block:
            yield from _values(value, lines, path)
            continue
        words = _comment(lines, key.start_mark.line)
        choice = CHOICE.search(words)
        if not words:
            raise ValueError(f"values.yaml: {path} has no comment above it")
        yield Value(
            path,
            yaml.SafeLoader("").construct_document(value),
            CHOICE.sub("", words),
            tuple(choice.group(1).split(", ")) if choice else (),
        )


def _comment(lines: list[str], at: int) -> str:
    first = at
    while lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return " ".join(line.strip().removeprefix("#").strip() for line in lines[first:at])


def schema() -> dict[str, Any]:
    """The JSON schema of values; an unknown key is refused."""
    root: dict[str, Any] = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "additionalProperties": False,
        # Helm's own key; what a parent chart may set.
        "properties": {"global": {"type": "object"}},
    }
    for value in values():
        block = root
        *above, key = value.path.split(".")
        for name in above:
            block = block["properties"].setdefault(
                name, {"type": "object", "additionalProperties": False, "properties": {}}
            )
        block["properties"][key] = _schema(value)
    return root


def _schema(value: Value) -> dict[str, Any]:
    described = {"description": value.words}
    if value.choices:
        return {**described, "type": "string", "enum": list(value.choices)}
    match value.default:
        case bool():
            return {**described, "type": "boolean"}
        case int():
            return {**described, "type": "integer", "minimum": 0}
        case str():
            pattern = {"pattern": PATTERNS[value.path]} if value.path in PATTERNS else {}
            return {**described, "type": "string", **pattern}
        case list():
            return {**described, "type": "array", "items": ITEMS.get(value.path, {"type": "object"})}
        case dict():
            return {**described, "type": "object"}
    raise ValueError(f"values.yaml: {value.path} is {value.default!r}, of no type that a value has")


def readme() -> str:
    """The page of the chart."""
    rows = [f"| `{value.path}` | `{_shown(value.default)}` | {_said(value)} |" for value in values()]
    profile = ITEMS["ray.profiles"]
    fields = [
        f"| `{key}` | {'yes' if key in profile['required'] else ''} | {item['description']} |"
        for key, item in profile["properties"].items()
    ]
    head = (CHART / "README.head.md").read_text()
    table = ["| value | default | what it is |", "| --- | --- | --- |", *rows]
    items = ["| key of `ray.profiles[]` | required | what it is |", "| --- | --- | --- |", *fields]
    return head + "\n" + "\n".join(table) + "\n\n" + "\n".join(items) + "\n"


def _shown(default: Any) -> str:
    return json.dumps(default, ensure_ascii=False)


def _said(value: Value) -> str:
    return f"{value.words} One of {', '.join(value.choices)}." if value.choices else value.words


def generated() -> dict[str, str]:
    """Text of each generated file by its name in the chart."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    return {
        "README.md": readme(),
        "values.schema.json": json.dumps(schema(), indent=2) + "\n",
        "defaults.yaml": HEADING + yaml.safe_dump(defaults, sort_keys=False, width=120),
    }


def main() -> int:
    """Write the files."""
    for name, text in generated().items():
        (CHART / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

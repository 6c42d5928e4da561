"""The schema for editors says what the reader does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fastserve.errors import ManifestInvalid
from fastserve.spec.load import KINDS, read
from fastserve.spec.reference import page, undescribed
from fastserve.spec.schema import schema, schema_text
from fastserve.spec.section import Section
from fastserve.spec.shape import walk
from fastserve.spec.source import Source
from fastserve.spec.yaml_tree import parse, to_plain

SCHEMA = schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
HEAD = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: a}\nspec: "


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_it_is_the_same_every_time() -> None:
    assert schema_text() == schema_text()


def test_every_section_is_accepted() -> None:
    text = (Path(__file__).parents[2] / "data" / "every-section.yaml").read_text()
    for tree in parse(text).trees:
        VALIDATOR.validate(to_plain(tree))


@pytest.mark.parametrize(
    "spec",
    [
        "{source: hf://org/name, serve: {}}",
        "{source: {uri: hf://org/name, revision: main, tokenSecret: hub}}",
        "{source: a, train: {dataset: b, steps: 1e5, learningRate: 2e-4}}",
        "{source: a, evaluate: {data: {uri: b}, gate: {klDivergence: null}}}",
        "{source: a, evaluate: {data: b, tasks: [{name: t, data: c}], gate: {task.t: {min: 0.5}}}}",
        "{source: a, serve: {adapters: [{name: b, source: c}, {name: d, source: {uri: e}}]}}",
    ],
)
def test_what_is_right_is_right_in_both(spec: str) -> None:
    read(HEAD + spec)
    VALIDATOR.validate(to_plain(parse(HEAD + spec).trees[0]))


@pytest.mark.parametrize(
    "spec",
    [
        "{}",
        "{source: 3}",
        "{source: {revision: main}}",
        "{source: a, serve: }",
        "{source: a, url: b}",
        "{source: a, train: {dataset: b, steps: 0}}",
        "{source: a, train: {dataset: b, steps: 1.5}}",
        "{source: a, train: {dataset: b, learning_rate: 1}}",
        "{source: a, serve: {replicas: {min: -1}}}",
        "{source: a, serve: {rollout: {hold: 90}}}",
        "{source: a, serve: {rollout: {hold: 1:30}}}",
        "{source: a, serve: {rollout: {steps: [0, 100]}}}",
        "{source: a, serve: {engine: {prefixCaching: 'yes'}}}",
        "{source: a, serve: {profiles: []}}",
        "{source: a, evaluate: {data: b, gate: {perplexityIncrease: 5}}}",
        "{source: a, evaluate: {data: b, gate: {tasks: {t: {min: 1}}}}}",
    ],
)
def test_what_is_wrong_is_wrong_in_both(spec: str) -> None:
    with pytest.raises(ManifestInvalid):
        read(HEAD + spec)
    assert not VALIDATOR.is_valid(to_plain(parse(HEAD + spec).trees[0]))


def test_a_default_is_shown_as_a_manifest_writes_it() -> None:
    rollout = SCHEMA["$defs"]["Rollout"]["properties"]
    assert (rollout["hold"]["default"], rollout["maxErrorRate"]["default"]) == ("1m", "1%")


def test_every_default_passes_its_own_schema() -> None:
    for name, definition in SCHEMA["$defs"].items():
        for key, property_ in definition["properties"].items():
            if "default" in property_:
                whole = {**property_, "$defs": SCHEMA["$defs"]}
                assert jsonschema.Draft202012Validator(whole).is_valid(property_["default"]), (name, key)


def test_every_key_says_what_it_is_for() -> None:
    for kind in (*KINDS.values(), Source):
        assert undescribed(kind) == []


def test_every_key_of_the_schema_says_what_it_is_for() -> None:
    for name, definition in SCHEMA["$defs"].items():
        assert definition["description"], name
        for key, property_ in definition["properties"].items():
            assert property_.get("description"), (name, key)


def test_no_description_is_broken_over_lines() -> None:
    assert "\\n" not in json.dumps([list(_descriptions(SCHEMA))])


def _descriptions(value: Any) -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "description" and isinstance(item, str):
                yield item
            else:
                yield from _descriptions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _descriptions(item)


def _sections() -> set[type[Section]]:
    return {field.shape.section for kind in KINDS.values() for _, field in walk(kind) if field.shape.section}


def test_the_schema_defines_every_block_and_nothing_else() -> None:
    assert set(SCHEMA["$defs"]) == {section.__name__ for section in _sections()} | set(KINDS)


def test_the_reference_page_has_every_key() -> None:
    text = page()
    for kind in KINDS.values():
        for path, _ in walk(kind):
            assert f"| `{path}` |" in text


@pytest.mark.parametrize(
    "row",
    [
        "| `spec.evaluate.gate.task.<name>.maxDrop` | percentage up to 100% |",
        "| `spec.serve.rollout.hold` | duration | `1m` |",
        "| `spec.source` | [source](#source) | **required** |",
        "| `spec.train.workers` | list of blocks | `[{profile: local, count: 1}]` |",
        "| `spec.compress[].quantize.format` | `int8` or `int4` or `fp8` | **required** |",
        "| `spec.train.lora.dropout` | number from 0 below 1 | `0.0` |",
    ],
)
def test_the_reference_page_speaks_the_manifests_words(row: str) -> None:
    assert row in page()

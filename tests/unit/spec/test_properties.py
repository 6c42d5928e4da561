"""Properties over manifests that hypothesis makes: what is valid comes back, what is broken is refused in our words."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve.errors import ManifestInvalid
from fastserve.spec.load import KINDS, dump, read
from fastserve.spec.model import API_VERSION
from fastserve.spec.schema import schema
from fastserve.spec.section import Section
from fastserve.spec.shape import FieldShape, Shape, fields_of
from fastserve.spec.yaml_tree import parse, to_plain

VALIDATOR = jsonschema.Draft202012Validator(schema())
WHAT_TO_DO = re.compile(r"\b(write|remove|put|keep|move|rename|lower|raise|give|begin|add|check|save|use)\b")
NOT_OUR_WORDS = re.compile(
    r"does not fit|Input should|validation error|Value error|Extra inputs|pydantic"
    r"|Field required|\bdict|NoneType|\bNone\b|True\b|False\b"
)

decimals = st.decimals("0.001", 100, places=3).map(lambda number: format(number, "f"))
names = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,8}[a-z0-9])?", fullmatch=True)
QUOTED = re.compile(r"""'.*'|".*\"""")
"""What the user wrote may hold any word."""

CHARACTERS = st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"))
"""Not those that JSON writes as they are and YAML takes for the end of a line."""

texts = st.text(CHARACTERS, min_size=1, max_size=12)
paths = st.text("abc/. *ü", min_size=1, max_size=12).filter(str.strip)
sources = st.one_of(
    paths,
    st.sampled_from(
        ["hf://org/name", "hf://org/name@main", "s3://bucket/a b.jsonl", "package://p/q", "pvc://c/p", "file:///p"]
    ),
    st.fixed_dictionaries({"uri": st.just("hf://org/name")}, optional={"revision": texts, "tokenSecret": names}),
)
BY_WORDS = {
    "duration": st.builds("{}{}".format, decimals, st.sampled_from(["ms", "s", "m", "h", "d"])),
    "size": st.builds(
        "{}{}".format, st.integers(1, 999) | st.just("1.5"), st.sampled_from(["B", "kB", "MB", "KiB", "GiB", "Ti"])
    ),
    "percentage": decimals.map("{}%".format),
    "whole number": st.integers(1, 2**40) | st.integers(1, 2**20).map(float),
    "number": st.floats(0.001, 0.999),
    "day": st.dates().map(str),
    "name": names,
}
BY_KEY = {
    "apiVersion": st.just(API_VERSION),
    "labels": st.dictionaries(texts, texts, max_size=2),
    "annotations": st.dictionaries(texts, texts, max_size=2),
    "nodeSelector": st.dictionaries(texts, texts, max_size=2),
    "steps": st.integers(1, 10**6),
    "count": st.integers(1, 100),
    "batchTokens": st.integers(200, 10**6),
    "vocabulary": st.integers(257, 10**6),
    "levels": st.integers(2, 8),
    "config": st.dictionaries(
        texts, st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6) | texts, max_size=2
    ),
}


def values(field: FieldShape) -> st.SearchStrategy[Any]:
    one = items(field.key, field.shape)
    if field.shape.many and field.key not in BY_KEY:
        return st.lists(one, min_size=1, max_size=2)
    return one


def items(key: str, shape: Shape) -> st.SearchStrategy[Any]:
    if key in BY_KEY:
        return BY_KEY[key]
    if shape.choices:
        return st.sampled_from(shape.choices)
    if shape.is_source:
        return sources
    if shape.section is not None:
        return blocks(shape.section)
    if shape.form is not None:
        return BY_WORDS[shape.form.words]
    return st.booleans() if shape.words == "true or false" else texts


def blocks(section: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {
        key: field for key, field in fields_of(section).items() if not (section.__name__ == "Gate" and key == "tasks")
    }
    required = {key: values(field) for key, field in fields.items() if field.required}
    optional = {key: values(field) for key, field in fields.items() if not field.required}
    return st.fixed_dictionaries(required, optional=optional).map(lambda block: agreeing(section.__name__, block))


def agreeing(block: str, value: dict[str, Any]) -> dict[str, Any]:
    """What keys of one block demand of each other."""
    if block == "Train":
        if value.get("steps"):
            value.pop("epochs", None)
        if value.get("method") in ("full", "scratch"):
            value.pop("lora", None)
        if value.get("method") != "scratch":
            value.pop("scratch", None)
        if len({(group["profile"], group.get("speed")) for group in value.get("workers", [])}) > 1:
            value.pop("engine", None)
        value.pop("elastic", None) if len(value.get("workers", [1])) < value.get("elastic", {}).get(
            "minWorkers", 0
        ) else None
    elif block == "CompressStep":
        value = (
            {"prune": value["prune"]} if "prune" in value else {"quantize": value.get("quantize", {"format": "int8"})}
        )
    elif block == "Prune":
        value.setdefault("layers", 0.5)
    elif block == "Quantize" and value["format"] != "int4":
        value.pop("groupSize", None)
    elif block == "Evaluate":
        value["tasks"] = [{**task, "name": f"{task['name'][:8]}-{n}"} for n, task in enumerate(value.get("tasks", []))]
        if "gate" in value:
            value["gate"].update({f"task.{task['name']}": {"min": 0.5, "maxDrop": "1%"} for task in value["tasks"]})
    elif block == "TaskLimit":
        value.setdefault("min", 0.5)
    elif block == "Replicas":
        value["max"] = max(value.get("min", 1), value.get("max", 1))
    elif block == "Rollout":
        value["steps"] = [5, 25, 100]
    elif block == "Serve":
        if "adapters" in value:
            value["adapters"] = [
                {**item, "name": f"{item['name'][:8]}-{n}"} for n, item in enumerate(value["adapters"])
            ]
        if value.get("scheduler") == "mlfq":
            value.get("engine", {}).pop("prefixCaching", None)
        else:
            value.pop("schedulerOptions", None)
    return value


MANIFESTS = st.sampled_from([*KINDS.values()]).flatmap(blocks)
SLOW = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)


def text_of(manifest: dict[str, Any]) -> str:
    """JSON, which is YAML in one line."""
    return json.dumps(manifest, ensure_ascii=False)


@SLOW
@given(MANIFESTS)
def test_what_is_dumped_is_read_as_an_equal_manifest(manifest: dict[str, Any]) -> None:
    (first,) = read(text_of(manifest))
    (second,) = read(text_of(dump(first)))
    assert second == first
    assert dump(second) == dump(first)


@SLOW
@given(MANIFESTS)
def test_what_is_dumped_as_yaml_is_read_as_an_equal_manifest(manifest: dict[str, Any]) -> None:
    (first,) = read(text_of(manifest))
    text = yaml.safe_dump(json.loads(json.dumps(dump(first))), allow_unicode=True)
    if to_plain(parse(text).trees[0]) == dump(
        first
    ):  # PyYAML leaves `1e3`-like texts bare, which kubectl reads as numbers
        assert read(text) == [first]


@SLOW
@given(MANIFESTS)
def test_editors_accept_what_the_reader_accepts(manifest: dict[str, Any]) -> None:
    VALIDATOR.validate(manifest)
    VALIDATOR.validate(dump(read(text_of(manifest))[0]))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(CHARACTERS, max_size=8),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text(CHARACTERS, max_size=5), st.integers(0, 3), max_size=2),
)

KEYS = st.sampled_from(["minReplicas", "url", "lr", "spec", "tasks", "task.x", "prune"]) | st.text(
    CHARACTERS, max_size=6
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield value, key
        yield from places(item)


@st.composite
def broken(draw: st.DrawFn) -> dict[str, Any]:
    """A manifest in which up to four things were replaced, removed or added."""
    manifest = copy.deepcopy(draw(MANIFESTS))
    for _ in range(draw(st.integers(1, 4))):
        container, key = draw(st.sampled_from(list(places(manifest)) or [(manifest, "spec")]))
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "remove" and isinstance(container, dict):
            container.pop(key, None)
        elif change == "add" and isinstance(container, dict):
            container[draw(KEYS)] = draw(JUNK)
        else:
            container[key] = draw(JUNK)
    return manifest


@settings(SLOW, max_examples=300)
@given(broken())
def test_a_broken_manifest_is_refused_in_the_words_of_the_manifest(manifest: dict[str, Any]) -> None:
    try:
        read(text_of(manifest), "m.yaml")
    except ManifestInvalid as error:
        for problem in error.problems:
            assert WHAT_TO_DO.search(problem.message), problem
            assert not NOT_OUR_WORDS.search(QUOTED.sub("", problem.message)), problem
            assert problem.line == 1, problem


@SLOW
@given(st.text() | st.text("apiVersion: fastserve.dev/v1\n kind: Model{}[]-&*!'\"#0o", max_size=80))
def test_the_reader_raises_nothing_but_manifest_invalid(text: str) -> None:
    with pytest.raises(ManifestInvalid):
        read(text)

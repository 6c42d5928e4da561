"""The definitions say to an API server what the reader says to a person.

No API server runs here: `api_server` does what its documentation says, CEL rules left out. Those are held to the cases
of test_sections.py: each case is refused by the schema, or stands at a key that a rule speaks of, or is named as beyond
both.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import yaml
from api_server import OPEN, Refused, Resource, matches
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError
from structural_schema import problems_of

from fastserve.errors import ManifestInvalid
from fastserve.plan.digest import digest_of
from fastserve.plan.keys import outside, stage_keys
from fastserve.plan.revision import deciding
from fastserve.spec import rules
from fastserve.spec.crd import crd_texts, crds
from fastserve.spec.load import KINDS, Manifest, read
from fastserve.spec.model import GROUP, Model
from fastserve.spec.section import Bytes, Duration, Share
from fastserve.spec.structural import NAMED_ITEMS, NO_DEFAULT
from fastserve.spec.yaml_tree import parse, to_plain

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CRDS = {crd["spec"]["names"]["kind"]: crd for crd in crds().values()}
SCHEMAS = {kind: crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for kind, crd in CRDS.items()}
RESOURCES = {kind: Resource(schema) for kind, schema in SCHEMAS.items()}
HEAD = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: a}\nspec: "
MOST_OF_AN_ANNOTATION = 262_144


def beside(name: str) -> ModuleType:
    """A test file of this folder, for its cases and strategies."""
    spec = importlib.util.spec_from_file_location(f"cases_of_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SECTIONS = beside("test_sections")
MANIFESTS = beside("test_properties")
CASES = SECTIONS.test_what_does_not_go_together_is_refused_at_its_key.pytestmark[0].args[1]


def documents(text: str) -> list[dict[str, Any]]:
    """The objects of a text, as kubectl sends them."""
    return [to_plain(tree) for tree in parse(text).trees]


def spec(text: str) -> dict[str, Any]:
    return documents(HEAD + text)[0]


def stored(manifest: dict[str, Any]) -> Any:
    return RESOURCES[manifest["kind"]].admit(manifest)


def read_one(manifest: dict[str, Any]) -> Manifest:
    (found,) = read(json.dumps(manifest))
    return found


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place of a schema by the manifest's path: `spec.compress[].prune`."""
    yield path, schema
    for key, below in schema.get("properties", {}).items():
        yield from nodes(below, f"{path}.{key}".lstrip("."))
    for key, mark in (("items", "[]"), ("additionalProperties", ".<name>")):
        if key in schema:
            yield from nodes(schema[key], path + mark)


BY_PATH = dict(nodes(SCHEMAS["Model"]))


class TestStructure:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_condition_of_a_structural_schema_is_kept(self, kind: str) -> None:
        assert list(problems_of(SCHEMAS[kind])) == []

    @pytest.mark.parametrize(
        ("broken", "words"),
        [
            ({"$ref": "#/a"}, r"\$ref"),
            ({"type": ["string", "integer"]}, "type is"),
            ({}, "has no type"),
            ({"type": "object", "properties": {}, "additionalProperties": {"type": "string"}}, "both properties"),
            ({"type": "object", "additionalProperties": False}, "is not one schema"),
            ({"type": "string", "anyOf": [{"type": "string"}]}, "anyOf: type"),
            ({"type": "object", "anyOf": [{"properties": {"b": {"pattern": "x"}}}]}, "is not outside"),
            ({"type": "array"}, "no items"),
            ({"type": "integer", "minimum": 1, "default": 0}, "default"),
            ({"type": "object", "default": {"b": 1}}, "default"),
            ({"type": "number", "minimum": 0, "exclusiveMinimum": 0}, "is no flag"),
            ({"type": "object", "x-kubernetes-validations": [{"rule": "self.b", "message": "c"}]}, "is not there"),
            ({"type": "array", "items": {"type": "object"}, "x-kubernetes-list-type": "map"}, "goes with keys"),
        ],
    )
    def test_the_checker_sees_a_broken_one(self, broken: dict[str, Any], words: str) -> None:
        found = "\n".join(problems_of({"type": "object", "properties": {"a": broken}}))
        assert re.search(words, found)

    def test_unknown_fields_are_kept_only_where_nothing_else_works(self) -> None:
        open_nodes = {path for path, node in nodes(SCHEMAS["Model"]) if node.get(OPEN) and path.startswith("spec")}
        sources = {path for path, node in nodes(SCHEMAS["Model"]) if "uri" in node.get("properties", {})}
        assert open_nodes - sources == {"spec.evaluate.gate", "spec.train.scratch.config.<name>"}

    @pytest.mark.parametrize("plural", crds())
    def test_a_definition_is_small_enough_for_client_side_apply(self, plural: str) -> None:
        assert len(json.dumps(crds()[plural])) < MOST_OF_AN_ANNOTATION / 2

    @pytest.mark.parametrize("plural", crds())
    def test_the_file_holds_the_definition_for_every_reader_of_yaml(self, plural: str) -> None:
        text = crd_texts()[plural]
        assert yaml.safe_load(text) == crds()[plural]
        assert documents(text) == [crds()[plural]]
        assert "&id" not in text

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_key_is_explained_in_a_few_words(self, kind: str) -> None:
        for path, node in nodes(SCHEMAS[kind]):
            if not path.startswith("metadata") and not path.endswith(("[]", ".<name>")):
                assert 0 < len(node.get("description", "")) <= 400, path
                assert "\n" not in node["description"], path

    def test_a_quantity_is_explained_with_an_example(self) -> None:
        quantities = [node for _, node in nodes(SCHEMAS["Model"]) if r"\s*$" in node.get("pattern", "")]
        assert len(quantities) > 9
        assert [node["description"] for node in quantities if "such as" not in node["description"]] == []

    def test_the_columns_tell_the_story(self) -> None:
        version = CRDS["Model"]["spec"]["versions"][0]
        names = [column["name"] for column in version["additionalPrinterColumns"]]
        assert names == ["STAGE", "READY", "REPLICAS", "REVISION", "URL", "REASON", "AGE"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_columns_and_scale_lead_to_keys_that_exist(self, kind: str) -> None:
        version = CRDS[kind]["spec"]["versions"][0]
        paths = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
        paths += version["subresources"].get("scale", {}).values()
        known = {path for path, _ in nodes(SCHEMAS[kind])} | {"metadata.creationTimestamp"}
        assert {path.lstrip(".").replace('[?(@.type=="Ready")]', "[]") for path in paths} <= known

    def test_names_do_not_collide(self) -> None:
        names = [crd["spec"]["names"] for crd in CRDS.values()]
        assert len({name for each in names for name in each["shortNames"]}) == len(names)
        assert {crd["metadata"]["name"] for crd in CRDS.values()} == {f"{each['plural']}.{GROUP}" for each in names}


class TestManifests:
    FILES = (
        *sorted((ROOT / "deployments").rglob("*.yaml")),
        ROOT / "tests/data/every-section.yaml",
        ROOT / "tests/data/cases/21-scalars.yaml",
    )
    PAGES = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
    def test_a_manifest_of_the_repository_is_stored(self, file: Path) -> None:
        for manifest in documents(file.read_text()):
            if manifest["apiVersion"].startswith(GROUP):
                assert read_one(stored(manifest)) == read_one(manifest)

    def test_the_manifests_of_the_pages_are_stored(self) -> None:
        blocks = [
            block
            for page in self.PAGES
            for block in re.findall(r"^```ya?ml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
            if f"apiVersion: {GROUP}/" in block
        ]
        assert blocks
        for manifest in (manifest for block in blocks for manifest in documents(block)):
            assert read_one(stored(manifest)) == read_one(manifest)

    def test_a_status_of_every_key_is_stored(self) -> None:
        manifest = spec("{source: a, serve: {}}")
        condition = {
            "type": "Ready",
            "status": "False",
            "reason": "GateFailed",
            "message": "The gate refuses the candidate.",
            "lastTransitionTime": "2027-01-01T00:00:00Z",
            "observedGeneration": 2,
        }
        progress = {"done": 3, "total": 10, "unit": "steps", "ratePerSecond": 0.5, "metrics": {"loss": 1.2}, "at": 1.5}
        gate = {"outcome": "fail", "reasons": ["a"], "limits": [{"name": "klDivergence", "measured": {"mean": 0.2}}]}
        manifest["status"] = {
            "observedGeneration": 2,
            "conditions": [condition],
            "stage": "evaluate",
            "stages": {"train": {"state": "running", "key": "ab", "attempt": 1, "progress": progress}},
            "gate": gate,
            "revision": "0123abcd",
            "revisions": [{"digest": "0123abcd", "state": "ready", "gate": "pass", "weight": 100, "replicas": 1}],
            "replicas": 1,
            "selector": "fastserve.dev/model=a",
            "url": "http://gateway/v1",
        }
        assert stored(manifest)["status"] == manifest["status"]


class TestDefaults:
    def test_scaling_changes_the_promise(self) -> None:
        manifest = stored(spec("{source: a, serve: {}}"))
        assert manifest["spec"]["serve"]["replicas"] == {"min": 1, "idle": "5m"}
        manifest["spec"]["serve"]["replicas"]["min"] = 3
        scaled = read_one(stored(manifest))
        assert isinstance(scaled, Model)
        assert scaled.spec.serve is not None
        assert (scaled.spec.serve.replicas.min, scaled.spec.serve.replicas.max) == (3, 3)

    def test_a_model_without_serve_gets_none(self) -> None:
        assert stored(spec("{source: a}"))["spec"] == {"source": "a", "cluster": "shared"}

    @pytest.mark.parametrize(
        "text",
        [
            "{source: a, evaluate: {data: b, gate: {klDivergence: null, flippedTokens: null}}}",
            "{source: a, train: {dataset: b, clipNorm: null}}",
        ],
    )
    def test_a_limit_that_null_switches_off_stays_off(self, text: str) -> None:
        assert read_one(stored(spec(text))) == read_one(spec(text))

    def test_defaults_are_written_as_a_manifest_writes_them(self) -> None:
        serve = stored(spec("{source: a, serve: {rollout: {}}}"))["spec"]["serve"]
        assert serve["rollout"] == {"steps": [100], "hold": "1m", "maxErrorRate": "1%", "maxTtftIncrease": "20%"}
        assert serve["engine"] == {"dtype": "auto", "prefixCaching": True}
        assert serve["streamLimit"] == "10m"

    def test_what_has_no_default_here_says_what_it_is(self) -> None:
        assert BY_PATH["spec.serve.profiles"]["description"].endswith("Left out: [local].")

    def test_what_has_no_default_here_is_left_to_the_reader(self) -> None:
        without = {"spec.serve.replicas.max", "spec.serve.profiles", "spec.train.workers"}
        assert {path.rpartition(".")[2] for path in without} == {key for _, key in NO_DEFAULT}
        assert [path for path in without if "default" in BY_PATH[path]] == []
        manifest = spec("{source: a, train: {dataset: b}, serve: {replicas: {min: 3}}}")
        assert read_one(stored(manifest)) == read_one(manifest)


BEYOND = {"spec.evaluate.gate.task.t": "a structural schema has no patterns of keys"}
DROPPED = {"spec.serve.task": "a null is dropped, and the default stands"}


class TestRefused:
    @pytest.mark.parametrize(("text", "path", "words"), CASES)
    def test_each_case_is_refused_or_has_a_rule_or_is_known(self, text: str, path: str, words: str) -> None:
        with_rule = {f"{at}.{key}".rstrip(".") for at, rule in RULES for key in [rule.get("fieldPath", "").strip(".")]}
        beyond = path in BEYOND or (path in DROPPED and "task: }" in text)
        try:
            stored(spec(text))
        except Refused:
            assert not beyond, "it is refused after all"
        else:
            assert beyond or path.replace("[0]", "[]") in with_rule

    @pytest.mark.parametrize(
        "text",
        [
            "{}",
            "{source: 3}",
            "{source: true}",
            "{source: {uri: a, url: b}}",
            "{source: {uri: a, tokenSecret: b, url: c}}",
            "{source: {uri: hf://a/b, revision: ' '}}",
            "{source: file:///}",
            "{source: s3://}",
            "{source: a, trian: {}}",
            "{source: a, train: {dataset: b, batch_tokens: 1}}",
            "{source: a, train: {dataset: b, steps: 0}}",
            "{source: a, train: {dataset: b, steps: 1.5}}",
            "{source: a, train: {dataset: b, learningRate: 0}}",
            "{source: a, train: {dataset: b, lora: {dropout: 1}}}",
            "{source: a, train: {dataset: b, method: scratch, scratch: {config: {a: {}}}}}",
            "{source: a, serve: {rollout: {hold: 90}}}",
            "{source: a, serve: {rollout: {hold: 1:30}}}",
            "{source: a, serve: {streamLimit: 0s}}",
            "{source: a, serve: {profiles: [L4]}}",
            "{source: a, serve: {engine: {prefixCaching: 'yes'}}}",
            "{source: a, evaluate: {data: b, gate: {perplexityIncrease: 5}}}",
            "{source: a, evaluate: {data: b, gate: {flippedTokens: 100.5%}}}",
            "{source: a, evaluate: {data: b, gate: {tasks: {t: {min: 1}}}}}",
            "{source: a, evaluate: {data: b, gate: [a]}}",
        ],
    )
    def test_what_the_reader_refuses_and_a_schema_can_say(self, text: str) -> None:
        with pytest.raises(ManifestInvalid):
            read(HEAD + text)
        with pytest.raises(Refused):
            stored(spec(text))

    @pytest.mark.parametrize("day", ["2027-6-30", "30.06.2027", "2027-02-30", "'2027-06-30T00:00:00Z'"])
    def test_a_day_has_one_form(self, day: str) -> None:
        manifest = documents(HEAD.replace("Model", "AccessKey") + f"{{models: [a], expires: {day}}}")[0]
        with pytest.raises(Refused):
            stored(manifest)

    @pytest.mark.parametrize("name", ["Support Chat", "-a-", "a" * 64, "a.b", "a\n"])
    def test_a_name_is_one(self, name: str) -> None:
        with pytest.raises(Refused):
            stored({**spec("{source: a}"), "metadata": {"name": name}})


RULES = [(path, rule) for path, node in nodes(SCHEMAS["Model"]) for rule in node.get("x-kubernetes-validations", ())]


def without_numbers(words: str) -> str:
    return re.sub(r"[0-9]+ ?", "", words)


class TestRules:
    @pytest.mark.parametrize(("at", "rule"), RULES, ids=[rule["rule"][:40] for _, rule in RULES])
    def test_a_rule_says_what_the_reader_says(self, at: str, rule: dict[str, str]) -> None:
        place = f"{at}{rule.get('fieldPath', '')}"
        remedy = without_numbers(rule["message"].rpartition("; ")[2])
        said = []
        for text, path, _ in CASES:
            if path.replace("[0]", "[]") == place:
                with pytest.raises(ManifestInvalid) as caught:
                    read(HEAD + text)
                said += [without_numbers(problem.message) for problem in caught.value.problems]
        assert any(words.endswith(remedy) for words in said), said

    def test_what_a_rule_goes_over_has_an_end(self) -> None:
        for at, rule in RULES:
            for at_list in re.findall(r"\[\]", at):
                assert "maxItems" in BY_PATH[at.partition(at_list)[0]], at
            for name in re.findall(r"self\.(\w+)\.(?:map|all|isSorted)\(", rule["rule"]):
                assert BY_PATH[f"{at}.{name}"]["maxItems"] <= 256, rule

    def test_the_table_has_a_line_for_each_rule(self) -> None:
        lines = [line for line in (rules.__doc__ or "").splitlines() if line.startswith("| spec")]
        assert sorted(line.split("|")[1].strip() for line in lines) == sorted(path for path, _ in RULES)

    def test_lists_of_named_things_are_keyed_by_the_name(self) -> None:
        keyed = {path for path, node in nodes(SCHEMAS["Model"]) if node.get("x-kubernetes-list-type") == "map"}
        assert {path for path in keyed if path.startswith("spec")} == {"spec.evaluate.tasks", "spec.serve.adapters"}
        assert len(NAMED_ITEMS) == 2


SLOW = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    deadline=None,
    max_examples=100,
)


@SLOW
@given(MANIFESTS.MANIFESTS | MANIFESTS.broken())
def test_what_the_reader_accepts_is_stored_and_means_the_same(manifest: dict[str, Any]) -> None:
    try:
        (first,) = read(json.dumps(manifest))
    except ManifestInvalid:
        assume(False)
    (second,) = read(json.dumps(stored(manifest)))
    assert second == first
    if isinstance(first, Model) and isinstance(second, Model):
        digests = {item.ident: digest_of(item.ident) for item in outside(first)}
        assert stage_keys(second, digests) == stage_keys(first, digests)
        if first.spec.serve is not None and second.spec.serve is not None:
            assert deciding(second.spec.serve) == deciding(first.spec.serve)


def pattern_at(path: str) -> str:
    return str(BY_PATH[path]["pattern"])


QUANTITIES = [
    (pattern_at("spec.serve.rollout.hold"), TypeAdapter(Duration)),
    (pattern_at("spec.serve.streamLimit"), TypeAdapter(Annotated[Duration, Field(gt=0)])),
    (pattern_at("spec.serve.engine.kvCache"), TypeAdapter(Annotated[Bytes, Field(gt=0)])),
    (pattern_at("spec.evaluate.gate.perplexityIncrease"), TypeAdapter(Share)),
    (pattern_at("spec.evaluate.gate.flippedTokens"), TypeAdapter(Annotated[Share, Field(le=1)])),
]
JUNK = st.text("0159. %msdhkMGiBT\t\n\r\x0b\u00a0-+e", max_size=8)


@pytest.mark.parametrize(("pattern", "type_"), QUANTITIES, ids=[str(number) for number in range(len(QUANTITIES))])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_pattern_takes_exactly_what_the_reader_takes(
    pattern: str, type_: TypeAdapter[Any], data: st.DataObject
) -> None:
    text = data.draw(st.from_regex(pattern, alphabet=st.characters(codec="ascii")) | JUNK)
    assume(len(text) <= 12)
    assume(not re.search(r"\.[0-9]{3}|\.[0-9]*\s*B", text))  # it may round to no byte at all
    try:
        type_.validate_python(text)
        taken = True
    except ValidationError as error:
        assume("too large" not in str(error))
        taken = False
    assert matches(pattern, text) == taken


PLACES = st.text("hfs3ile:/@.a \n", max_size=8) | st.builds(
    "{}{}{}".format,
    st.sampled_from(["hf", "s3", "file", "pvc", "package", "gs", "https", ""]),
    st.sampled_from(["://", ":/", ":///"]),
    st.text("/@a. ", max_size=4),
)


@settings(deadline=None, max_examples=300)
@given(PLACES, st.booleans(), st.none() | st.sampled_from(["main", " ", ""]))
def test_a_source_is_stored_exactly_when_it_is_read(place: str, alone: bool, revision: str | None) -> None:
    source: Any = place if alone else {"uri": place} | ({"revision": revision} if revision is not None else {})
    manifest = {**spec("{source: a}"), "spec": {"source": source}}
    try:
        read_one(manifest)
        taken = True
    except ManifestInvalid:
        taken = False
    try:
        stored(manifest)
        admitted = True
    except Refused:
        admitted = False
    assert admitted == taken

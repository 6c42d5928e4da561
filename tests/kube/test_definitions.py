"""A real API server takes our definitions, and says with them what the reader says.

The unit tests of the definitions hold them to the documentation; here the API server itself admits, refuses, fills in
and explains. Cases and strategies are those of the unit tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import Refused
from control_plane import Cluster
from door import UNIT, Door, model, read_one
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastserve.errors import ManifestInvalid
from fastserve.spec.crd import crds
from fastserve.spec.load import read, read_file
from fastserve.spec.model import GROUP

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CRDS = ROOT / "helm/fastserve/crds"
CASES = ROOT / "tests/data/cases"
MANIFESTS = UNIT.MANIFESTS


SOME = settings(
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ],
    deadline=None,
    max_examples=100,
)


@pytest.fixture(scope="module")
def door(definitions: Cluster) -> Iterator[Door]:
    with definitions.a_namespace() as namespace:
        yield Door(definitions, namespace)


def file_refused_by_reader(file: Path) -> bool:
    try:
        read_file(file)
    except ManifestInvalid:
        return True
    return False


class TestAccepted:
    def test_client_side_apply_takes_the_files_without_a_warning(self, definitions: Cluster) -> None:
        done = definitions.kubectl("apply", "-f", str(CRDS))
        assert done.stderr == ""
        assert sorted(done.stdout.split("\n")[:-1]) == sorted(
            f"customresourcedefinition.apiextensions.k8s.io/{plural}.{GROUP} unchanged" for plural in crds()
        )

    @pytest.mark.parametrize("plural", crds())
    def test_a_definition_is_structural_and_established(self, definitions: Cluster, plural: str) -> None:
        found = definitions.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.{GROUP}")
        conditions = {condition["type"]: condition["status"] for condition in found["status"]["conditions"]}
        assert conditions == {"NamesAccepted": "True", "Established": "True"}

    @pytest.mark.parametrize("plural", crds())
    def test_nothing_of_a_definition_is_dropped(self, definitions: Cluster, plural: str) -> None:
        """What the server does not know it leaves out in silence, such as a misspelled keyword."""
        found = definitions.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.{GROUP}")
        ours = crds()[plural]["spec"]
        assert found["spec"]["versions"] == ours["versions"]
        assert found["spec"]["names"] == ours["names"]
        assert found["spec"]["scope"] == ours["scope"]


class TestManifests:
    FILES = tuple(
        file
        for folder in ("deployments", "tests/data")
        for file in sorted((ROOT / folder).rglob("*.yaml"))
        if f"apiVersion: {GROUP}/" in file.read_text()
    )

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
    def test_a_file_is_taken_by_kubectl_exactly_when_the_reader_takes_it(self, door: Door, file: Path) -> None:
        words = ("apply", "-n", door.namespace, "--dry-run=server", "-o", "json", "-f", str(file))
        done = door.cluster.kubectl(*words, check=False)
        if file_refused_by_reader(file):
            assert done.returncode == 1, done.stdout
            return
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        said = json.loads(done.stdout)
        objects = said["items"] if said["kind"] == "List" else [said]
        assert [read_one(item) for item in objects] == read(file.read_text())

    def test_there_are_files(self) -> None:
        assert {file.name for file in self.FILES} >= {"01-quickstart.yaml", "every-section.yaml", "21-unquoted.yaml"}


WITH_RULE = {f"{at}.{rule.get('fieldPath', '').strip('.')}".rstrip("."): rule["message"] for at, rule in UNIT.RULES}


class TestRefused:
    @pytest.mark.parametrize(("text", "path", "words"), UNIT.CASES)
    def test_each_case_of_the_reader(self, door: Door, text: str, path: str, words: str) -> None:
        """By a rule with the rule's words at the reader's key, by the schema, or it is known to be beyond both."""
        if "inf" in text:
            return self.refused_by_kubectl(door, UNIT.HEAD + text)  # JSON has no such number: it does not get there
        manifest = model(text)
        answer = door.send(manifest)
        beyond = path in UNIT.BEYOND or (path in UNIT.DROPPED and "task: }" in text)
        assert answer.taken == beyond, answer.words
        try:
            UNIT.stored(manifest)
        except Refused:
            return None
        if not beyond:
            assert [WITH_RULE[path.replace("[0]", "[]")]] == answer.at(path), answer.causes
        return None

    def refused_by_kubectl(self, door: Door, text: str) -> None:
        words = ("create", "-n", door.namespace, "--dry-run=server", "-f", "-")
        assert door.cluster.kubectl(*words, text=text, check=False).returncode == 1

    @pytest.mark.parametrize(("at", "rule"), UNIT.RULES, ids=[rule["rule"][:40] for _, rule in UNIT.RULES])
    def test_each_rule_has_a_case_that_it_refuses_and_no_other_does(
        self, door: Door, at: str, rule: dict[str, str]
    ) -> None:
        place = f"{at}.{rule.get('fieldPath', '').strip('.')}".rstrip(".")
        refused = [
            answer
            for text, path, _ in UNIT.CASES
            if path.replace("[0]", "[]") == place
            if "inf" not in text
            for answer in [door.send(model(text))]
            if [cause["field"] for cause in answer.causes] == [path] and answer.at(path) == [rule["message"]]
        ]
        assert refused, f"no case is refused by this rule alone: {rule}"

    @pytest.mark.parametrize(
        "text", UNIT.TestRefused.test_what_the_reader_refuses_and_a_schema_can_say.pytestmark[0].args[1]
    )
    def test_what_a_schema_can_say(self, door: Door, text: str) -> None:
        answer = door.send(model(text))
        assert not answer.taken
        assert "spec" in answer.words

    @pytest.mark.parametrize("day", ["2027-6-30", "30.06.2027", "2027-02-30", "'2027-06-30T00:00:00Z'"])
    def test_a_day_has_one_form(self, door: Door, day: str) -> None:
        (manifest,) = UNIT.documents(UNIT.HEAD.replace("Model", "AccessKey") + f"{{models: [a], expires: {day}}}")
        assert door.send(manifest).at("spec.expires")

    @pytest.mark.parametrize("name", ["Support Chat", "-a-", "a" * 64, "a.b", "a\n"])
    def test_a_name_is_one(self, door: Door, name: str) -> None:
        answer = door.send({**model("{source: a}"), "metadata": {"name": name}})
        assert answer.at("metadata.name")

    def test_everything_is_said_in_one_go(self, door: Door) -> None:
        answer = door.send(model("{source: a, train: {dataset: b, steps: 0, lora: {dropout: 1}, batchTokens: 0}}"))
        assert {cause["field"] for cause in answer.causes} >= {
            "spec.train.steps",
            "spec.train.lora.dropout",
            "spec.train.batchTokens",
        }


def is_block(path: str, node: dict[str, Any]) -> bool:
    """A block of the manifest whose keys are all named."""
    return path.startswith("spec") and "properties" in node and not node.get(UNIT.OPEN)


def nested(manifest: dict[str, Any], place: list[str], value: Any) -> dict[str, Any]:
    """The manifest with `value` at `spec.compress[].prune`, and nothing beside it on the way."""
    key, is_list = place[0].removesuffix("[]"), place[0].endswith("[]")
    below = nested({}, place[1:], value) if place[1:] else value
    return {**manifest, key: [below] if is_list else below}


class TestHabits:
    """Public case 20: keys of other systems are refused, all of them in one go, and nothing is made."""

    @pytest.mark.parametrize(
        ("file", "keys"),
        [
            (
                "20-kubeai-habits.yaml",
                [
                    "url",
                    "features",
                    "engine",
                    "args",
                    "minReplicas",
                    "maxReplicas",
                    "resourceProfile",
                    "targetRequests",
                ],
            ),
            ("20-kserve-habits.yaml", ["predictor"]),
        ],
    )
    def test_apply_names_every_foreign_key(self, door: Door, file: str, keys: list[str]) -> None:
        done = door.cluster.kubectl("apply", "-n", door.namespace, "-f", str(CASES / file), check=False)
        assert done.returncode == 1
        assert sorted(re.findall(r'unknown field "(.+?)"', done.stderr)) == sorted(f"spec.{key}" for key in keys)
        left = door.cluster.kubectl("get", "models", "-n", door.namespace, "-o", "name").stdout
        assert "moved-in" not in left

    @pytest.mark.parametrize("file", ["20-kubeai-habits.yaml", "20-kserve-habits.yaml"])
    def test_without_validation_what_is_missing_is_named(self, door: Door, file: str) -> None:
        words = ("apply", "-n", door.namespace, "--validate=false", "-f", str(CASES / file))
        done = door.cluster.kubectl(*words, check=False)
        assert done.returncode == 1
        assert "spec.source: Required value" in done.stderr

    @pytest.mark.parametrize(
        "place", [path for path, node in UNIT.nodes(UNIT.SCHEMAS["Model"]) if is_block(path, node)]
    )
    def test_a_foreign_key_is_refused_in_every_block(self, door: Door, place: str) -> None:
        answer = door.send(nested({**model("{source: a}"), "spec": {}}, place.split("."), {"foreign": 1}))
        assert f'unknown field "{place.replace("[]", "[0]")}.foreign"' in answer.words


class TestScalars:
    """Public case 21: kubectl reads numbers, flags, texts and days of YAML as FastServe's reader does."""

    def test_right_forms_have_the_same_values(self, door: Door) -> None:
        file = CASES / "21-scalars.yaml"
        done = door.cluster.kubectl("apply", "-n", door.namespace, "--dry-run=server", "-o", "json", "-f", str(file))
        bond, key = (item["spec"] for item in json.loads(done.stdout)["items"])
        train = bond["train"]
        assert (train["learningRate"], train["steps"], train["batchTokens"]) == (0.0002, 100000, 131072)
        assert (bond["source"]["revision"], bond["serve"]["engine"]["prefixCaching"]) == ("1e5f2c", True)
        assert (key["tokenBudget"]["tokens"], key["expires"]) == (2500000000, "2031-01-09")

    @pytest.mark.parametrize(
        "written", ["2e-4", "2.0e-4", "0.0002", "2E-4", "5e8", "1e5", "65_536", "0x10", "0o17", "017", "+3"]
    )
    def test_a_number_is_that_number(self, door: Door, written: str) -> None:
        for key in ("learningRate", "batchTokens"):
            text = f"{UNIT.HEAD}{{source: a, train: {{dataset: b, {key}: {written}}}}}"
            said = self.dry_run(door, text)
            try:
                (ours,) = read(text)
            except ManifestInvalid:
                continue  # refusing what kubectl would take is safe; taking it as something else is not
            assert said is not None
            assert read_one(said) == ours

    @pytest.mark.parametrize(
        "written",
        [
            "on",
            "no",
            "yes",
            "off",
            "~",
            "0123",
            "12e3",
            "2027-06-30",
            "1_000",
            ".5",
            "'no'",
            '"0123"',
            "n",
            "y",
            "1:30",
            "0o17",
        ],
    )
    def test_a_text_is_never_another_text(self, door: Door, written: str) -> None:
        text = f"{UNIT.HEAD}{{source: {{uri: hf://a/b, revision: {written}}}}}"
        said = self.dry_run(door, text)
        try:
            (ours,) = read(text)
        except ManifestInvalid:
            ours = None
        if said is not None and ours is not None:
            assert read_one(said) == ours
        if written[0] in "'\"":
            assert said is not None
            assert ours is not None

    def test_unquoted_traps_are_refused(self, door: Door) -> None:
        words = ("apply", "-n", door.namespace, "-f", str(CASES / "21-unquoted.yaml"))
        assert door.cluster.kubectl(*words, check=False).returncode == 1

    def dry_run(self, door: Door, text: str) -> dict[str, Any] | None:
        words = ("create", "-n", door.namespace, "--dry-run=server", "-o", "json", "-f", "-")
        done = door.cluster.kubectl(*words, text=text, check=False)
        said: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
        return said


def stands_in(manifest: dict[str, Any]) -> bool:
    """Whether the stand-in of the unit tests takes it."""
    try:
        UNIT.stored(manifest)
    except Refused:
        return False
    return True


class TestStandIn:
    """The unit tests try patterns on a stand-in for the server; here the server says what the stand-in says."""

    QUANTITIES = (
        "{source: a, serve: {rollout: {hold: QUANTITY}}}",
        "{source: a, serve: {streamLimit: QUANTITY}}",
        "{source: a, serve: {engine: {kvCache: QUANTITY}}}",
        "{source: a, evaluate: {data: b, gate: {perplexityIncrease: QUANTITY}}}",
        "{source: a, evaluate: {data: b, gate: {flippedTokens: QUANTITY}}}",
    )

    @SOME
    @given(
        st.sampled_from(QUANTITIES),
        UNIT.JUNK | st.from_regex("[ \\t]?[0-9]{1,3}([.][0-9]{1,2})? ?(ms|s|%|GiB|B)[ \\n]?", fullmatch=True),
    )
    def test_quantities(self, door: Door, text: str, quantity: str) -> None:
        manifest = model(text.replace("QUANTITY", json.dumps(quantity, ensure_ascii=False)))
        assert door.send(manifest).taken == stands_in(manifest)

    @SOME
    @given(UNIT.PLACES, st.booleans(), st.none() | st.sampled_from(["main", " ", ""]))
    def test_sources(self, door: Door, place: str, alone: bool, revision: str | None) -> None:
        source: Any = place if alone else {"uri": place} | ({"revision": revision} if revision is not None else {})
        manifest = {**model("{source: a}"), "spec": {"source": source}}
        assert door.send(manifest).taken == stands_in(manifest)


def whole(value: Any) -> Any:
    """Numbers as kubectl writes them: 1.0 is 1. The server takes 1.0 for a whole number, but its rules do not."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class TestDefaults:
    def test_a_model_is_filled_in_as_the_sections_are(self, door: Door) -> None:
        text = (
            "{source: a, train: {dataset: b}, compress: [{quantize: {format: int8}}, {prune: {layers: 0.5}}],"
            " evaluate: {data: c, gate: {}}, serve: {rollout: {}, schedulerOptions: {}, scheduler: mlfq}}"
        )
        manifest = model(text)
        stored = door.stored(manifest)
        assert stored == UNIT.stored(manifest)
        assert read_one(stored) == UNIT.read_one(manifest)
        assert stored["spec"]["train"]["learningRate"] == read_one(stored).spec.train.learning_rate
        assert (stored["spec"]["serve"]["replicas"]["min"], "max" in stored["spec"]["serve"]["replicas"]) == (1, False)

    def test_the_other_kinds_are_as_they_were_read(self, door: Door) -> None:
        for manifest in UNIT.documents((ROOT / "tests/data/every-section.yaml").read_text()):
            stored = door.stored(manifest)
            assert stored == UNIT.stored(manifest)
            assert read_one(stored) == UNIT.read_one(manifest)

    @SOME
    @given(MANIFESTS.MANIFESTS | MANIFESTS.broken())
    def test_what_the_reader_takes_the_server_takes_and_means_the_same(
        self, door: Door, manifest: dict[str, Any]
    ) -> None:
        try:
            (ours,) = read(json.dumps(manifest))
        except ManifestInvalid:
            assume(False)
        # What labels may look like is Kubernetes' business, and a namespace has to be there.
        assert ours.metadata.name == manifest["metadata"]["name"]
        bare = {**manifest, "metadata": {"name": ours.metadata.name}}
        assert read_one(door.stored(whole(bare))) == read_one(bare)

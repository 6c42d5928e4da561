"""Public case 18: numbers of a values file arrive whole, and values of an older release are enough.

A values file makes a float of each number, which a template prints as 4.194304e+06; `--set` does not, so tests that set
values that way see nothing. `helm upgrade --reuse-values` has no key that the older chart did not have.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import chart_files
import pytest
import yaml
from control_plane import Cluster
from helm_chart import CHART, Helm, objects, setting, without_secrets

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]

FLOAT = re.compile(r"[0-9](?:\.[0-9]+)?e\+[0-9]+")
TAG = "20261124073634"
TEXTS = {"name": "local", "memory": "32Gi", "type": "L4", "resource": "nvidia.com/gpu"}
"""Texts that must be there where a block of a list is, by their key."""

HANDED_ON = {
    "resources": {"limits": {"cpu": 2000000, "memory": 8589934592}},
    "nodeSelector": {"pool": "20261124073699"},
    "annotations": {"build": "20261124073698"},
    "labels": {"build": "20261124073697"},
    "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 3000000}],
}
"""Blocks that the chart hands on as they are, by their key. Kubernetes reads the numbers in them, and takes no float
for tolerationSeconds."""


FEWER = {"gateway.podDisruptionBudget.minAvailable": 4194303}
"""A budget is there where there are more replicas than it keeps."""


class Large:
    """Values with another large number wherever one may stand, and tags of digits, made from the chart's schema."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self._next = itertools.count(4194304, 1000003)
        self.values = self._of(json.loads((CHART / "values.schema.json").read_text()), "")

    def _of(self, schema: dict[str, Any], path: str) -> Any:
        key = path.rpartition(".")[2]
        if key in HANDED_ON:
            return HANDED_ON[key]
        match schema.get("type"):
            case "integer":
                self.numbers[path] = FEWER.get(path) or min(next(self._next), schema.get("maximum", 2**62))
                return self.numbers[path]
            case "number":
                self.numbers[path] = next(self._next)
                return self.numbers[path]
            case "array":
                item = self._of(schema["items"], f"{path}[]")
                return None if item is None else [item]
            case "string":
                return TAG if key == "tag" else TEXTS.get(key) if "[]" in path else None
            case "object":
                keys = schema.get("properties", {}).items()
                block = {name: self._of(item, f"{path}.{name}".lstrip(".")) for name, item in keys}
                return {name: value for name, value in block.items() if value is not None} or None
        return None


LARGE = Large()
LEAVES = {value.path: value for value in chart_files.values()}


def leaves(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Values by their path, as `--set-json` takes them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{above}.{key}".lstrip(".")
        found |= {path: value} if path in LEAVES else leaves(value, path)
    return found


@pytest.fixture(scope="module")
def offline(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(helm, {"HOME": str(tmp_path_factory.mktemp("helm"))})


class TestNumbers:
    ON = ("--set", "monitoring.serviceMonitor.enabled=true,ray.tokenSecretName=t")
    SCALED = (*ON, "--set", "gateway.autoscaling.enabled=true")

    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(LARGE.values))
        return str(tmp_path / "values.yaml")

    def test_the_schema_has_numbers_in_each_kind_of_place(self) -> None:
        assert {"gateway.replicas", "ray.profiles[].accelerator.count", "networkPolicies.egressPorts[]"} <= set(
            LARGE.numbers
        )
        assert {"ray.head.tolerations", "operator.resources", "ray.image.tag"} <= set(leaves(LARGE.values))

    def test_all_are_printed_whole(self, offline: Helm, file: str) -> None:
        said = [offline.rendered("-f", file, *more) for more in (self.ON, self.SCALED)]
        assert [FLOAT.findall(text) for text in said] == [[], []]
        numbers = set(re.findall(r"[0-9]+", "".join(said)))
        assert [path for path, number in LARGE.numbers.items() if str(number) not in numbers] == []
        assert {"2000000", "8589934592", "3000000"} <= numbers
        assert f"fastserve:{TAG}" in said[0]
        assert f"fastserve-ray:{TAG}" in said[0]

    def test_a_file_says_what_set_says(self, offline: Helm, file: str) -> None:
        for more in (self.ON, self.SCALED):
            ways = (("-f", file), setting(leaves(LARGE.values)))
            from_file, from_set = (without_secrets(offline.rendered(*way, *more)) for way in ways)
            assert from_file == from_set

    def test_seconds_and_counts_are_numbers_of_the_objects(self, offline: Helm, file: str) -> None:
        """Not texts that look like them."""
        found = objects(offline.rendered("-f", file, *self.ON))
        (gateway,) = (
            item
            for item in found
            if item["metadata"]["name"] == "fastserve-gateway" and "template" in item.get("spec", {})
        )
        assert gateway["spec"]["replicas"] == LARGE.numbers["gateway.replicas"]
        pod = gateway["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == LARGE.numbers["gateway.terminationGracePeriodSeconds"]
        assert pod["tolerations"] == HANDED_ON["tolerations"]
        assert type(pod["tolerations"][0]["tolerationSeconds"]) is int

    @pytest.mark.parametrize("path", [path for path in LEAVES if path.endswith("tag")])
    def test_a_tag_without_quotes_is_refused_by_its_name(self, offline: Helm, tmp_path: Path, path: str) -> None:
        above, key = path.rsplit(".", 1)
        text = f"{key}: {TAG}"
        for name in reversed(above.split(".")):
            text = f"{name}: {{{text}}}"
        (tmp_path / "values.yaml").write_text(text)
        refused = offline("template", "x", str(CHART), "-f", str(tmp_path / "values.yaml"))
        assert refused.returncode != 0
        assert f"'/{path.replace('.', '/')}': got number, want string" in refused.stderr


class TestTexts:
    """A name of digits is a name: Kubernetes allows one everywhere, and YAML without quotes makes a number of it."""

    VALUES = """
        image: {repository: "7001", pullSecrets: ["7002"]}
        store: {uri: s3://bucket/7, secretName: "7003"}
        gateway: {service: {annotations: {build: "7004"}}, nodeSelector: {zone: "7005"}}
        ray:
          tokenSecretName: "7006"
          profiles: [{name: "7007", cpus: 1, memory: 1Gi, nodeSelector: {zone: "7008"}}]
        monitoring: {serviceMonitor: {enabled: true, labels: {release: "7009"}}}
    """
    CLAIMS = ("store.claimName=7010", "store.storageClassName=7011")

    def test_every_text_is_one_in_the_objects(self, offline: Helm, tmp_path: Path) -> None:
        (tmp_path / "values.yaml").write_text(self.VALUES)
        words = [("-f", str(tmp_path / "values.yaml")), *(("--set-string", claim) for claim in self.CLAIMS)]
        found = [item for more in words for item in objects(offline.rendered("--namespace", "20261124", *more))]
        said = json.dumps(found)
        assert {str(7000 + number) for number in range(1, 12)} <= set(re.findall("[0-9]+", said))
        assert numbers_in(found) & {20261124, *range(7001, 7012)} == set()


def numbers_in(value: Any) -> set[int]:
    """Every number of some objects, and of the JSON texts in them."""
    if isinstance(value, dict):
        return set().union(*(numbers_in(item) for pair in value.items() for item in pair))
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    if isinstance(value, str) and value.startswith("{"):
        return numbers_in(json.loads(value))
    return {value} if type(value) is int else set()


class TestOlderRelease:
    """A release whose values have none of today's keys: what `--reuse-values` hands to today's templates."""

    WORDS = ("--set", "ray.tokenSecretName=t,ray.createProfiles=false,gateway.replicas=3")

    @pytest.fixture
    def older(self, tmp_path: Path) -> Path:
        """The chart, as it was before it had any value."""
        folder = tmp_path / "fastserve"
        shutil.copytree(CHART, folder)
        (folder / "values.yaml").write_text("{}\n")
        return folder

    def test_it_is_upgraded_and_rolled_back(
        self, ray_definitions: Cluster, helm: Path, namespace: str, older: Path
    ) -> None:
        program = Helm(helm, ray_definitions.environment)
        place = ("--namespace", namespace)

        def manifest() -> str:
            return program.done("get", "manifest", "fastserve", *place)

        program.done("install", "fastserve", str(older), *place, *self.WORDS)
        before = manifest()
        program.done("upgrade", "fastserve", str(CHART), *place, "--reuse-values")
        kept = json.loads(program.done("get", "values", "fastserve", *place, "--all", "-o", "json"))
        assert (kept["gateway"], "operator" in kept) == ({"replicas": 3}, False), "today's values are not among them"
        fresh = program.rendered("--namespace", namespace, *self.WORDS, "--no-hooks")
        assert objects(without_secrets(manifest())) == objects(without_secrets(fresh))
        program.done("rollback", "fastserve", "1", *place)
        assert manifest() == before
        program.done("uninstall", "fastserve", *place)

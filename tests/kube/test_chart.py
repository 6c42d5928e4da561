"""The chart, rendered by helm and installed on a real API server."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chart_files
import kubernetes.config
import pytest
import yaml
from control_plane import Cluster

from fastserve.cluster.kube_api import KubeApi
from fastserve.cluster.kube_ray import RayClusterHead
from fastserve.gateway.admin import Admin
from fastserve.gateway.config import Config
from fastserve.gateway.statistics import Statistics
from fastserve.spec.load import read
from fastserve.spec.model import GROUP

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/fastserve"
MONITOR = "monitoring.serviceMonitor.enabled=true"
TOKEN = "ray.tokenSecretName=t"
"""The token that the chart makes is another one each time."""


VALUES = {value.path: value for value in chart_files.values()}
NUMBERS = [path for path, value in VALUES.items() if type(value.default) is int]
BIG = {path: 4194304 + 1000003 * number for number, path in enumerate(NUMBERS)}
BLOCKS = sorted({path.rsplit(".", depth)[0] for path in VALUES for depth in range(1, path.count(".") + 1)})


class Helm:
    """helm, with a cluster or without."""

    def __init__(self, program: Path, environment: dict[str, str]) -> None:
        self._program = program
        self._environment = environment

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, *words], env=self._environment, capture_output=True, text=True, timeout=120
        )

    def done(self, *words: str) -> str:
        result = self(*words)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def rendered(self, *words: str) -> str:
        return self.done("template", "fastserve", str(CHART), "--namespace", "models", *words)


def objects(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def setting(values: dict[str, Any]) -> list[str]:
    return [word for path, value in values.items() for word in ("--set-json", f"{path}={json.dumps(value)}")]


def nested(values: dict[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, value in values.items():
        *above, key = path.split(".")
        block = root
        for name in above:
            block = block.setdefault(name, {})
        block[key] = value
    return root


@pytest.fixture(scope="module")
def offline(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(helm, {"HOME": str(tmp_path_factory.mktemp("helm"))})


class TestRendering:
    def test_it_is_in_order(self, offline: Helm) -> None:
        offline.done("lint", "--strict", str(CHART))

    def test_a_large_number_stays_whole(self, offline: Helm, tmp_path: Path) -> None:
        """Public case 18: a values file makes a float of it, and `--set` does not."""
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(nested(BIG)))
        for more in (("--set", MONITOR), ("--set", f"gateway.autoscaling.enabled=true,{MONITOR}")):
            text = offline.rendered("-f", str(file), "--set", TOKEN, *more)
            assert re.findall(r"[0-9](?:\.[0-9]+)?e\+[0-9]+", text) == []
            assert text == offline.rendered(*setting(BIG), "--set", TOKEN, *more)
        said = text + offline.rendered("-f", str(file))
        assert [path for path, number in BIG.items() if str(number) not in said] == []

    def test_numbers_of_a_profile_stay_whole(self, offline: Helm, tmp_path: Path) -> None:
        accelerator = {"type": "L4", "memory": "24GiB", "count": 1048576, "resource": "nvidia.com/gpu"}
        profile = {
            "name": "l4",
            "cpus": 2097152,
            "memory": "32Gi",
            "min": 0,
            "max": 4194304,
            "accelerator": accelerator,
        }
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump({"ray": {"profiles": [profile]}}))
        found = {item["kind"]: item.get("spec") for item in objects(offline.rendered("-f", str(file)))}
        (group,) = found["RayCluster"]["workerGroupSpecs"]
        assert (group["minReplicas"], group["maxReplicas"]) == (0, 4194304)
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits == {"cpu": 2097152, "memory": "32Gi", "nvidia.com/gpu": 1048576}
        assert found["HardwareProfile"]["cpus"] == 2097152

    def test_a_tag_of_digits_is_text(self, offline: Helm, tmp_path: Path) -> None:
        file = tmp_path / "values.yaml"
        file.write_text('image: {tag: "20261124073634"}\nray: {image: {tag: "20261124073635"}}\n')
        text = offline.rendered("-f", str(file))
        assert "fastserve:20261124073634" in text
        assert "fastserve-ray:20261124073635" in text
        file.write_text("image: {tag: 20261124073634}\n")
        refused = offline("template", "x", str(CHART), "-f", str(file))
        assert refused.returncode != 0
        assert "'/image/tag': got number, want string" in refused.stderr

    def test_a_digest_decides(self, offline: Helm) -> None:
        text = offline.rendered("--set", "image.digest=sha256:ab,image.tag=x,ray.image.digest=sha256:cd")
        assert set(re.findall(r"image: (.+)", text)) == {"fastserve@sha256:ab", "fastserve-ray@sha256:cd"}

    @pytest.mark.parametrize("paths", [*([block] for block in BLOCKS), [*VALUES]], ids=lambda paths: paths[0])
    def test_what_is_null_has_its_default(self, offline: Helm, paths: list[str]) -> None:
        nulls = [word for path in paths for word in ("--set", f"{path}=null")]
        with_nulls, without = (re.sub("auth_token: .*", "", offline.rendered(*words)) for words in (nulls, ()))
        assert with_nulls == without

    @pytest.mark.parametrize("path", ["", *BLOCKS])
    def test_an_unknown_key_is_refused(self, offline: Helm, path: str) -> None:
        refused = offline("template", "x", str(CHART), "--set", f"{path}.foreign=1".lstrip("."))
        assert refused.returncode != 0
        assert "'foreign' not allowed" in refused.stderr

    def test_keys_that_are_guessed_are_named_all_at_once(self, offline: Helm) -> None:
        refused = offline("template", "x", str(CHART), "-f", str(ROOT / "tests/data/cases/18-big-values.yaml"))
        assert refused.returncode != 0
        for key in ("maxBodyBytes", "limits", "resyncSeconds"):
            assert f"'{key}'" in refused.stderr

    def test_s3_needs_no_claim(self, offline: Helm) -> None:
        text = offline.rendered("--set", "store.uri=s3://bucket/prefix,store.secretName=keys")
        assert "PersistentVolumeClaim" not in text
        assert text.count("secretRef") == 3

    def test_parts_can_be_left_out(self, offline: Helm) -> None:
        off = "operator.enabled=false,gateway.enabled=false,ray.enabled=false,networkPolicies.enabled=false"
        assert [item["kind"] for item in objects(offline.rendered("--set", off))] == ["PersistentVolumeClaim"]


def test_the_notes_end_with_a_manifest_that_is_read(offline: Helm) -> None:
    text = offline.done("install", "fastserve", str(CHART), "--namespace", "models", "--dry-run=client")
    notes = text.partition("NOTES:\n")[2]
    manifest = notes.partition("<<MODEL\n")[2].partition("  MODEL\n")[0]
    (model,) = read(textwrap.dedent(manifest))
    assert model.metadata.name == "first"
    assert len(manifest.splitlines()) <= 6
    assert "kubectl get models -n models --watch" in notes


class TestMonitoring:
    ON = ",".join(f"monitoring.{part}.enabled=true" for part in ("serviceMonitor", "prometheusRule", "dashboards"))

    def test_alerts_and_panels_ask_for_what_the_gateway_counts(self, offline: Helm) -> None:
        text = offline.rendered("--set", self.ON, "--show-only", "templates/monitoring.yaml")
        assert [item["kind"] for item in objects(text)] == ["ConfigMap", "PrometheusRule", "ServiceMonitor"]
        asked = set(re.findall(r"fastserve_gateway_[a-z_]+", text.replace("fastserve_gateway_admin", "")))
        counted = asyncio.run(self.counted())
        known = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge)$", counted, re.MULTILINE))
        known |= {f"{name}_bucket" for name in re.findall(r"^# TYPE (\S+) histogram$", counted, re.MULTILINE)}
        assert len(asked) > 5
        assert asked <= known
        (dashboard,) = (item["data"] for item in objects(text) if item["kind"] == "ConfigMap")
        assert json.loads(dashboard["fastserve-gateway.json"])["panels"]
        assert "{{ $labels.model }}" in text

    async def counted(self) -> str:
        return Admin(Config, Statistics(), lambda model: 0).metrics()

    def test_they_need_to_be_asked_for(self, offline: Helm) -> None:
        assert "monitoring.coreos.com" not in offline.rendered()


class TestNetwork:
    def policies(self, offline: Helm, *words: str) -> dict[str, Any]:
        text = offline.rendered("--show-only", "templates/network.yaml", *words)
        return {item["metadata"]["name"]: item["spec"] for item in objects(text)}

    def test_nothing_is_open_that_is_not_listed(self, offline: Helm) -> None:
        """Who may be reached by whom, at which ports; `outside` is what is no pod."""
        policies = self.policies(offline)
        default = policies.pop("fastserve-default-deny")
        assert default["policyTypes"] == ["Ingress", "Egress"]
        assert "ingress" not in default
        assert {port["port"] for rule in default["egress"] for port in rule["ports"]} == {53}
        reach = {
            (
                direction,
                part(policy["podSelector"]),
                tuple(part(peer.get("podSelector")) for peer in rule.get(key, [{}])),
                *(port["port"] for port in rule.get("ports", ())),
            )
            for policy in policies.values()
            for direction, key in (("ingress", "from"), ("egress", "to"))
            for rule in policy.get(direction, ())
        }
        assert reach == {
            ("ingress", "gateway", ("outside",), 8100),
            ("ingress", "gateway", ("operator",), 8101),
            ("egress", "gateway", ("ray-head,ray-worker",), 8000),
            ("egress", "operator", ("ray-head,ray-worker",), 8265, 8000),
            ("egress", "operator", ("gateway",), 8101),
            ("egress", "operator", ("outside", "outside"), 443, 6443),
            ("ingress", "ray-head,ray-worker", ("ray-head,ray-worker",)),
            ("ingress", "ray-head,ray-worker", ("operator",), 8265, 8000),
            ("ingress", "ray-head,ray-worker", ("gateway",), 8000),
            ("egress", "ray-head,ray-worker", ("ray-head,ray-worker",)),
            ("egress", "ray-head,ray-worker", ("outside", "outside"), 443, 6443),
            ("egress", "test", ("gateway",), 8100),
        }

    def test_who_may_ask_can_be_said(self, offline: Helm) -> None:
        peers = [{"namespaceSelector": {"matchLabels": {"team": "search"}}}]
        policies = self.policies(offline, *setting({"networkPolicies.gatewayFrom": peers}))
        first, test = policies["fastserve-gateway"]["ingress"][0]["from"]
        assert first == peers[0]
        assert part(test["podSelector"]) == "test"

    @pytest.mark.parametrize("value", ["operator.allNamespaces=true", "operator.enabled=false"])
    def test_an_operator_of_another_namespace_is_let_in(self, offline: Helm, value: str) -> None:
        policies = self.policies(offline, "--set", value)
        rules = [policies["fastserve-ray"]["ingress"][1], policies["fastserve-gateway"]["ingress"][1]]
        assert [rule["from"][0]["namespaceSelector"] for rule in rules] == [{}, {}]


def part(selector: dict[str, Any] | None) -> str:
    """Which of FastServe's pods a selector means."""
    if selector is None:
        return "outside"
    if "matchLabels" in selector:
        labels = selector["matchLabels"]
        assert labels["app.kubernetes.io/name"] == "fastserve"
        return str(labels["app.kubernetes.io/component"])
    return ",".join(selector["matchExpressions"][1]["values"])


class TestRoles:
    @pytest.mark.parametrize("everywhere", ["false", "true"])
    def test_no_right_is_a_wildcard(self, offline: Helm, everywhere: str) -> None:
        found = objects(offline.rendered("--set", f"operator.allNamespaces={everywhere}"))
        rules = [rule for item in found if item["kind"] in ("Role", "ClusterRole") for rule in item["rules"]]
        assert "*" not in json.dumps(rules)
        (secrets,) = (rule["verbs"] for rule in rules if "secrets" in rule["resources"])
        assert secrets == ["get", "create"]
        assert {verb for rule in rules for verb in rule["verbs"]} <= {"get", "list", "watch", "create", "patch"}

    def test_both_modes_grant_the_same_where_models_are(self, offline: Helm) -> None:
        def first(*words: str) -> Any:
            return objects(offline.rendered("--show-only", "templates/rights.yaml", *words))

        one = {item["kind"]: item for item in first() if item["metadata"]["name"] == "fastserve-operator"}
        name = "fastserve-operator-models"
        all_of_them = first("--set", "operator.allNamespaces=true")
        every = {item["kind"]: item for item in all_of_them if item["metadata"]["name"] == name}
        assert (set(one), set(every)) == ({"Role", "RoleBinding"}, {"ClusterRole", "ClusterRoleBinding"})
        assert one["Role"]["rules"] == every["ClusterRole"]["rules"]


def pod_templates(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    templates = {item["metadata"]["name"]: item["spec"]["template"] for item in found if item["kind"] == "Deployment"}
    for item in found:
        if item["kind"] == "Pod":
            templates[item["metadata"]["name"]] = {"metadata": item["metadata"], "spec": item["spec"]}
        elif item["kind"] == "RayCluster":
            templates["head"] = item["spec"]["headGroupSpec"]["template"]
            templates |= {group["groupName"]: group["template"] for group in item["spec"]["workerGroupSpecs"]}
    return templates


class TestPods:
    def test_no_service_gets_into_an_environment(self, offline: Helm) -> None:
        """Public case 16: a Service called vllm would set VLLM_PORT."""
        templates = pod_templates(objects(offline.rendered()))
        assert set(templates) == {"fastserve-operator", "fastserve-gateway", "fastserve-test", "head", "local"}
        assert {name: template["spec"]["enableServiceLinks"] for name, template in templates.items()} == dict.fromkeys(
            templates, False
        )

    def test_only_who_talks_to_the_api_has_a_token(self, offline: Helm) -> None:
        templates = pod_templates(objects(offline.rendered()))
        with_token = {
            name for name, template in templates.items() if template["spec"].get("automountServiceAccountToken", True)
        }
        assert with_token == {"fastserve-operator", "head"}

    def test_pod_security_restricted_takes_them_all(self, offline: Helm, restricted: str, cluster: Cluster) -> None:
        for name, template in pod_templates(objects(offline.rendered())).items():
            body = {"apiVersion": "v1", "kind": "Pod", "spec": {**template["spec"], "serviceAccountName": "default"}}
            body["metadata"] = {"name": "a", "labels": template["metadata"]["labels"]}
            answer = cluster.api.post(
                f"/api/v1/namespaces/{restricted}/pods",
                params={"dryRun": "All", "fieldValidation": "Strict"},
                json=body,
            )
            assert answer.status_code == 201, (name, answer.text)
            assert answer.headers.get_list("warning") == []


@pytest.fixture(scope="module")
def restricted(cluster: Cluster) -> Iterator[str]:
    """A namespace in which pods must be as Pod Security "restricted" says."""
    with cluster.a_namespace() as name:
        label = "pod-security.kubernetes.io/enforce=restricted"
        cluster.kubectl("label", "namespace", name, label)
        cluster.kubectl("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=30s")
        yield name


class Release:
    """The chart, installed in a namespace."""

    def __init__(self, cluster: Cluster, helm: Helm, namespace: str) -> None:
        self.cluster = cluster
        self.helm = helm
        self.namespace = namespace

    def get(self, kind: str, name: str) -> Any:
        return json.loads(self.cluster.kubectl("-n", self.namespace, "get", kind, name, "-o", "json").stdout)

    def names(self, kind: str) -> list[str]:
        return self.cluster.kubectl("-n", self.namespace, "get", kind, "-o", "name").stdout.split()

    def __call__(self, command: str, *words: str) -> str:
        return self.helm.done(command, "fastserve", *words, "--namespace", self.namespace)


@pytest.fixture(scope="module")
def release(ray_definitions: Cluster, helm: Path, restricted: str) -> Iterator[Release]:
    made = Release(ray_definitions, Helm(helm, ray_definitions.environment), restricted)
    made("install", str(CHART))
    yield made
    made("uninstall")
    assert made.names("persistentvolumeclaim") == ["persistentvolumeclaim/fastserve-store"], "artifacts outlive it"
    assert f"models.{GROUP}" in made.cluster.kubectl("get", "crd", "-o", "name").stdout, "so do the Models"
    kinds = "deployment,service,role,rolebinding,networkpolicy,raycluster,poddisruptionbudget"
    assert made.names(kinds) == []
    cluster_wide = "clusterrole,clusterrolebinding,hardwareprofile"
    assert [name for name in made.names(cluster_wide) if restricted in name or name.endswith("/local")] == []


class TestInstalled:
    def test_every_object_is_taken_without_a_warning(self, release: Release) -> None:
        text = release.helm.rendered("--namespace", release.namespace, "--set", "gateway.autoscaling.enabled=true")
        done = release.cluster.kubectl(
            "apply",
            "--server-side",
            "--force-conflicts",
            "--dry-run=server",
            "-n",
            release.namespace,
            "-f",
            "-",
            text=text,
        )
        assert done.stderr == ""

    def test_the_deployments_make_their_pods(self, release: Release) -> None:
        words = ("wait", "-n", release.namespace, "--timeout=60s")
        for name in ("fastserve-operator", "fastserve-gateway"):
            release.cluster.kubectl(*words, "--for=jsonpath={.status.replicas}=2", f"deployment/{name}")

    def test_rights_are_those_of_the_table(self, release: Release) -> None:
        page = (ROOT / "docs/concepts/rights.md").read_text()
        rows = {
            (account, f"{resource}{name}".replace("`", ""), verbs)
            for account, resource, name, verbs in re.findall(
                r"^\| `([^|`]+)` \| (`[^|`]+`)((?: named `[^|`]+`)?) \| ([^|]+) \|$", page, re.MULTILINE
            )
        }
        assert {account for account, _, _ in rows} == {"fastserve-operator"}
        everybody = rights(release, "default")
        for account in ("fastserve-operator", "fastserve-gateway"):
            granted = {(account, *right) for right in rights(release, account) - everybody}
            assert granted == {row for row in rows if row[0] == account}

    def test_the_operator_finds_its_way_to_ray(self, release: Release) -> None:
        """By the RayCluster's head service, with the token that the chart made, to machines that are still to come."""
        patch = json.dumps({"status": {"head": {"serviceName": "fastserve-head-svc"}}})
        words = ("patch", "raycluster/fastserve", "--subresource=status", "--type=merge", "-p", patch)
        release.cluster.kubectl("-n", release.namespace, *words)
        api = KubeApi(kubernetes.config.new_client_from_config(str(release.cluster.kubeconfig)))
        endpoint = RayClusterHead(api, release.namespace, "fastserve", "python").load()
        assert endpoint is not None
        token = release.get("secret", "fastserve-ray-token")["data"]["auth_token"]
        assert endpoint.token == base64.b64decode(token).decode()
        assert endpoint.dashboard_url == f"http://fastserve-head-svc.{release.namespace}.svc:8265"
        assert {machine.profile for machine in endpoint.promised} == {"local"}

    def test_an_upgrade_keeps_machines_and_token(self, release: Release) -> None:
        """`--reuse-values` leaves out what the older chart did not have. Ray's autoscaler writes the list of groups, so
        an upgrade has to take it back, and writes the machines that are there."""
        before = release.get("secret", "fastserve-ray-token")["data"]
        cluster = release.get("raycluster", "fastserve")
        cluster["spec"]["workerGroupSpecs"][0]["replicas"] = 3
        release.cluster.kubectl("-n", release.namespace, "replace", "-f", "-", text=json.dumps(cluster))
        release("upgrade", str(CHART), "--reuse-values", "--force-conflicts", "--set", "gateway.replicas=3")
        assert release.get("deployment", "fastserve-gateway")["spec"]["replicas"] == 3
        assert release.get("raycluster", "fastserve")["spec"]["workerGroupSpecs"][0]["replicas"] == 3
        assert release.get("secret", "fastserve-ray-token")["data"] == before
        release("rollback", "1", "--force-conflicts")
        assert release.get("deployment", "fastserve-gateway")["spec"]["replicas"] == 2
        assert release.get("secret", "fastserve-ray-token")["data"] == before


def rights(release: Release, account: str) -> set[tuple[str, str]]:
    """What an account may do in the namespace: (resource, verbs), as the API server says."""
    answer = release.cluster.api.post(
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        json={
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": release.namespace},
        },
        headers={
            "Impersonate-User": f"system:serviceaccount:{release.namespace}:{account}",
            "Impersonate-Group": "system:serviceaccounts",
        },
    )
    answer.raise_for_status()
    found = set()
    for rule in answer.json()["status"]["resourceRules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                plural, slash, below = resource.partition("/")
                name = "".join(f" named {name}" for name in rule.get("resourceNames", ()))
                place = (f"{plural}.{group}" if group else plural) + slash + below + name
                found.add((place, " ".join(sorted(rule["verbs"]))))
    return found

"""The chart, rendered by helm and installed on a real API server."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chart_files
import kubernetes.config
import pytest
import yaml
from control_plane import Cluster
from helm_chart import CHART, ROOT, Helm, objects, setting, without_secrets

from fastserve.cluster.kube.api import KubeApi
from fastserve.cluster.kube.heads import SHARED
from fastserve.cluster.kube.ray_clusters import RayClusters
from fastserve.gateway.admin import Admin
from fastserve.gateway.config import Config
from fastserve.gateway.statistics import Statistics
from fastserve.spec.load import read
from fastserve.spec.model import GROUP

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]


VALUES = {value.path: value for value in chart_files.values()}
BLOCKS = sorted({path.rsplit(".", depth)[0] for path in VALUES for depth in range(1, path.count(".") + 1)})


@pytest.fixture(scope="module")
def offline(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(helm, {"HOME": str(tmp_path_factory.mktemp("helm"))})


class TestRendering:
    def test_it_is_in_order(self, offline: Helm) -> None:
        offline.done("lint", "--strict", str(CHART))

    def test_a_digest_decides(self, offline: Helm) -> None:
        text = offline.rendered("--set", "image.digest=sha256:ab,image.tag=x,ray.image.digest=sha256:cd")
        assert set(re.findall(r'"?image"?: "?([^",\n]+)', text)) == {"fastserve@sha256:ab", "fastserve-ray@sha256:cd"}

    @pytest.mark.parametrize("paths", [*([block] for block in BLOCKS), [*VALUES]], ids=lambda paths: paths[0])
    def test_what_is_null_has_its_default(self, offline: Helm, paths: list[str]) -> None:
        nulls = [word for path in paths for word in ("--set", f"{path}=null")]
        with_nulls, without = (without_secrets(offline.rendered(*words)) for words in (nulls, ()))
        assert with_nulls == without

    @pytest.mark.parametrize("path", ["", *BLOCKS])
    def test_an_unknown_key_is_refused(self, offline: Helm, path: str) -> None:
        refused = offline("template", "x", str(CHART), "--set", f"{path}.foreign=1".lstrip("."))
        assert refused.returncode != 0
        assert "'foreign' not allowed" in refused.stderr

    def test_keys_that_are_guessed_are_named_all_at_once(self, offline: Helm) -> None:
        refused = offline("template", "x", str(CHART), "-f", str(ROOT / "tests/data/cases/18-guessed-values.yaml"))
        assert refused.returncode != 0
        for key in ("maxRequestBytes", "lookEverySeconds", "headMemoryBytes"):
            assert f"'{key}'" in refused.stderr

    def test_s3_needs_no_claim(self, offline: Helm) -> None:
        text = offline.rendered("--set", "store.uri=s3://bucket/prefix,store.secretName=keys")
        assert "PersistentVolumeClaim" not in text
        assert text.count("secretRef") == 3

    @pytest.mark.parametrize("uri", ["/data", "/storehouse", "s3://", "store", "gs://bucket"])
    def test_a_store_that_no_other_pod_reaches_is_refused(self, offline: Helm, uri: str) -> None:
        refused = offline("template", "x", str(CHART), "--set", f"store.uri={uri}")
        assert refused.returncode != 0
        assert "/store/uri" in refused.stderr
        assert "/store/models" in offline.rendered("--set", "store.uri=/store/models")

    def test_parts_can_be_left_out(self, offline: Helm) -> None:
        off = "operator.enabled=false,gateway.enabled=false,ray.enabled=false,networkPolicies.enabled=false"
        assert [item["kind"] for item in objects(offline.rendered("--set", off))] == ["PersistentVolumeClaim"]

    @pytest.mark.parametrize(
        ("said", "there"),
        [
            ("gateway.replicas=2", True),
            ("gateway.replicas=1", False),
            ("gateway.replicas=3,gateway.podDisruptionBudget.minAvailable=3", False),
            ("gateway.replicas=1,gateway.autoscaling.enabled=true", True),
            ("gateway.autoscaling.enabled=true,gateway.autoscaling.minReplicas=1", False),
        ],
    )
    def test_a_budget_that_would_let_no_pod_go_is_left_out(self, offline: Helm, said: str, there: bool) -> None:
        assert ("PodDisruptionBudget" in offline.rendered("--set", said)) is there

    def test_a_gateway_ends_its_streams_in_the_time_that_its_pod_has(self, offline: Helm) -> None:
        for seconds, drain in ((600, 590), (20, 10), (5, 0)):
            text = offline.rendered("--set", f"gateway.terminationGracePeriodSeconds={seconds}")
            assert re.findall(r"--drain-seconds=(\S+)", text) == [str(drain)]

    def test_nothing_is_random_where_it_is_asked_not_to_be(self, offline: Helm) -> None:
        """Argo CD renders without the cluster at hand, and applies what differs."""
        steady = ("--set", "gateway.makeOrdersSecret=false,ray.tokenSecretName=ray-token")
        first, second = (offline.rendered(*steady) for _ in range(2))
        assert first == second
        assert "kind: Secret" not in first
        assert offline.rendered().count("kind: Secret\n") == 2

    def test_a_probe_waits_for_one_that_is_busy(self, offline: Helm) -> None:
        for item in objects(offline.rendered()):
            pod = item.get("spec", {}).get("template", {}).get("spec", {})
            for container in pod.get("containers", []) if item["kind"] == "Deployment" else []:
                probes = [container[key] for key in ("livenessProbe", "readinessProbe") if key in container]
                assert probes
                assert min(probe["timeoutSeconds"] for probe in probes) >= 10


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

    def test_alerts_are_about_the_release_they_come_with(self, offline: Helm) -> None:
        text = offline.rendered("--namespace", "models", "--set", self.ON, "--show-only", "templates/monitoring.yaml")
        (rule,) = (item for item in objects(text) if item["kind"] == "PrometheusRule")
        asked = [item["expr"] for group in rule["spec"]["groups"] for item in group["rules"]]
        assert asked
        for expression in asked:
            series = re.findall(r"fastserve_gateway_[a-z_]+(\S*)", expression)
            assert [item for item in series if not item.startswith('{namespace="models"}')] == []

    async def counted(self) -> str:
        return Admin(Config, Statistics(), lambda model: 0, lambda orders: None).metrics()

    def test_they_need_to_be_asked_for(self, offline: Helm) -> None:
        assert "monitoring.coreos.com" not in offline.rendered()


class TestNetwork:
    def policies(self, offline: Helm, *words: str) -> dict[str, Any]:
        text = offline.rendered("--show-only", "templates/network.yaml", *words)
        return {item["metadata"]["name"]: item["spec"] for item in objects(text)}

    def test_what_is_open_is_what_the_page_lists(self, offline: Helm) -> None:
        """Each row of the page is open at both of its ends, as far as these are pods of ours, and nothing else is."""
        policies = self.policies(offline)
        default = policies.pop("fastserve-default-deny")
        assert default["policyTypes"] == ["Ingress", "Egress"]
        assert "ingress" not in default
        assert default["egress"] == [{"ports": [{"port": 53, "protocol": name} for name in ("UDP", "TCP")]}]
        reach = {
            (direction, part(policy["podSelector"]), peer, *(port["port"] for port in rule.get("ports", ())))
            for policy in policies.values()
            for direction, key in (("ingress", "from"), ("egress", "to"))
            for rule in policy.get(direction, ())
            for peer in {part(peer.get("podSelector")) for peer in rule.get(key, [{}])}
        }
        rows = re.findall(
            r"^\| `([a-z]+)` \| `([a-z]+)` \| ([0-9 ]+|all) \|",
            (ROOT / "docs/concepts/network.md").read_text(),
            re.MULTILINE,
        )
        listed = set()
        for source, target, said in rows:
            ports = () if said == "all" else tuple(int(port) for port in said.split())
            if source != "outside":
                listed.add(("egress", source, target, *ports))
            if target != "outside":
                listed.add(("ingress", target, source, *ports))
        # Who may reach the gateway is everybody until it is said, so the test's own pod stands at one end only.
        assert reach == listed - {("ingress", "gateway", "test", 8100)}

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
    assert selector["matchExpressions"][1]["values"] == ["ray-head", "ray-worker"]
    return "ray"


class TestRoles:
    @pytest.mark.parametrize("everywhere", ["false", "true"])
    def test_no_right_is_a_wildcard(self, offline: Helm, everywhere: str) -> None:
        found = objects(offline.rendered("--set", f"operator.allNamespaces={everywhere}"))
        rules = [rule for item in found if item["kind"] in ("Role", "ClusterRole") for rule in item["rules"]]
        assert "*" not in json.dumps(rules)
        (secrets,) = (rule["verbs"] for rule in rules if "secrets" in rule["resources"])
        assert secrets == ["get", "create"]
        assert {verb for rule in rules for verb in rule["verbs"]} <= {
            "get",
            "list",
            "watch",
            "create",
            "patch",
            "delete",
        }
        (deleted,) = ({*rule["resources"]} for rule in rules if "delete" in rule["verbs"])
        assert deleted == {"rayclusters"}, "what the operator made itself"

    def test_both_modes_grant_the_same_where_models_are(self, offline: Helm) -> None:
        def first(*words: str) -> Any:
            found = objects(offline.rendered("--show-only", "templates/rights.yaml", *words))
            return [item for item in found if item["kind"] != "Lease"]

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
        assert with_token == {"fastserve-operator"}

    def test_of_the_heads_containers_the_autoscaler_alone_has_a_token(self, offline: Helm) -> None:
        """Stages run in the other one."""
        (cluster,) = (item["spec"] for item in objects(offline.rendered()) if item["kind"] == "RayCluster")
        head = cluster["headGroupSpec"]["template"]["spec"]
        (volume,) = (item["name"] for item in head["volumes"] if "projected" in item)
        (container,) = head["containers"]
        assert volume not in {mount["name"] for mount in container["volumeMounts"]}
        paths = {mount["name"]: mount["mountPath"] for mount in cluster["autoscalerOptions"]["volumeMounts"]}
        assert paths[volume] == "/var/run/secrets/kubernetes.io/serviceaccount"

    def test_more_volumes_and_variables_reach_every_container_of_rays_image(self, offline: Helm) -> None:
        more = {
            "extraVolumes": [{"name": "cache", "hostPath": {"path": "/data"}}],
            "extraVolumeMounts": [{"name": "cache", "mountPath": "/cache", "readOnly": True}],
            "extraEnv": [{"name": "HF_HOME", "value": "/cache"}],
        }
        given = {f"{part}.{key}": value for part in ("ray", "operator") for key, value in more.items()}
        found = objects(offline.rendered(*setting(given)))
        templates = pod_templates(found)
        (autoscaler,) = (item["spec"]["autoscalerOptions"] for item in found if item["kind"] == "RayCluster")
        pods = {name: templates[name]["spec"] for name in ("head", "local", "fastserve-operator")}
        for container in (autoscaler, *(container for pod in pods.values() for container in pod["containers"])):
            assert more["extraVolumeMounts"][0] in container["volumeMounts"]
            assert more["extraEnv"][0] in container["env"]
        assert [name for name, pod in pods.items() if more["extraVolumes"][0] not in pod["volumes"]] == []

    def test_engines_start_warm_on_machines_without_accelerators(self, offline: Helm) -> None:
        l4 = {"type": "L4", "memory": "24GiB", "resource": "nvidia.com/gpu"}
        profiles = [
            {"name": "cpu", "cpus": 4, "memory": "8Gi"},
            {"name": "l4", "cpus": 4, "memory": "8Gi", "accelerator": l4},
        ]

        def warm(*words: str) -> set[str]:
            templates = pod_templates(objects(offline.rendered(*setting({"ray.profiles": profiles}), *words)))
            folder = {"name": "FASTSERVE_ENGINES", "value": "/tmp/engines"}
            return {
                name
                for name, template in templates.items()
                if folder in template["spec"]["containers"][0].get("env", ())
            }

        assert warm() == {"cpu"}
        assert warm("--set", "ray.warmEngines=false") == set()

    def test_the_machines_of_a_lost_head_end_soon_unless_somebody_says_otherwise(self, offline: Helm) -> None:
        name = "RAY_gcs_rpc_server_reconnect_timeout_s"

        def seconds(*words: str) -> dict[str, list[str]]:
            """No name may stand twice: KubeRay's definition refuses that."""
            templates = pod_templates(objects(offline.rendered(*words)))
            env = {part: templates[part]["spec"]["containers"][0]["env"] for part in ("head", "local")}
            return {part: [item["value"] for item in items if item["name"] == name] for part, items in env.items()}

        assert seconds() == {"head": [], "local": ["20"]}
        own = setting({"ray.extraEnv": [{"name": name, "value": "300"}]})
        assert seconds(*own) == {"head": ["300"], "local": ["300"]}

    def test_a_claim_of_sources_is_read_by_the_operator_and_by_ray(self, offline: Helm) -> None:
        templates = pod_templates(objects(offline.rendered("--set", "ray.sourceClaims={weights,rows}")))
        for name in ("fastserve-operator", "head", "local"):
            pod = templates[name]["spec"]
            claims = {
                item["name"]: item["persistentVolumeClaim"]["claimName"]
                for item in pod["volumes"]
                if "persistentVolumeClaim" in item
            }
            (container,) = pod["containers"]
            mounts = {claims[item["name"]]: item for item in container["volumeMounts"] if item["name"] in claims}
            for claim in ("weights", "rows"):
                assert (mounts[claim]["mountPath"], mounts[claim]["readOnly"]) == (f"/sources/{claim}", True)
            assert {"name": "FASTSERVE_SOURCES", "value": "/sources"} in container["env"]

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
        cluster.kubectl("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=300s")
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

    def ray_status(self, name: str, status: dict[str, Any]) -> None:
        """What KubeRay says of a RayCluster."""
        patch = json.dumps({"status": status})
        words = ("patch", f"raycluster/{name}", "--subresource=status", "--type=merge", "-p", patch)
        self.cluster.kubectl("-n", self.namespace, *words)

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
    end = time.monotonic() + 300  # the controller manager takes away what the operator made of the chart's template
    while left := made.names(kinds):
        assert time.monotonic() < end, left
        time.sleep(0.2)
    cluster_wide = "clusterrole,clusterrolebinding,hardwareprofile"
    assert [name for name in made.names(cluster_wide) if restricted in name or name.endswith("/local")] == []


class TestInstalled:
    def test_every_object_is_taken_without_a_warning(self, release: Release) -> None:
        text = release.helm.rendered("--namespace", release.namespace, "--set", "gateway.autoscaling.enabled=true")
        text = yaml.safe_dump_all(objects(text))
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
        words = ("wait", "-n", release.namespace, "--timeout=300s")
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

    def test_the_operator_makes_a_ray_cluster_of_the_template(self, release: Release) -> None:
        """With the token that the chart made, and on its way to machines that are still to come."""
        clusters = ray_clusters(release)
        clusters.look({})
        (name,) = (item.partition("/")[2] for item in release.names("rayclusters.ray.io"))
        assert re.fullmatch("fastserve-[0-9a-f]{6}", name)
        release.ray_status(name, {"head": {"serviceName": f"{name}-head-svc"}})
        clusters.look({})
        endpoint = clusters.of(SHARED).head.load()
        assert endpoint is not None
        token = release.get("secret", "fastserve-ray-token")["data"]["auth_token"]
        assert endpoint.token == base64.b64decode(token).decode()
        assert endpoint.dashboard_url == f"http://{name}-head-svc.{release.namespace}.svc:8265"
        assert {machine.profile for machine in endpoint.promised} == {"local"}

    def test_an_upgrade_keeps_machines_and_token(self, release: Release) -> None:
        """`--reuse-values` leaves out what the older chart did not have. Ray's autoscaler writes into the RayCluster,
        and the chart does not, so neither has to give way."""
        clusters = ray_clusters(release)
        clusters.look({})
        name = clusters.of(SHARED).name
        before = release.get("secret", "fastserve-ray-token")["data"]
        cluster = release.get("raycluster", name)
        cluster["spec"]["workerGroupSpecs"][0]["replicas"] = 3
        release.cluster.kubectl("-n", release.namespace, "replace", "-f", "-", text=json.dumps(cluster))
        profiles = [{**VALUES["ray.profiles"].default[0], "max": 9}]
        more = setting({"gateway.replicas": 3, "ray.profiles": profiles})
        release("upgrade", str(CHART), "--reuse-values", *more)
        assert release.get("deployment", "fastserve-gateway")["spec"]["replicas"] == 3
        clusters.look({})
        group = release.get("raycluster", name)["spec"]["workerGroupSpecs"][0]
        assert (group["replicas"], group["maxReplicas"]) == (3, 9)
        assert release.get("secret", "fastserve-ray-token")["data"] == before
        release("rollback", "1")
        clusters.look({})
        assert release.get("deployment", "fastserve-gateway")["spec"]["replicas"] == 2
        assert release.get("raycluster", name)["spec"]["workerGroupSpecs"][0]["maxReplicas"] == 4
        assert clusters.of(SHARED).name == name
        assert release.get("secret", "fastserve-ray-token")["data"] == before

    def test_another_image_makes_another_ray_cluster_beside_the_old_one(self, release: Release) -> None:
        clusters = ray_clusters(release)
        clusters.look({})
        old = clusters.of(SHARED).name
        release.ray_status(old, {"state": "ready", "head": {"serviceName": f"{old}-head-svc"}})
        release("upgrade", str(CHART), "--set", "ray.image.tag=next")
        clusters.look({})
        assert clusters.of(SHARED).name == old, "it works on until the next one is up"
        assert "is not up yet" in clusters.rolling()[old]
        (new,) = (head.name for head in clusters.all() if head.name != old)
        image = release.get("raycluster", new)["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
        assert image == "fastserve-ray:next"
        release.ray_status(new, {"state": "ready", "head": {"serviceName": f"{new}-head-svc"}})
        clusters.look({})
        assert clusters.of(SHARED).name == new
        release("rollback", "1")
        clusters.look({})
        assert clusters.of(SHARED).name == old, "what fits again is taken again"
        clusters.end(next(head for head in clusters.all() if head.name == new))
        clusters.look({})
        assert [head.name for head in clusters.all()] == [old]


def ray_clusters(release: Release) -> RayClusters:
    """The RayClusters of the release's namespace, as its operator finds and makes them: with its rights."""
    kubeconfig = release.cluster.as_account(release.namespace, "fastserve-operator")
    api = KubeApi(kubernetes.config.new_client_from_config(str(kubeconfig)))
    return RayClusters(api, release.namespace, "fastserve-ray", "python")


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

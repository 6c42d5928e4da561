"""What every cluster has beside its nodes: names for Services, and KubeRay's operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from bare_image import bare_image
from component import PAUSE
from kubernetes_binaries import Binaries
from network import DNS_ADDRESS

DNS_IMAGE = "localhost/fastserve/coredns:1"
KUBERAY_IMAGE = "localhost/fastserve/kuberay-operator:1"
KUBERAY_NAMESPACE = "kuberay"

COREFILE = """cluster.local:53 in-addr.arpa:53 {
    errors
    ready :8181
    kubernetes cluster.local in-addr.arpa {
        pods insecure
        ttl 2
    }
    cache 2
}
.:53 {
    errors
    template ANY ANY {
        rcode NXDOMAIN
    }
}
"""
"""Names of the cluster are known here, and no others: there is nobody to ask."""


def images(binaries: Binaries, folder: Path) -> list[Path]:
    """Archives of what a node and the addons run."""
    busybox = {"/bin/busybox": binaries.paths["busybox"]}
    return [
        bare_image(folder / "pause.tar", PAUSE, busybox, {"/bin/sleep": "busybox"}, ["/bin/sleep", "infinity"]),
        bare_image(folder / "dns.tar", DNS_IMAGE, {"/bin/coredns": binaries.paths["coredns"]}, {}, ["/bin/coredns"]),
        bare_image(
            folder / "kuberay.tar", KUBERAY_IMAGE, {"/manager": binaries.paths["ray-operator"]}, {}, ["/manager"]
        ),
    ]


def dns() -> list[dict[str, Any]]:
    """Objects of CoreDNS."""
    labels = {"k8s-app": "kube-dns"}
    where = {"namespace": "kube-system", "name": "coredns"}
    container = {
        "name": "coredns",
        "image": DNS_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "170Mi"}},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
    }
    rules = [
        {
            "apiGroups": [""],
            "resources": ["endpoints", "services", "pods", "namespaces"],
            "verbs": ["list", "watch"],
        },
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    pod = {
        "serviceAccountName": "coredns",
        "dnsPolicy": "Default",
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    }
    ports = [{"name": f"dns-{kind.lower()}", "port": 53, "protocol": kind} for kind in ("UDP", "TCP")]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": where},
        _named("ClusterRole", "coredns", rules=rules),
        _binding("coredns", "kube-system"),
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": where, "data": {"Corefile": COREFILE}},
        _deployment(where, labels, pod),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": "kube-system", "name": "kube-dns"},
            "spec": {"clusterIP": DNS_ADDRESS, "selector": labels, "ports": ports},
        },
    ]


def kuberay(rights: Path) -> list[dict[str, Any]]:
    """Objects of KubeRay's operator; `rights` is the folder of KubeRay's own rights."""
    name = "kuberay-operator"
    where = {"namespace": KUBERAY_NAMESPACE, "name": name}
    container = {
        "name": name,
        "image": KUBERAY_IMAGE,
        "imagePullPolicy": "Never",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/metrics", "port": "http"}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
    }
    pod = {
        "serviceAccountName": name,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": KUBERAY_NAMESPACE}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": where},
        *(item for item in yaml.safe_load_all((rights / "role.yaml").read_text()) if item),
        _binding(name, KUBERAY_NAMESPACE),
        _deployment(where, {"app.kubernetes.io/component": name}, pod),
    ]


def _named(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": name}, **more}


def _binding(name: str, namespace: str) -> dict[str, Any]:
    return _named(
        "ClusterRoleBinding",
        name,
        roleRef={"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        subjects=[{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    )


def _deployment(where: dict[str, str], labels: dict[str, str], pod: dict[str, Any]) -> dict[str, Any]:
    # They are where the control plane is, so that no loss of a node takes them along.
    pod = {**pod, "nodeName": "node0"}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": where, "spec": spec}

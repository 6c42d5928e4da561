"""What each part of a node is started with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from kubernetes_binaries import Binaries
from network import DNS_ADDRESS, PODS, SERVICES, Place

API_PORT = 6443
ETCD = "http://127.0.0.1:2379"
PEER = "http://127.0.0.1:2380"
PAUSE = "localhost/fastserve/pause:1"
"""The image in which a pod's namespaces are held."""

GRACE_SECONDS = 40
"""How long a node may be silent."""

EVICT_SECONDS = 15
"""How long pods stay on a node that is lost."""

Step = dict[str, Any]


def control_plane(binaries: Binaries, shared: Path, place: Place) -> list[Step]:
    """etcd, API server, controllers and scheduler; certificates are in `shared`."""
    return [
        _step("etcd", _etcd(binaries, shared)),
        _step("kube-apiserver", _api_server(binaries, shared, place)),
        _step(
            "kube-controller-manager",
            [
                *(binaries["kube-controller-manager"], f"--kubeconfig={shared}/controllers.conf"),
                *("--leader-elect=false", "--bind-address=127.0.0.1", "--profiling=false"),
                *(f"--service-account-private-key-file={shared}/accounts.key", f"--root-ca-file={shared}/ca.crt"),
                *("--use-service-account-credentials=true", f"--node-monitor-grace-period={GRACE_SECONDS}s"),
            ],
        ),
        _step(
            "kube-scheduler",
            [
                *(binaries["kube-scheduler"], f"--kubeconfig={shared}/scheduler.conf"),
                *("--leader-elect=false", "--bind-address=127.0.0.1", "--profiling=false"),
            ],
        ),
    ]


def _etcd(binaries: Binaries, shared: Path) -> list[str]:
    return [
        *(binaries["etcd"], "--name=e", f"--data-dir={shared}/etcd", "--unsafe-no-fsync", "--log-level=warn"),
        *(f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}"),
        *(f"--listen-peer-urls={PEER}", f"--initial-advertise-peer-urls={PEER}", f"--initial-cluster=e={PEER}"),
    ]


def _api_server(binaries: Binaries, shared: Path, place: Place) -> list[str]:
    return [
        *(binaries["kube-apiserver"], f"--etcd-servers={ETCD}", "--bind-address=0.0.0.0", "--profiling=false"),
        *(f"--advertise-address={place.address}", f"--secure-port={API_PORT}"),
        *(f"--service-cluster-ip-range={SERVICES}", "--enable-priority-and-fairness=false"),
        *(f"--tls-cert-file={shared}/server.crt", f"--tls-private-key-file={shared}/server.key"),
        *(f"--client-ca-file={shared}/ca.crt", f"--service-account-key-file={shared}/accounts.pub"),
        *(f"--service-account-signing-key-file={shared}/accounts.key", "--service-account-issuer=https://fastserve"),
        *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true"),
        # No name server knows the nodes' names.
        "--kubelet-preferred-address-types=InternalIP",
        *(f"--kubelet-client-certificate={shared}/kubelets.crt", f"--kubelet-client-key={shared}/kubelets.key"),
        f"--default-not-ready-toleration-seconds={EVICT_SECONDS}",
        f"--default-unreachable-toleration-seconds={EVICT_SECONDS}",
    ]


def containerd(binaries: Binaries, folder: Path, shared: Path, place: Place) -> Step:
    """containerd with runc, and a network of pods in which the node routes every packet, so that Services work between
    pods of one node as well."""
    networks = folder / "cni"
    (networks / "10-ptp.conflist").write_text(json.dumps(_pod_network(place)))
    path = folder / "containerd.toml"
    runtime = f"""
    [plugins."io.containerd.cri.v1.runtime".containerd]
      default_runtime_name = "runc"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
        runtime_type = "io.containerd.runc.v2"
        [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
          BinaryName = "{binaries["runc"]}"
          SystemdCgroup = false
"""
    # A process may not ask the kernel to spare it without a capability that a container of tests may lack.
    path.write_text(f"""version = 3
root = "{folder}/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = [
  "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "/run/nri/nri.sock"
  plugin_path = "{folder}/nri/plugins"
  plugin_config_path = "{folder}/nri/settings"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{Path(binaries["ptp"]).parent}"]
    conf_dir = "{networks}"
    use_internal_loopback = true
{runtime}""")
    return _step("containerd", [binaries["containerd"], "--config", str(path)], ready=str(folder / "containerd.sock"))


def _pod_network(place: Place) -> dict[str, Any]:
    addresses = {
        "type": "host-local",
        "dataDir": "/run/pod-addresses",
        "ranges": [[{"subnet": place.pods}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{"type": "ptp", "ipMasq": False, "mtu": 1500, "ipam": addresses}],
    }


def policies(binaries: Binaries, shared: Path, place: Place) -> Step:
    """What enforces NetworkPolicies. It asks containerd for the addresses of pods, and no pod may begin before it has
    laid its rules."""
    laid = "/run/policies.laid"
    words = [
        *(binaries["policies"], f"--kubeconfig={shared}/policies.conf", f"--node={place.name}"),
        *(f"--pods={PODS}", f"--laid={laid}"),
    ]
    return _step("policies", words, ready=laid)


def kubelet(binaries: Binaries, folder: Path, shared: Path, place: Place, cgroup: str, api: str) -> Step:
    """kubelet; everything that it keeps is in its folder."""
    (folder / "resolv.conf").write_text("options ndots:5\n")
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "containerRuntimeEndpoint": f"unix://{folder}/containerd.sock",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": False},
            "x509": {"clientCAFile": f"{shared}/ca.crt"},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "tlsCertFile": f"{shared}/{place.name}.crt",
        "tlsPrivateKeyFile": f"{shared}/{place.name}.key",
        "clusterDomain": "cluster.local",
        "clusterDNS": [DNS_ADDRESS],
        "resolvConf": f"{folder}/resolv.conf",
        "failSwapOn": False,
        "podLogsDir": f"{folder}/pods",
        "volumePluginDir": f"{folder}/volume-plugins",
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "serializeImagePulls": False,
        "nodeStatusUpdateFrequency": "5s",
        # A changed ConfigMap reaches a pod within one of these.
        "syncFrequency": "10s",
    }
    path = folder / "kubelet.yaml"
    path.write_text(yaml.safe_dump(settings))
    words = [
        *(binaries["kubelet"], f"--config={path}", f"--kubeconfig={shared}/{place.name}.conf"),
        *(f"--root-dir={folder}/kubelet", f"--cert-dir={folder}/kubelet/pki", "--oom-score-adj=0"),
        *(f"--node-ip={place.address}", f"--hostname-override={place.name}"),
    ]
    return _step("kubelet", words)


def kube_proxy(binaries: Binaries, folder: Path, shared: Path, place: Place) -> Step:
    """kube-proxy by nftables; settings of the whole machine are left alone."""
    settings = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": PODS,
        "hostnameOverride": place.name,
        "clientConnection": {"kubeconfig": f"{shared}/proxy.conf"},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "metricsBindAddress": "127.0.0.1:10249",
    }
    path = folder / "proxy.yaml"
    path.write_text(yaml.safe_dump(settings))
    return _step("kube-proxy", [binaries["kube-proxy"], f"--config={path}"])


def _step(name: str, words: list[str], ready: str | None = None) -> Step:
    return {"name": name, "words": words, "ready": ready}

"""The programs of Kubernetes for tests: those that this machine has, or some programs built once from Go modules.

What is taken, in this order:

1. `etcd`, `kube-apiserver`, `kube-controller-manager` and `kubectl` in the folder that KUBEBUILDER_ASSETS names or on
   the PATH, when all four are there;
2. the program built from `server`, a Go module that holds all of Kubernetes. It is kept outside the clone under the
   hash of what decides it. Building takes about 7 minutes on two quiet cores (12 CPU minutes, 8 GB of Go's caches), so
   a test never builds it: `python tests/kube/kubernetes_binaries.py` does, and `make test-kube` calls that.

Helm is built likewise, in 2 to 3 minutes; KubeRay's definitions are files of its Go module.

A whole node (`make test-cluster`) needs more: containerd, CoreDNS, KubeRay's operator and what enforces
NetworkPolicies, built likewise in 4 minutes, and what Debian has packages of: runc, the plugins of pod networks, nft
and a busybox. Packages that are not installed are downloaded and laid out beside the programs. What builds images
(buildah, mmdebstrap) cannot be laid out so; in CI it is installed with apt-get.

Where neither can be, FASTSERVE_TEST_KUBECONFIG names the kubeconfig of an existing cluster to test on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
EXISTING = "FASTSERVE_TEST_KUBECONFIG"
HOW = "Build it once with `python tests/kube/kubernetes_binaries.py` (needs Go, about 10 minutes)"
WHAT_TO_DO = (
    f"a Kubernetes API server. {HOW}, or let KUBEBUILDER_ASSETS name a folder with etcd, kube-apiserver, "
    f"kube-controller-manager and kubectl, or let {EXISTING} name the kubeconfig of a cluster for tests"
)


@dataclass(frozen=True)
class Module:
    """A Go module beside this file and the program that it makes."""

    folder: str
    package: str
    program: str
    more: tuple[str, ...] = ()
    """Packages whose programs are built beside it."""

    tags: str = ""
    links: tuple[str, ...] = ()
    """Names by which the program is called to be one of its parts."""

    stamps: str = ""
    """Module of which the program is told the version; unset, a server calls itself v0.0.0."""

    @property
    def place(self) -> Path:
        return HERE / self.folder

    @property
    def programs(self) -> dict[str, str]:
        """Package of each program, the one that is looked for last."""
        return {**{package.rpartition("/")[2]: package for package in self.more}, self.program: self.package}

    def is_built(self, go: str) -> bool:
        return (self.kept(go) / self.program).exists()

    def flags(self) -> list[str]:
        said = []
        if self.stamps:
            version = re.search(rf"{self.stamps} (v(\d+)\.(\d+)\.\d+)", (self.place / "go.mod").read_text())
            if version is None:
                raise ValueError(f"{self.folder}/go.mod names no version of {self.stamps}")
            said = [
                f"-X k8s.io/{where}/version.{key}={value}"
                for where in ("component-base", "client-go/pkg")
                for key, value in zip(("gitVersion", "gitMajor", "gitMinor"), version.groups(), strict=True)
            ]
        tags = ["-tags", self.tags] if self.tags else []
        return ["-trimpath", "-buildvcs=false", *tags, "-ldflags", " ".join(["-s", "-w", *said])]

    def kept(self, go: str) -> Path:
        """Where it is kept, outside the clone, under the hash of what decides it."""
        version = subprocess.run([go, "env", "GOVERSION"], check=True, capture_output=True).stdout
        files = [self.place / name for name in ("go.mod", "go.sum", "main.go")]
        content = [file.read_bytes() for file in files if file.exists()]
        digest = hashlib.sha256(b"\0".join([*content, version, "\0".join(self.flags()).encode()]))
        return Path("~/.cache/fastserve/bin").expanduser() / digest.hexdigest()[:24]

    def build(self, go: str) -> None:
        """From the cache or newly built."""
        folder = self.kept(go)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / self.program).exists():
                return
            environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
            for name, package in self.programs.items():
                part = folder / f"{name}.part"
                words = [go, "build", *self.flags(), "-o", str(part), package]
                subprocess.run(words, cwd=self.place, env=environment, check=True)
                if name == self.program:
                    for link in self.links:
                        (folder / link).unlink(missing_ok=True)
                        (folder / link).symlink_to(name)
                part.rename(folder / name)


KUBERNETES = Module(
    folder="server",
    package=".",
    program="kube",
    links=(*CONTROL_PLANE, "kube-scheduler", "kubelet", "kube-proxy"),
    stamps="k8s.io/kubernetes",
)
HELM = Module(folder="helm", package="helm.sh/helm/v4/cmd/helm", program="helm")
CONTAINERD = Module(
    folder="containerd",
    package="github.com/containerd/containerd/v2/cmd/containerd",
    program="containerd",
    more=(
        "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
        "github.com/containerd/containerd/v2/cmd/ctr",
    ),
    tags="no_btrfs no_zfs no_devmapper",
)
DNS = Module(folder="dns", package=".", program="coredns")
KUBERAY = Module(folder="kuberay", package="github.com/ray-project/kuberay/ray-operator", program="ray-operator")
POLICIES = Module(folder="policies", package=".", program="policies")
OF_A_NODE = (CONTAINERD, DNS, KUBERAY, POLICIES)

DEBIAN = {
    "runc": ("runc",),
    "containernetworking-plugins": ("ptp", "host-local"),
    "nftables": ("nft",),
    "busybox-static": ("busybox",),
}
"""Debian's packages for a node, and the programs of each that are called."""

BUILDERS = ("buildah", "mmdebstrap")
"""Debian's packages, and programs, that build images."""

FOLDERS = ("usr/sbin", "usr/bin", "bin", "sbin", "usr/lib/cni")
"""Where they lie, below the root of the machine or of the folder of downloads."""


@dataclass(frozen=True)
class Binaries:
    """Where each program is."""

    paths: dict[str, Path]

    def __getitem__(self, program: str) -> str:
        return str(self.paths[program])


def present() -> Binaries | None:
    """The control plane that can be used now, without building anything."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    path = os.pathsep.join(filter(None, [assets, os.environ.get("PATH")]))
    found = {program: shutil.which(program, path=path) for program in CONTROL_PLANE}
    if all(found.values()):
        return Binaries({program: Path(str(place)) for program, place in found.items()})
    go = shutil.which("go")
    folder = KUBERNETES.kept(go) if go else None
    if folder is None or not (folder / KUBERNETES.program).exists():
        return None
    return Binaries({link: folder / link for link in KUBERNETES.links})


def present_helm() -> Path | None:
    """Helm, where it can be used now: built here, or on the PATH."""
    go, there = shutil.which("go"), shutil.which("helm")
    built = HELM.kept(go) / HELM.program if go else None
    if built is not None and built.exists():
        return built
    return Path(there) if there else None


def kuberay(go: str) -> Path:
    """Folder of KubeRay's definitions, from its Go module."""
    words = [go, "mod", "download", "-json", "github.com/ray-project/kuberay/ray-operator"]
    done = subprocess.run(words, cwd=HERE / "kuberay", check=True, capture_output=True, text=True)
    return Path(json.loads(done.stdout)["Dir"]) / "config/crd/bases"


def downloads() -> Path:
    """Where packages that are not installed are laid out."""
    return Path("~/.cache/fastserve/debian").expanduser()


def of_debian() -> dict[str, Path]:
    """The programs of Debian's packages that this machine has, installed or laid out."""
    found = {}
    for program in (program for programs in DEBIAN.values() for program in programs):
        for root in (Path("/"), downloads()):
            for folder in FOLDERS:
                if program not in found and os.access(root / folder / program, os.X_OK):
                    found[program] = root / folder / program
    return found


def lay_out(packages: list[str]) -> None:
    """Download Debian packages, with what they need and this machine lacks, and lay them out beside the programs."""
    place = downloads()
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock, tempfile.TemporaryDirectory() as cache:
        fcntl.flock(lock, fcntl.LOCK_EX)
        apt = ["apt-get", "-q", "-o", f"Dir::Cache::archives={cache}", "-o", "APT::Sandbox::User=root"]
        words = [*apt, "install", "--download-only", "--no-install-recommends", "-y", *packages]
        subprocess.run(words, check=True)
        for file in sorted(Path(cache).glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(file), str(place)], check=True)


def present_node() -> Binaries | None:
    """All programs of a whole node, where they can be used now; some of Debian's may need `libraries()`."""
    go, debian = shutil.which("go"), of_debian()
    if go is None or {program for programs in DEBIAN.values() for program in programs} - {*debian}:
        return None
    paths = {**debian, **{link: KUBERNETES.kept(go) / link for link in KUBERNETES.links}}
    for module in (HELM, *OF_A_NODE):
        paths |= {program: module.kept(go) / program for program in module.programs}
    return Binaries(paths) if all(path.exists() for path in paths.values()) else None


def libraries() -> str:
    """What LD_LIBRARY_PATH has to hold for programs that are laid out, not installed."""
    return str(downloads() / "usr/lib/x86_64-linux-gnu")


def main(words: Sequence[str] = ()) -> int:
    """Build what is missing and say where it is; without Go, say what to do (in CI that is a failure).

    words: `node` asks for what a whole node needs as well.
    """
    say = sys.stdout.write
    if os.environ.get(EXISTING):
        say(f"The tests use the cluster of {os.environ[EXISTING]}\n")
        return 0
    in_ci = os.environ.get("CI") == "true"
    if "node" in words and os.geteuid() != 0:
        sys.stderr.write("A whole node needs root; its tests are left out.\n")
        if in_ci:
            return 1
        words = []  # an API server alone needs no root
    go = shutil.which("go")
    wanted = [(KUBERNETES, "7 minutes", present() is None), (HELM, "3 minutes", present_helm() is None)]
    if "node" in words:
        durations = ("7 minutes", "3 minutes", *("a minute" for _ in OF_A_NODE))
        modules = zip((KUBERNETES, HELM, *OF_A_NODE), durations, strict=True)
        wanted = [(module, duration, go is None or not module.is_built(go)) for module, duration in modules]
    for module, duration, is_missing in wanted:
        if is_missing and go is None:
            sys.stderr.write(f"Go is not on the PATH. The tests need {WHAT_TO_DO}.\n")
            return 1 if in_ci else 0
        if is_missing and go is not None:
            say(f"Building {module.program} from Go modules (once; about {duration} on two quiet cores)\n")
            sys.stdout.flush()
            start = time.monotonic()
            module.build(go)
            say(f"built in {time.monotonic() - start:.0f} s\n")
    return _get_what_is_missing(in_ci) if "node" in words else 0


def _get_what_is_missing(in_ci: bool) -> int:
    """Lay out Debian's packages; in CI install those as well that cannot be laid out. A person is told how to."""
    there = of_debian()
    lacking = [package for package, programs in DEBIAN.items() if {*programs} - {*there}]
    builders = [program for program in BUILDERS if shutil.which(program) is None]
    if not (lacking or builders):
        return 0
    sys.stdout.write(f"Getting Debian's {', '.join([*lacking, *builders])}\n")
    sys.stdout.flush()
    try:
        subprocess.run(["apt-get", "-q", "update"], check=True)
        if lacking:
            lay_out(lacking)
        install = ["apt-get", "-q", "install", "-y", "--no-install-recommends", *builders]
        if builders and in_ci:
            subprocess.run(install, check=True)
        elif builders:
            sys.stdout.write(f"Tests with our images are left out; `{' '.join(install)}` installs what they need.\n")
    except (OSError, subprocess.CalledProcessError) as error:
        wanted = ", ".join([*lacking, *builders])
        sys.stderr.write(f"{error}\nA whole node needs Debian's {wanted}: install them.\n")
        return 1 if in_ci else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

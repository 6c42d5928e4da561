"""The programs of Kubernetes for tests: those that this machine has, or one program built once from `server`.

What is taken, in this order:

1. `etcd`, `kube-apiserver`, `kube-controller-manager` and `kubectl` in the folder that KUBEBUILDER_ASSETS names or on
   the PATH, when all four are there;
2. the program built from `server`, a Go module that holds all of Kubernetes. It is kept outside the clone under the
   hash of what decides it. Building takes about 7 minutes on two quiet cores (12 CPU minutes, 8 GB of Go's caches), so
   a test never builds it: `python tests/kube/kubernetes_binaries.py` does, and `make test-kube` calls that.

Helm is built likewise, in 2 to 3 minutes; KubeRay's definitions are files of its Go module.

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
import time
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
    links: tuple[str, ...] = ()
    """Names by which the program is called to be one of its parts."""

    stamps: str = ""
    """Module of which the program is told the version; unset, a server calls itself v0.0.0."""

    @property
    def place(self) -> Path:
        return HERE / self.folder

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
        return ["-trimpath", "-buildvcs=false", "-ldflags", " ".join(["-s", "-w", *said])]

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
            part = folder / f"{self.program}.part"
            words = [go, "build", *self.flags(), "-o", str(part), self.package]
            subprocess.run(words, cwd=self.place, env=environment, check=True)
            for link in self.links:
                (folder / link).unlink(missing_ok=True)
                (folder / link).symlink_to(self.program)
            part.rename(folder / self.program)


KUBERNETES = Module(
    folder="server",
    package=".",
    program="kube",
    links=(*CONTROL_PLANE, "kube-scheduler", "kubelet", "kube-proxy"),
    stamps="k8s.io/kubernetes",
)
HELM = Module(folder="helm", package="helm.sh/helm/v4/cmd/helm", program="helm")


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


def main() -> int:
    """Build what is missing and say where it is; without Go, say what to do (in CI that is a failure)."""
    say = sys.stdout.write
    if os.environ.get(EXISTING):
        say(f"The tests use the cluster of {os.environ[EXISTING]}\n")
        return 0
    go = shutil.which("go")
    wanted = [(KUBERNETES, "7 minutes", present() is None), (HELM, "3 minutes", present_helm() is None)]
    for module, duration, is_missing in wanted:
        if is_missing and go is None:
            sys.stderr.write(f"Go is not on the PATH. The tests need {WHAT_TO_DO}.\n")
            return 1 if os.environ.get("CI") == "true" else 0
        if is_missing and go is not None:
            say(f"Building {module.program} from Go modules (once; about {duration} on two quiet cores)\n")
            sys.stdout.flush()
            start = time.monotonic()
            module.build(go)
            say(f"built in {time.monotonic() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

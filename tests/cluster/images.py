"""The chart's images, built from their Containerfiles without a registry, as archives that containerd takes in.

Debian's `buildah` builds them without a daemon. The base that the Containerfiles name lies in a registry; here
`mmdebstrap` makes one like it from Debian's packages. What was built is kept outside the clone, layer by layer, so that
only what changed is built again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEPT = Path("~/.cache/fastserve/images").expanduser()
TOOLS = ("buildah", "mmdebstrap")
HOW = "`apt-get install --no-install-recommends buildah mmdebstrap` installs them"
VERSION = "0.1.0"
SITE_PACKAGES = "/opt/site-packages"
"""Where Ray's pods expect the packages of this machine's environment."""

PACKAGES = ("ca-certificates", "passwd", "python3-venv")
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
"""As in the base that the Containerfiles name."""

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
"""What this machine trusts; packages may come to it through a mirror with a certificate of its own."""


@dataclass(frozen=True)
class Image:
    """An image in an archive for `ctr images import`, under its name and its name by digest."""

    name: str
    digest: str
    archive: Path

    @property
    def repository(self) -> str:
        """Its name without the tag."""
        return self.name.rpartition(":")[0]


def lacks() -> str | None:
    """What this machine lacks to build images, in words; None when it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)}: {HOW}"
    if os.geteuid() != 0:
        return "needs root, to build images"
    return None


def operator_image(folder: Path) -> Image:
    """The image of operator and gateway, whole. folder: where its archive goes."""
    with _building():
        _build_operator()
        return _exported("localhost/fastserve", "docker.io/library/fastserve", folder)


def ray_image(folder: Path) -> Image:
    """The image of Ray's machines; this machine's `.venv/lib/python3.11/site-packages` is mounted at SITE_PACKAGES."""
    with _building():
        _build_operator()
        base = _base()
        words = ("--build-arg", f"BASE={base}", "--target", "system")
        _build("localhost/ray-system", ROOT / "deployments/images/ray/Containerfile", ROOT, *words)
        words = ("--build-arg", "SYSTEM=localhost/ray-system", "--build-arg", "PACKAGE=localhost/fastserve")
        here = ROOT / "tests/cluster/ray"
        _build("localhost/fastserve-ray", here / "Containerfile", here, *words)
        return _exported("localhost/fastserve-ray", "docker.io/library/fastserve-ray", folder)


def run_in(image: str, *words: str, user: str = "1000:1000", seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in an image that was built, as a user of it."""
    with _building():
        container = buildah("from", "--pull-never", image).strip()
    try:
        command = [*_BUILDAH, "run", "--isolation", "chroot", "--user", user, container, "--", *words]
        return subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=seconds)
    finally:
        buildah("rm", container)


def buildah(*words: str, seconds: float = 900) -> str:
    """What buildah prints, on a storage of our own. Raise AssertionError with all that it said when it fails."""
    done = subprocess.run([*_BUILDAH, *words], env=_environment(), capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"buildah {' '.join(words)}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


_BUILDAH = ("buildah", "--root", str(KEPT / "storage"), "--runroot", str(KEPT / "run"), "--storage-driver", "overlay")


def _environment() -> dict[str, str]:
    (KEPT / "tmp").mkdir(parents=True, exist_ok=True)
    return {**os.environ, "TMPDIR": str(KEPT / "tmp")}


@contextmanager
def _building() -> Iterator[None]:
    """One at a time: two builds of the same layer would both do it."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _build_operator() -> None:
    file = ROOT / "deployments/images/operator/Containerfile"
    _build("localhost/fastserve", file, ROOT, "--build-arg", f"BASE={_base()}")


def _build(tag: str, file: Path, context: Path, *words: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "pip.conf"
        settings.write_text("[global]\ncert = /run/certificates.pem\nretries = 5\n")
        secrets = {"pip": settings, "certificates": CERTIFICATES}
        given = [word for key, path in secrets.items() for word in ("--secret", f"id={key},src={path}")]
        how = (
            "--isolation",
            "chroot",
            "--network",
            "host",
            "--layers",
            "--force-rm",
            "--pull-never",
            "--format",
            "oci",
        )
        buildah("build", *how, *given, *words, "--file", str(file), "--tag", tag, str(context), seconds=1500)


def _base() -> str:
    """Debian with Python, named like the one in the registry by what the Containerfiles need of it."""
    sources = _sources()
    recipe = hashlib.sha256("\n".join([*sources, *PACKAGES, *LEFT_OUT, PATH]).encode()).hexdigest()[:16]
    tag = f"localhost/base:{recipe}"
    if tag in buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        return tag
    with tempfile.TemporaryDirectory(dir=_environment()["TMPDIR"]) as name:
        folder = Path(name)
        words = ["mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", f"--include={','.join(PACKAGES)}"]
        words += [f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT]
        words += ["--aptopt=Acquire::Retries 5", "--aptopt=Acquire::http::Timeout 20"]
        words += ["--customize-hook=ln -s /usr/bin/python3 $1/usr/local/bin/python"]
        words += [_codename(), str(folder / "root.tar"), *sources]
        done = subprocess.run(words, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, f"mmdebstrap made no base:\n{done.stderr[-4000:]}"
        (folder / "Containerfile").write_text(f'FROM scratch\nADD root.tar /\nENV PATH={PATH}\nCMD ["python"]\n')
        _build(tag, folder / "Containerfile", folder)
    return tag


def _sources() -> list[str]:
    """Where this machine has Debian's packages from, in the words of sources.list."""
    form = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    words = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300).stdout
    pattern = re.compile(rf"^deb \S+ {re.escape(_codename())}\S* main$", re.MULTILINE)
    return pattern.findall(said)


def _codename() -> str:
    found = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    return found.group(1) if found else ""


def _exported(tag: str, repository: str, folder: Path) -> Image:
    """Write an image's archive. containerd knows an image by a note in its index."""
    name = f"{repository}:{VERSION}"
    archive = folder / f"{repository.rpartition('/')[2]}.tar"
    with tempfile.TemporaryDirectory(dir=_environment()["TMPDIR"]) as temporary:
        layout = Path(temporary) / "layout"
        buildah("push", "--disable-compression", tag, f"oci:{layout}:{VERSION}")
        index = json.loads((layout / "index.json").read_text())
        (listed,) = index["manifests"]
        names = (name, f"{repository}@{listed['digest']}")
        index["manifests"] = [{**listed, "annotations": {"io.containerd.image.name": each}} for each in names]
        (layout / "index.json").write_text(json.dumps(index))
        with tarfile.open(archive, "w") as tar:
            for path in sorted(layout.rglob("*"), reverse=True):  # oci-layout and the index before the blobs
                if path.is_file():
                    tar.add(path, str(path.relative_to(layout)))
    return Image(name, listed["digest"], archive)

"""A machine of a cluster: containerd, kubelet and kube-proxy, and on the first one the control plane as well.

All of it is real. What a node would change on the whole machine it changes in namespaces of its own; its cgroups and
its folder are taken away when it stops, or by the next start when nobody could.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from component import containerd, control_plane, kube_proxy, kubelet, policies
from kubernetes_binaries import Binaries, downloads, libraries
from network import Place

CGROUPS = Path("/sys/fs/cgroup")
FOLDER = "fs-node-"
"""How the folders and cgroups of all nodes begin."""

START_SECONDS = 180
STOP_SECONDS = 60
FOR_CONTAINERS = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd")


class NotUp(RuntimeError):
    """A node did not come up; the message holds the end of its logs."""


@dataclass
class Node:
    """One machine. `folder` is its own; `shared` holds the certificates of the cluster."""

    place: Place
    binaries: Binaries
    folder: Path
    shared: Path
    pid: int = 0
    """Its process 1, as the tests see it."""

    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def socket(self) -> Path:
        """Where containerd answers."""
        return self.folder / "containerd.sock"

    @property
    def cgroup(self) -> str:
        """Below every controller."""
        return f"/{self.shared.name}/{self.place.name}"

    def start(self, lay_network: Callable[[int], None], api: str) -> None:
        """Start all parts; `lay_network` is told the process whose network is to be laid. Returns before the node is
        ready."""
        for name in ("logs", "cni", "kubelet"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _make_cgroup(self.shared.name, self.place.name)
        steps = control_plane(self.binaries, self.shared, self.place) if self.place.number == 0 else []
        node = (self.binaries, self.folder, self.shared, self.place)
        enforcing = policies(self.binaries, self.shared, self.place)
        steps += [containerd(*node), enforcing, kubelet(*node, self.cgroup, api), kube_proxy(*node)]
        search = [str(downloads() / "usr/sbin"), str(Path(self.binaries["containerd"]).parent), "/usr/sbin", "/sbin"]
        environment = {
            "PATH": ":".join([*search, os.environ["PATH"]]),
            "HOME": str(self.folder),
            "LD_LIBRARY_PATH": libraries(),
        }
        orders = {"steps": steps, "logs": str(self.folder / "logs"), "environment": environment}
        (self.folder / "orders.json").write_text(json.dumps(orders))
        self._process = self._born()
        self.pid = self._find_process_one()
        (self.folder / "pid").write_text(str(self.pid))
        lay_network(self.pid)
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def _born(self) -> subprocess.Popen[bytes]:
        words = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--propagation", "private"]
        script = Path(__file__).with_name("process_one.py")
        with open(self.folder / "logs/process-1.log", "ab") as log:
            return subprocess.Popen(
                [*words, "--kill-child", sys.executable, "-IS", str(script), str(self.folder / "orders.json")],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _find_process_one(self) -> int:
        assert self._process is not None
        found: list[psutil.Process] = []

        def is_born() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                found[:] = psutil.Process(self._process.pid).children()  # type: ignore[union-attr]
            return bool(found)

        self.until(is_born, "process 1 runs")
        return found[0].pid

    def until(self, true: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Wait; when it does not become true, or the node ends meanwhile, say why."""
        end = time.monotonic() + seconds
        while not true():
            if not self.is_up() or time.monotonic() > end:
                raise NotUp(f"{self.place.name}: not seen that {what}\n{self.said()}")
            time.sleep(0.1)

    def is_up(self) -> bool:
        """Whether its process 1 runs."""
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        """The end of each log."""
        logs = sorted((self.folder / "logs").glob("*.log"))
        return "\n".join(f"--- {log.stem}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def stop(self) -> None:
        """As if somebody pulled its plug: everything of it ends at once. Its cgroups and data go too."""
        if self._process is not None:
            self._process.kill()  # --kill-child ends process 1, and the kernel all others
            self._process.wait(STOP_SECONDS)
            _await_end(self.pid)
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = None
        end = time.monotonic() + STOP_SECONDS
        while not _remove_cgroups(f"{self.shared.name}/{self.place.name}"):
            if time.monotonic() > end:
                raise NotUp(f"{self.place.name}: processes of its containers do not end")
            time.sleep(0.1)

    def ctr(self, *words: str) -> str:
        """Run containerd's own command in the node."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid"]
        command = [self.binaries["ctr"], "--address", str(self.socket), "--namespace", "k8s.io", *words]
        done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise NotUp(f"ctr {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def bring(self, image: Path) -> None:
        """Import an image from a file."""
        self.ctr("images", "import", "--local", str(image))


@contextlib.contextmanager
def folder_of_a_cluster() -> Iterator[Path]:
    """A folder for one cluster, locked while it lives; what clusters left that were killed is taken away first."""
    with contextlib.ExitStack() as stack:
        with open(Path(tempfile.gettempdir(), "fs-nodes.lock"), "w") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            take_away_leftovers()
            folder = Path(tempfile.mkdtemp(prefix=FOLDER))
            fcntl.flock(stack.enter_context(open(folder / "lock", "w")), fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            _remove_cgroups(folder.name)
            shutil.rmtree(folder)


def take_away_leftovers() -> None:
    """Folders and cgroups of clusters whose tests were killed. Those that still live hold their lock."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError), open(folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_cgroups(folder.name)
            shutil.rmtree(folder)
    for controller in CGROUPS.glob(f"*/{FOLDER}*"):
        if not (Path(tempfile.gettempdir()) / controller.name).exists():
            _remove_cgroups(controller.name)


def _await_end(pid: int) -> None:
    """Wait for a process 1; the kernel lets it go after all others of its namespace."""
    end = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(psutil.NoSuchProcess):
        while pid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > end:
                raise NotUp(f"process {pid} does not end")
            time.sleep(0.05)


def leftovers(name: str) -> list[str]:
    """What is still there of a cluster that has stopped, by the name of its folder."""
    found = [str(place) for place in CGROUPS.glob(f"*/{name}")]
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if name in line]
    found += [str(place) for place in Path(tempfile.gettempdir()).glob(name)]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(name in word for word in process.cmdline()):
                found.append(f"process {process.pid}: {' '.join(process.cmdline())[:200]}")
    return found


def _make_cgroup(cluster: str, node: str) -> None:
    for controller in FOR_CONTAINERS:
        top = CGROUPS / controller
        if not top.is_dir():
            continue
        for folder in (top / cluster, top / cluster / node):
            folder.mkdir(exist_ok=True)
            if controller == "cpuset":  # empty until somebody says so, and then nothing may run in it
                for name in ("cpuset.cpus", "cpuset.mems"):
                    (folder / name).write_text((top / name).read_text())


def _remove_cgroups(name: str) -> bool:
    """Whether all of them are gone; one with a process in it stays."""
    for top in CGROUPS.glob(f"*/{name}"):
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
    return not any(CGROUPS.glob(f"*/{name}"))

"""S3 servers on loopback: moto in this process, and versitygw, a real one, built from its Go module.

The binary is kept outside the clone under the hash of what decides it, so it is built once a machine (about a minute).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.cluster.processes import free_port

HERE = Path(__file__).parent
MODULE = "github.com/versity/versitygw/cmd/versitygw"


@dataclass(frozen=True)
class S3Server:
    """Where a server listens and who may use it."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> str:
        """Make a bucket; returns a store's address in it."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=name)
        client.close()
        return f"s3://{name}/some/prefix?endpoint={self.endpoint}"


def build_versitygw(go: str) -> Path:
    """The binary for go.mod and go.sum beside this file, from the cache or newly built."""
    version = subprocess.run([go, "env", "GOVERSION"], check=True, capture_output=True, text=True).stdout
    content = (HERE / "go.mod").read_bytes() + (HERE / "go.sum").read_bytes() + version.encode()
    folder = Path("~/.cache/fastserve/bin").expanduser() / hashlib.sha256(content).hexdigest()[:24]
    binary = folder / "versitygw"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            part = folder / "versitygw.part"
            subprocess.run([go, "build", "-trimpath", "-buildvcs=false", "-o", part, MODULE], cwd=HERE, check=True)
            part.rename(binary)
    return binary


@contextlib.contextmanager
def versitygw(binary: Path, root: Path, log: Path) -> Iterator[S3Server]:
    """The gateway over the folder `root`, on a free port of loopback; ends with the block."""
    server = S3Server(f"http://127.0.0.1:{free_port()}", secrets.token_hex(8), secrets.token_hex(16))
    address = server.endpoint.removeprefix("http://")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(root),
        "ROOT_ACCESS_KEY": server.access_key,
        "ROOT_SECRET_KEY": server.secret_key,
    }
    root.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [binary, "--port", address, "posix", root],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for_port(address, process, log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def moto_server(around: Callable[[Any], Any] = lambda application: application) -> Iterator[S3Server]:
    """moto's S3 in this process. around: wraps the WSGI application, to make a server that lacks something."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object, **__: object) -> None: ...

    application = around(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield S3Server(f"http://127.0.0.1:{server.server_port}", secrets.token_hex(8), secrets.token_hex(16))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wait_for_port(address: str, process: subprocess.Popen[bytes], log: Path, limit_seconds: float = 120) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"no server at {address}: {log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def tiny_disk(folder: Path, size: str = "2m") -> Iterator[Path]:
    """A tmpfs of that size, mounted on `folder`; needs root. Raises RuntimeError where it cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        raise RuntimeError("needs root, to mount a small tmpfs")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cannot mount a small tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)

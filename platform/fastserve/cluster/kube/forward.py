"""A port of a Service on this machine's loopback, by `kubectl port-forward`.

kubectl knows every way to sign in, and its stream goes through the kubelet: it works under NetworkPolicies that keep
the API server's own proxy out, and it leaves the Authorization header alone, which that proxy takes away.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

from fastserve.cluster.kube.config import Reached
from fastserve.errors import ClusterFailed, UsageInvalid

OPEN_SECONDS = 30.0
END_SECONDS = 5.0
FORWARDING = re.compile(rb"Forwarding from 127\.0\.0\.1:(\d+) ")


@contextlib.contextmanager
def forwarded(reached: Reached, service: str, port: int) -> Iterator[str]:
    """`http://127.0.0.1:N`, which leads to a port of a Service while the block runs.

    Raises UsageInvalid without kubectl, ClusterFailed with kubectl's own words when it cannot.
    """
    program = shutil.which("kubectl")
    words = [*reached.kubectl_flags, "port-forward", f"service/{service}"]
    by_hand = f"`{' '.join(['kubectl', *words, str(port)])}`"
    if program is None:
        raise UsageInvalid(f"kubectl is not on PATH, and {by_hand} is what leads there; install it")
    environment = {**os.environ, **_kubeconfig(reached)}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [program, *words, f":{port}", "--address=127.0.0.1"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
        )
        try:
            opened = _opened(process)
            if opened is None:
                said.seek(0)
                told = said.read().decode(errors="replace").strip().removeprefix("error: ")
                cause = told.splitlines()[-1] if told else f"it says nothing for {OPEN_SECONDS:.0f}s"
                raise ClusterFailed(f"{by_hand} does not get through: {cause}")
            yield f"http://127.0.0.1:{opened}"
        finally:
            _end(process)


def _opened(process: subprocess.Popen[bytes]) -> int | None:
    """The port that it says; None when it ends or keeps silent."""
    pipe: IO[bytes] | None = process.stdout
    if pipe is None:
        return None
    end, told = time.monotonic() + OPEN_SECONDS, b""
    while (left := end - time.monotonic()) > 0:
        ready, _, _ = select.select([pipe], [], [], left)
        piece = os.read(pipe.fileno(), 4096) if ready else b""
        told += piece
        found = FORWARDING.search(told)
        if found is not None:
            return int(found[1])
        if ready and not piece:
            process.wait(END_SECONDS)
            return None
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _kubeconfig(reached: Reached) -> dict[str, str]:
    """The files that were read; a pod has none."""
    if reached.kubeconfig is None:
        return {}
    files: Sequence[str] = [os.path.expanduser(name) for name in reached.kubeconfig.split(os.pathsep)]
    return {"KUBECONFIG": os.pathsep.join(files)}

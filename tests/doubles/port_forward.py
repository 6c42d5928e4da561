"""kubectl's `port-forward` without a kubelet: a program that forwards to an address that a test gives it.

`install(folder, targets)` writes a `kubectl` into a folder for PATH. What it is asked for besides `port-forward`, the
real one does, where there is one.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, targets: Mapping[str, int], real: str | None = None) -> Path:
    """Make the program. targets: port on loopback by `SERVICE:PORT`. real: path of the real kubectl."""
    folder.mkdir(exist_ok=True)
    program = folder / "kubectl"
    settings = json.dumps({"targets": dict(targets), "real": real, "log": str(folder / "asked.jsonl")})
    program.write_text(
        f"#!{sys.executable} -I\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import port_forward\nport_forward.main(sys.argv[1:], {settings!r})\n"
    )
    program.chmod(0o755)
    return program


def asked(folder: Path) -> list[list[str]]:
    """The command lines so far."""
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


def main(words: list[str], text: str) -> None:
    """Be kubectl."""
    settings = json.loads(text)
    with open(settings["log"], "a") as log:
        log.write(json.dumps(words) + "\n")
    if "port-forward" not in words:
        os.execv(settings["real"], ["kubectl", *words])
    service = next(word.removeprefix("service/") for word in words if word.startswith("service/"))
    port = next(word[1:] for word in words if re.fullmatch(r":\d+", word))
    target = settings["targets"].get(f"{service}:{port}")
    if target is None:
        sys.exit(f'Error from server (NotFound): services "{service}" not found')
    with socket.create_server(("127.0.0.1", 0)) as server:
        sys.stdout.write(f"Forwarding from 127.0.0.1:{server.getsockname()[1]} -> {port}\n")
        sys.stdout.flush()
        while True:
            client, _ = server.accept()
            there = socket.create_connection(("127.0.0.1", target))
            for one, other in ((client, there), (there, client)):
                threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(one: socket.socket, other: socket.socket) -> None:
    try:
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
    except OSError:
        return

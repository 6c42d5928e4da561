"""Process 1 of a node: it makes the machine's own folders private, starts what it is told to, and reaps.

It runs in network, mount and PID namespaces of its own, so whatever it starts ends with it and takes its mounts along.
Its orders are a JSON file; it starts them when a line comes on its standard input, and ends when that input ends: its
owner is gone then. It imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PRIVATE = ("/run", "/var/lib", "/var/log")
"""Folders that a node writes to under fixed names; each is a memory file system here."""

KERNEL = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""Settings of the whole machine that a kubelet changes; here it changes a file that lies over each of them."""

READY_SECONDS = 120


def main(orders: dict[str, Any]) -> None:
    _make_private()
    sys.stdin.readline()
    threading.Thread(target=_end_with_owner, daemon=True).start()
    started: dict[int, str] = {}
    for step in orders["steps"]:
        with open(Path(orders["logs"]) / f"{step['name']}.log", "ab") as log:
            process = subprocess.Popen(
                step["words"], env=orders["environment"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        started[process.pid] = step["name"]
        _await(step.get("ready"))
    while True:
        pid, status = os.wait()  # of orphans too: this is their process 1
        if pid in started:
            sys.stdout.write(f"{started[pid]} ended with {os.waitstatus_to_exitcode(status)}\n")
            sys.stdout.flush()
            os._exit(1)


def _make_private() -> None:
    kept = [(Path("/proc/sys") / name, (Path("/proc/sys") / name).read_text()) for name in KERNEL]
    for folder in PRIVATE:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder], check=True)
    for name in ("netns", "lock", "kernel"):
        Path("/run", name).mkdir()
    for number, (place, value) in enumerate(kept):
        copy = Path("/run/kernel", str(number))
        copy.write_text(value)
        subprocess.run(["mount", "--bind", str(copy), str(place)], check=True)
    subprocess.run(["mount", "--make-rshared", "/"], check=True)  # pods see what is mounted for them


def _end_with_owner() -> None:
    while sys.stdin.readline():
        pass
    os._exit(0)


def _await(path: str | None) -> None:
    end = time.monotonic() + READY_SECONDS
    while path is not None and not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.05)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

"""Tends a home in the background after `fastserve up --detach`: the laptop's operator.

It beats until it is told to stop. SIGTERM ends the tending and leaves what serves alone, so that another `fastserve
up` can take over; `fastserve down` ends what serves too.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

import psutil

from fastserve.cluster.home import Home
from fastserve.cluster.local import LocalCluster
from fastserve.cluster.processes import clean_environment
from fastserve.errors import ClusterFailed, FastServeError

BEAT_SECONDS = 2.0

START_SECONDS = 60.0
"""One second is usual; the rest is for a machine that is busy."""

log = logging.getLogger("fastserve.tender")


def main() -> int:
    """Beat until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", required=True)
    home = Home(parser.parse_args().home)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    with home.tended(detached=True):
        cluster = LocalCluster(home, say=log.info)
        said: dict[str, str] = {}
        while not stop.is_set():
            try:
                for beat in cluster.beat():
                    because = "; ".join(move.because for move in beat.moves)
                    if said.get(beat.model.name) != because:
                        said[beat.model.name] = because
                        log.info("%s: %s", beat.model.name, because)
            except FastServeError as error:
                log.error("%s: %s", error.reason, error)
            stop.wait(BEAT_SECONDS)
    return 0


def spawn(home: Home) -> int:
    """Start a tender in the background and wait until it owns the home; returns its process id."""
    with open(home.path / "logs" / "tender.log", "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastserve.cluster.tender", "--home", str(home.path)],
            env=clean_environment({"FASTSERVE_HOME_ID": home.id}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=home.path,
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        owner = home.tender()
        if owner is not None and owner["pid"] == process.pid:
            return process.pid
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise ClusterFailed(f"the background process did not start; see {home.path / 'logs' / 'tender.log'}")


def dismiss(home: Home) -> bool:
    """Tell a detached tender to stop tending, and wait until it has. False when there was none."""
    owner = home.tender()
    if owner is None or not owner["detached"] or owner["pid"] in (0, os.getpid()):
        return False
    try:
        process = psutil.Process(owner["pid"])
        process.terminate()
        process.wait(20)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(10)
    return True


if __name__ == "__main__":
    sys.exit(main())

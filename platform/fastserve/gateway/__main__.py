"""`python -m fastserve.gateway --config FILE`: one light process that stands while engines come and go."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import logging
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from aiohttp import web

from fastserve.errors import ClusterFailed, FastServeError, PortInUse, UsageInvalid
from fastserve.gateway.app import Gateway
from fastserve.gateway.config import Config, read

LOOK_SECONDS = 0.3
WAITING = Config(host="0.0.0.0", port=8100, admin_port=8101)
"""Where a gateway listens whose config is still to come: as on a cluster, in a pod's own network."""

log = logging.getLogger("fastserve.gateway")


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fastserve.gateway", description=__doc__)
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="JSON file, read again when it changes"
    )
    parser.add_argument(
        "--orders-sha256",
        type=Path,
        metavar="FILE",
        help="file with the SHA-256 of the token for orders: with it, a config that is not there yet is waited for "
        f"(on {WAITING.host}, ports {WAITING.port} and {WAITING.admin_port}), or comes over the admin port",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        metavar="SECONDS",
        help="how long running streams may go on after SIGTERM; by default what the config says",
    )
    options = parser.parse_args(arguments)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        uvloop.run(serve(options.config, options.orders_sha256, options.drain_seconds))
    except FastServeError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


async def serve(path: Path, orders_sha256: Path | None = None, drain_seconds: float | None = None) -> None:
    """Run the gateway with the config in `path` until a signal. Raises PortInUse, ClusterFailed, UsageInvalid.

    orders_sha256: file with the SHA-256 of the token for orders; with it, the config may come later. drain_seconds: how
    long running streams may go on after the signal; None: as the config says then.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    seen = _stamp(path)
    waits = seen is None and orders_sha256 is not None
    config = waiting(orders_sha256) if orders_sha256 is not None and waits else read(path)
    gateway = Gateway(config, waits=waits)
    runner = web.ServerRunner(gateway.server)
    admin = web.ServerRunner(gateway.admin.server)
    await runner.setup()
    await admin.setup()
    try:
        if config.admin_port:
            await _listen(admin, config.host, config.admin_port, "adminPort in the config")
        await _listen(runner, config.host, config.port, "--port")
        log.info("listening", extra={"fields": {"address": f"http://{config.host}:{runner.addresses[0][1]}"}})
        watcher = asyncio.create_task(watch(gateway, path, seen))
        await stop.wait()
        log.info("stopping")
        watcher.cancel()
        for site in list(runner.sites):
            await site.stop()
        gateway.server.pre_shutdown()  # idle connections close now, busy ones after their answer
    finally:
        await gateway.close(gateway.config.drain_seconds if drain_seconds is None else drain_seconds)
        await runner.cleanup()
        await admin.cleanup()
    log.info("stopped")


def waiting(orders_sha256: Path) -> Config:
    """What a gateway begins with whose orders are still to come: nobody may ask, and nothing is routed."""
    with contextlib.suppress(OSError, UnicodeError):
        found = orders_sha256.read_text(encoding="utf-8").strip()
        if re.fullmatch("[0-9a-f]{64}", found):
            return replace(WAITING, orders_sha256=found)
        log.error("%s holds no SHA-256 of 64 hex digits; orders are waited for in the file alone", orders_sha256)
    return WAITING


async def watch(gateway: Gateway, path: Path, seen: object) -> None:
    """Look at the config file for ever; take it when it has changed and is right, else keep the old one and say so."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        now = _stamp(path)
        if now == seen:
            continue
        seen = now
        try:
            config = read(path)
        except UsageInvalid as error:
            log.error("config not taken, the old one stays in force: %s", error)
            continue
        if not gateway.take(config):
            log.info("config not taken: newer orders were sent", extra={"fields": {"serial": config.serial}})


async def _listen(runner: web.ServerRunner, host: str, port: int, option: str) -> None:
    site = web.TCPSite(runner, host, port, backlog=1024)
    try:
        await site.start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} on {host} is in use; stop what listens there or choose another with {option}"
            ) from error
        raise ClusterFailed(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _stamp(path: Path) -> object:
    """What changes when the file does; None while it is not there."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return None


if __name__ == "__main__":
    sys.exit(main())

"""Keeps a replica's own ports on loopback.

Serve opens a second server in every replica, for calls between deployments. It binds all interfaces, asks for no token
and unpickles what it is sent, so whoever reaches it runs code here. No request of ours takes that way.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private import replica

from fastserve.errors import EngineFailed

LOOPBACK = "127.0.0.1"


def keep_on_loopback() -> None:
    """Make this process's replica bind that server to loopback; to be called before the replica is ready.

    Raises EngineFailed when this Ray opens it in another way: better no replica than an open one.
    """
    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is None:
        raise EngineFailed("this release of Ray opens a replica's ports in an unknown way; use the pinned ray==2.60.0")

    def bind_on_loopback(server: Any, address: str) -> int:
        port: int = bind(server, f"{LOOPBACK}:{address.rpartition(':')[2]}")
        return port

    replica.add_port_to_grpc_server = bind_on_loopback

"""What Ray calls inside `ray start` (RAY_START_HOOK) before it starts anything; a module of its own, to stay light."""

from __future__ import annotations

from typing import Any


def leave_out_client(ray_params: Any, head: bool) -> None:
    """Start no Ray Client server: nobody connects to a home's head that way, and no flag of `ray start` says so.

    ray_params: Ray's own `RayParams`, changed in place. head: whether a head is about to start.
    """
    if head:
        ray_params.ray_client_server_port = None

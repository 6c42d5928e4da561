"""Engines that the gateway reaches past Serve's proxy: each ready replica of a head says where its engine answers.

Serve's proxy costs more than the rest of the way together (decision 0009), so it carries only what no engine could
take yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fastserve.cluster.ray_serve import AppStatus

ENGINES = "engines"
"""Folder below a head's scratch folder: warm processes, and a file for each replica that is ready."""

ENGINES_VARIABLE = "FASTSERVE_ENGINES"
"""Tells replicas that folder (`stages.serve.warm.FOLDER_VARIABLE`)."""


def engine_urls(temp_dir: Path) -> dict[str, str]:
    """Where engines answer, by the id of their replica; a replica that died may still stand there."""
    found = {}
    for path in (temp_dir / ENGINES).glob("*.json"):
        try:
            found[path.stem] = str(json.loads(path.read_text())["url"])
        except (OSError, ValueError, KeyError):
            continue  # just taken back
    return found


def engines_of(app: AppStatus, urls: Mapping[str, str]) -> list[str]:
    """Where the ready replicas of an application answer; empty unless all of them say so."""
    replicas = [replica for item in (app.deployments or {}).values() for replica in item.replicas]
    running = [replica.replica_id for replica in replicas if replica.state == "RUNNING"]
    return [urls[name] for name in running] if all(name in urls for name in running) else []

"""Puts the double of `clerk_app` in the place of vLLM; a module of its own, since that one imports Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
"""What Ray needs on its PYTHONPATH."""


def app(config: Mapping[str, Any], seconds: float, slots: int, most: int | None = None) -> dict[str, Any]:
    """A configuration that `cluster.ray_serve.app_for` made, with the double in the place of the engine.

    All else stays as it is: names, labels, bounds, policy, light settings. seconds: of one answer. slots: answers
    at the same time. most: requests let into a replica; as many as slots when left out.
    """
    (deployment,) = config["deployments"]
    deployment = {**deployment, "max_ongoing_requests": most or slots, "graceful_shutdown_timeout_s": 30}
    return {
        **config,
        "import_path": "clerk_app:build",
        "args": {"seconds": seconds, "slots": slots},
        "deployments": [deployment],
    }

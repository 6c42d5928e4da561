"""What Serve's controller calls ten times a second for each application: it asks `plan.scaling`, and notes the answer.

Serve 2.60 has a place for decisions in its status (`autoscaling_detail`) and never fills it. So they go into a small
file beside the controller's log, one for each application, which the head's REST API hands out like any log.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.errors import FastServeError
from fastserve.plan import scaling

FILE_PREFIX = "fastserve_scaling_"
"""Of the files beside the controller's log; the application's name and `.json` follow."""

KEPT_DECISIONS = 20
WRITE_SECONDS = 1.0
"""Between two writes while the number of replicas stays."""

log = logging.getLogger("ray.serve")


class Policy:
    """The autoscaling policy of one application, made anew by Serve with every light change."""

    def __init__(self, folder: str | None = None) -> None:
        """folder: for the file; the folder of the controller's own log when left out."""
        self._folder = Path(folder) if folder is not None else _log_folder()
        self._state = scaling.State()
        self._decisions: list[dict[str, Any]] = []
        self._wanted: int | None = None
        """What was decided last. From none, Serve starts a replica by itself as soon as somebody asks."""

        self._loaded = False
        self._written_at = 0.0

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas. ctx: Serve's AutoscalingContext. Serve applies the bounds once more."""
        path = self._folder / f"{FILE_PREFIX}{ctx.app_name}.json"
        self._load(path)
        look = snapshot(ctx)
        decision = scaling.decide(look, self._state)
        self._state = decision.state
        # The delays are the policy's own; Serve's would come on top of them.
        ctx.config = ctx.config.model_copy(
            update={"upscale_delay_s": 0.0, "downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}
        )
        if self._wanted == 0 < look.wanted:
            self._note(look.now, 0, look.wanted, "Requests came while there was no replica.")
        changed = decision.replicas != look.wanted
        if changed:
            self._note(look.now, look.wanted, decision.replicas, decision.because)
            log.info("%s: %d -> %d replicas. %s", ctx.app_name, look.wanted, decision.replicas, decision.because)
        self._wanted = decision.replicas
        if changed or look.now - self._written_at >= WRITE_SECONDS:
            self._written_at = look.now
            _write(path, self._story(ctx.app_name, look, decision))
        return decision.replicas, {}

    def _note(self, at: float, before: int, after: int, because: str) -> None:
        entry = {"at": at, "from": before, "to": after, "because": because}
        self._decisions = [*self._decisions, entry][-KEPT_DECISIONS:]

    def _story(self, app: str, look: scaling.Snapshot, decision: scaling.Decision) -> dict[str, Any]:
        return {
            "app": app,
            "at": look.now,
            "running": look.running,
            "wanted": decision.replicas,
            "asked": decision.asked,
            "requests": look.requests,
            "peakRequests": scaling.peak(decision.state),
            "slots": look.slots,
            "tokensPerSecond": decision.state.best_tokens_per_s,
            "because": decision.because,
            "decisions": self._decisions,
            "state": decision.state.to_json(),
        }

    def _load(self, path: Path) -> None:
        """Go on from what was noted before this object was made; without it the policy begins anew."""
        if self._loaded:
            return
        self._loaded = True
        try:
            story = json.loads(path.read_text())
            self._state = scaling.State.from_json(story["state"])
            self._decisions = list(story["decisions"])
            self._wanted = int(story["wanted"])
        except (OSError, ValueError, KeyError, TypeError):
            return


def snapshot(ctx: Any) -> scaling.Snapshot:
    """Plain values of Serve's AutoscalingContext.

    Requests are counted twice, by Serve and by the engines, and the larger number is taken: requests that wait for a
    replica are seen by Serve alone, those that reach an engine past Serve's proxy by the engine alone.
    """
    told = {name: list(values.values()) for name, values in (ctx.aggregated_metrics or {}).items()}
    in_engines = sum(told.get("running", ())) + sum(told.get("waiting", ()))
    target_ms = max(told.get("target_ttft_ms", ()), default=0.0)
    slots = [value for value in told.get("slots", ()) if value > 0]
    config = ctx.config
    to_zero = config.downscale_to_zero_delay_s
    return scaling.Snapshot(
        now=ctx.current_time,
        running=ctx.current_num_replicas,
        wanted=ctx.target_num_replicas,
        least=ctx.capacity_adjusted_min_replicas,
        most=ctx.capacity_adjusted_max_replicas,
        queue=config.get_target_ongoing_requests(),
        requests=max(float(ctx.total_num_requests), float(ctx.total_queued_requests or 0.0), in_engines),
        ttft_target_seconds=target_ms / 1000 if target_ms > 0 else None,
        ttft_seconds=max(told.get("ttft_ms", ()), default=0.0) / 1000,
        kv_use=max(told.get("kv_use", ()), default=0.0),
        tokens_per_s=tuple(told.get("tokens_per_s", ())),
        slots=min(slots, default=0.0),
        up_seconds=config.upscale_delay_s,
        down_seconds=config.downscale_delay_s,
        idle_seconds=config.downscale_delay_s if to_zero is None else to_zero,
    )


def _log_folder() -> Path:
    """Where Serve's controller logs. Raises FastServeError when this Ray tells it in another way."""
    try:
        from ray.serve._private.logging_utils import get_serve_logs_dir
    except ImportError as error:
        raise FastServeError("this release of Ray logs in an unknown way; use the pinned ray==2.60.0") from error
    return Path(get_serve_logs_dir())


def _write(path: Path, story: Mapping[str, Any]) -> None:
    """Replace the file whole. A full disk loses the story, never the decision."""
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(story))
        os.replace(part, path)
    except OSError as error:
        log.warning("cannot write %s: %s", path, error)

"""Revisions as Serve applications, through the Serve REST API: the very calls that work on a laptop and on a cluster.

A PUT names the complete list of applications; what it leaves out is drained and taken away. What decides the answers
goes into the builder's `args`, where any change replaces every replica. What may change lightly (how many replicas,
when to add one, how long to drain) goes under `deployments:`, where a change keeps the replicas that run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from fastserve.cluster.processes import LOOPBACK
from fastserve.cluster.ray_rest import RayRest
from fastserve.plan.engine import engine_args, engine_env
from fastserve.plan.facts import Hardware, ModelFacts
from fastserve.plan.memory import plan_cache
from fastserve.plan.revision import Revision
from fastserve.spec.serve import Replicas, Serve, Target

PUT_SECONDS = 180.0
"""The first PUT also starts Serve's controller, which takes long on a busy machine."""

DEPLOYMENT = "engine"
IMPORT_PATH = "fastserve.stages.serve.app:build"

DRAIN_MARGIN_SECONDS = 30.0
"""On top of the longest stream, so that a stream that began last still ends by itself."""

SPARE_SLOTS = 4
"""Requests let into a replica beyond the engine's slots: the next ones are at hand when a slot falls free, and
`/health` and `/metrics` get through. All others wait in Serve, where they survive a crash of the replica."""

QUEUED_ROUNDS = 8
"""Requests let into a replica whose scheduler chooses among them (priority, mlfq), in multiples of the engine's slots:
it can only choose among those that it sees. The excess dies with the replica, so the number is not higher than
needed."""

METRICS_SECONDS = 0.5
LOOK_BACK_SECONDS = 2.0
UPSCALE_SECONDS = 2.0
DOWNSCALE_SECONDS = 60.0
TO_ZERO_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica as Serve sees it."""

    pid: int | None
    state: str
    """STARTING, RUNNING, STOPPING, ..."""


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One deployment of an application."""

    status: str
    """UPDATING, HEALTHY, UNHEALTHY, UPSCALING, ..."""

    message: str
    replicas: tuple[ReplicaStatus, ...]


@dataclass(frozen=True, slots=True)
class AppStatus:
    """One application as Serve sees it."""

    name: str
    state: str
    """NOT_STARTED, DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED or DELETING."""

    message: str = ""
    """Why it stands so: our own error where a replica raised one, else what Serve says of it and of its deployments."""

    replicas: int = 0
    """Replicas that take requests."""

    deployments: Mapping[str, DeploymentStatus] | None = None

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Self:
        """From an answer of the Serve API."""
        deployments = {key: _deployment(item) for key, item in (value.get("deployments") or {}).items()}
        said = [
            value.get("message") or "",
            *(item.message for item in deployments.values() if item.status != "HEALTHY"),
        ]
        return cls(
            name=name,
            state=value["status"],
            message=_cause("\n".join(dict.fromkeys(text for text in said if text))),
            replicas=sum(replica.state == "RUNNING" for item in deployments.values() for replica in item.replicas),
            deployments=deployments,
        )


_OUR_ERROR = re.compile(r"^(?:ray\.exceptions\.RayTaskError\(\w+\): )?fastserve\.errors\.(\w+: .+)$", re.MULTILINE)


def _cause(said: str) -> str:
    """The error of ours that Serve quotes at the end of a traceback; the whole text when there is none."""
    errors: list[str] = _OUR_ERROR.findall(said)
    return errors[-1] if errors else said


def _deployment(value: Mapping[str, Any]) -> DeploymentStatus:
    replicas = tuple(ReplicaStatus(item.get("pid"), item["state"]) for item in value.get("replicas") or ())
    return DeploymentStatus(value["status"], value.get("message") or "", replicas)


class ServeApi:
    """The serving applications of one Ray head."""

    def __init__(self, dashboard_url: str, token: str) -> None:
        self._rest = RayRest(dashboard_url, token)

    def put(self, apps: Sequence[Mapping[str, Any]], http_port: int) -> None:
        """Make Serve have exactly these applications; it returns at once, `get` tells how they come along.

        http_port: of Serve's proxy on loopback; it cannot change while the head runs. Putting the same list twice
        changes nothing. Raises ClusterFailed when Serve refuses the list.
        """
        value = {
            "proxy_location": "HeadOnly",
            "http_options": {
                "host": LOOPBACK,
                "port": http_port,
                "keep_alive_timeout_s": 75,
                "request_timeout_s": None,
            },
            "logging_config": {"enable_access_log": False},
            "applications": list(apps),
        }
        response = self._rest.call("PUT", "/api/serve/applications/", value=value, answer_seconds=PUT_SECONDS)
        if not response.is_success:
            raise self._rest.failed(response, "put the serving applications")

    def get(self) -> dict[str, AppStatus]:
        """Every application by its name; empty before the first put."""
        response = self._rest.call("GET", "/api/serve/applications/", answer_seconds=60.0)
        if not response.is_success:
            raise self._rest.failed(response, "list the serving applications")
        found = response.json().get("applications") or {}
        return {name: AppStatus.from_json(name, value) for name, value in found.items()}


def app_name(model: str, digest: str) -> str:
    """Name of a revision's application."""
    return f"{model}-{digest[:8]}"


def route_prefix(model: str, digest: str) -> str:
    """Path under which a revision's application answers."""
    return f"/m/{model}/{digest[:8]}"


def app_for(
    revision: Revision, serve: Serve, store_uri: str, facts: ModelFacts, hardware: Hardware, cpus: float = 1
) -> dict[str, Any]:
    """The configuration of a revision's application.

    revision: decides the answers. serve: the section as the manifest has it now; only what may change lightly is taken
    from it. facts: of the artifact. hardware: of the machine that a replica runs on. cpus: logical CPUs that a replica
    holds. Raises ManifestInvalid for engine arguments that may not be there.
    """
    section = revision.section()
    return {
        "name": app_name(revision.model, revision.digest),
        "route_prefix": route_prefix(revision.model, revision.digest),
        "import_path": IMPORT_PATH,
        "args": {
            "revision": revision.to_json(),
            "store": store_uri,
            "argv": engine_args(revision, facts, hardware),
            "env": engine_env(revision, hardware),
        },
        "deployments": [
            {
                "name": DEPLOYMENT,
                **scale(serve.replicas, serve.target),
                "max_ongoing_requests": _most_at_once(section, facts, hardware),
                "graceful_shutdown_timeout_s": serve.stream_limit + DRAIN_MARGIN_SECONDS,
                "ray_actor_options": {
                    "num_cpus": cpus,
                    "num_gpus": (section.engine.tensor_parallel or 1) if hardware.accelerators else 0,
                },
            }
        ],
    }


def _most_at_once(section: Serve, facts: ModelFacts, hardware: Hardware) -> int:
    """Requests that Serve lets into a replica at the same time."""
    rounds = 1 if section.scheduler == "fcfs" else QUEUED_ROUNDS
    return rounds * plan_cache(facts, section, hardware).sequences + SPARE_SLOTS


def scale(replicas: Replicas, target: Target) -> dict[str, Any]:
    """How many replicas there may be and what to aim at, in Serve's words.

    A fixed number is written as bounds that meet: to Serve an application that begins or ceases to have such a block is
    new code (Ray 2.60, `get_app_code_version`), and it would replace every replica. Without `metrics_interval_s` Ray
    2.60 takes 10 s to notice load, whatever its documented variables say.
    """
    return {
        "num_replicas": "auto",
        "autoscaling_config": {
            "min_replicas": replicas.min,
            # A revision must come up once to be known good, also when nobody asks.
            "initial_replicas": max(1, replicas.min),
            "max_replicas": replicas.max,
            "target_ongoing_requests": target.queue,
            "metrics_interval_s": METRICS_SECONDS,
            "look_back_period_s": LOOK_BACK_SECONDS,
            "upscale_delay_s": UPSCALE_SECONDS,
            "downscale_delay_s": DOWNSCALE_SECONDS,
            "downscale_to_zero_delay_s": TO_ZERO_SECONDS,
        },
    }

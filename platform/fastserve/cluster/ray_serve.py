"""Revisions as Serve applications, through the Serve REST API: the very calls that work on a laptop and on a cluster.

A PUT names the complete list of applications; what it leaves out is drained and taken away. What decides the answers
goes into the builder's `args`, where any change replaces every replica. What may change lightly (how many replicas,
when to add one, how long to drain) goes under `deployments:`, where a change keeps the replicas that run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from fastserve.cluster.nodes import PROFILE_LABEL
from fastserve.cluster.processes import LOOPBACK
from fastserve.cluster.ray_rest import RayRest
from fastserve.errors import ClusterFailed
from fastserve.plan.engine import engine_args, engine_env
from fastserve.plan.facts import LOCAL, Hardware, ModelFacts
from fastserve.plan.memory import plan_cache
from fastserve.plan.placement import Bounds
from fastserve.plan.revision import Revision
from fastserve.plan.scaling import DOWNSCALE_SECONDS, UPSCALE_SECONDS
from fastserve.spec.serve import Serve

PUT_SECONDS = 180.0
"""The first PUT also starts Serve's controller, which takes long on a busy machine."""

DEPLOYMENT = "engine"
IMPORT_PATH = "fastserve.stages.serve.app:build"

SCALING_FILE = "fastserve_scaling_{app}.json"
"""Where `stages.serve.policy` notes what it decides, beside the log of Serve's controller."""

DRAIN_MARGIN_SECONDS = 30.0
"""On top of the longest stream, so that a stream that began last still ends by itself."""

SPARE_SLOTS = 4
"""Requests let into a replica beyond the engine's slots: the next ones are at hand when a slot falls free, and
`/health` and `/metrics` get through. All others wait in Serve, where they survive a crash of the replica."""

QUEUED_ROUNDS = 8
"""Requests let into a replica whose scheduler chooses among them (priority, mlfq), in multiples of the engine's slots:
it can only choose among those that it sees. The excess dies with the replica, so the number is not higher than
needed."""

SHARED_ROUNDS = 2
"""The same where a revision has several profiles: what waits in one replica cannot go to another."""

POLICY = "fastserve.stages.serve.policy:Policy"
"""Serve makes it once for each application. Whatever stands beside it is part of the code to Serve, and a change would
replace every replica: so it has no arguments, and reads its figures from the rest of the block."""

METRICS_SECONDS = 0.5
LOOK_BACK_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica as Serve sees it."""

    pid: int | None
    state: str
    """STARTING, RUNNING, STOPPING, ..."""

    replica_id: str = ""
    node: str | None = None
    """Node of the cluster that it is on; None while it waits for one."""

    started_at: float = 0.0
    """Unix seconds at which it was asked for."""


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One deployment of an application."""

    status: str
    """UPDATING, HEALTHY, UNHEALTHY, UPSCALING, ..."""

    message: str
    replicas: tuple[ReplicaStatus, ...]
    wanted: int = 0
    """Replicas there shall be, as the policy decided."""

    requests_each: int = 0
    """Requests that one replica takes at once."""


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
    wanted: int = 0
    """Replicas there shall be."""

    waiting_since: float | None = None
    """Unix seconds since when some replica has waited for a machine; None: all have one."""

    requests_each: int = 0
    """Requests that one replica takes at once."""

    deployed_at: float | None = None
    """Unix seconds at which it was last given another configuration."""

    config: Mapping[str, Any] | None = None
    """The configuration that it has, as it was put."""

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Self:
        """From an answer of the Serve API."""
        deployments = {key: _deployment(item) for key, item in (value.get("deployments") or {}).items()}
        said = [
            value.get("message") or "",
            *(item.message for item in deployments.values() if item.status != "HEALTHY"),
        ]
        replicas = [replica for item in deployments.values() for replica in item.replicas]
        waiting = [item.started_at for item in replicas if item.state == "STARTING" and item.node is None]
        if value["status"] == "DEPLOYING" and not replicas and value.get("last_deployed_time_s"):
            # Serve builds an application on a machine of its profile, and waits for one before it asks for replicas.
            waiting = [float(value["last_deployed_time_s"])]
        return cls(
            name=name,
            state=value["status"],
            message=_cause("\n".join(dict.fromkeys(text for text in said if text))),
            replicas=sum(replica.state == "RUNNING" for replica in replicas),
            deployments=deployments,
            wanted=sum(item.wanted for item in deployments.values()),
            waiting_since=min(waiting, default=None),
            requests_each=max((item.requests_each for item in deployments.values()), default=0),
            deployed_at=value.get("last_deployed_time_s"),
            config=value.get("deployed_app_config"),
        )


_OUR_ERROR = re.compile(r"^(?:ray\.exceptions\.RayTaskError\(\w+\): )?fastserve\.errors\.(\w+: .+)$", re.MULTILINE)


def _cause(said: str) -> str:
    """The error of ours that Serve quotes at the end of a traceback; the whole text when there is none."""
    errors: list[str] = _OUR_ERROR.findall(said)
    return errors[-1] if errors else said


def _deployment(value: Mapping[str, Any]) -> DeploymentStatus:
    replicas = tuple(
        ReplicaStatus(
            item.get("pid"),
            item["state"],
            item.get("replica_id") or "",
            item.get("node_id"),
            float(item.get("start_time_s") or 0.0),
        )
        for item in value.get("replicas") or ()
    )
    most = (value.get("deployment_config") or {}).get("max_ongoing_requests")
    return DeploymentStatus(
        value["status"],
        value.get("message") or "",
        replicas,
        wanted=int(value.get("target_num_replicas") or 0),
        requests_each=int(most or 0),
    )


class ServeApi:
    """The serving applications of one Ray head."""

    def __init__(self, dashboard_url: str, token: str) -> None:
        self._rest = RayRest(dashboard_url, token)
        self._controller: str | None = None

    def put(self, apps: Sequence[Mapping[str, Any]], http_port: int, host: str = LOOPBACK) -> None:
        """Make Serve have exactly these applications; it returns at once, `get` tells how they come along.

        http_port, host: of Serve's proxy; they cannot change while the head runs. Putting the same list twice
        changes nothing. Raises ClusterFailed when Serve refuses the list.
        """
        value = {
            "proxy_location": "HeadOnly",
            "http_options": {
                "host": host,
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
        with self._rest.understood():
            told = response.json()
            self._controller = (told.get("controller_info") or {}).get("node_id")
            found = told.get("applications") or {}
            return {name: AppStatus.from_json(name, value) for name, value in found.items()}

    def scaling(self, app: str) -> dict[str, Any] | None:
        """What the policy of an application noted last (`stages.serve.policy`): its figures and decisions.

        None while it has not noted anything. To be asked after `get`, which finds out where the controller runs.
        """
        if self._controller is None:
            return None
        file = f"serve/{SCALING_FILE.format(app=app)}"
        path = f"/api/v0/logs/file?node_id={self._controller}&filename={file}&lines=-1&timeout=5"
        try:
            response = self._rest.call("GET", path, answer_seconds=10.0)
        except ClusterFailed:
            return None  # it is read again at the next look; nothing is worth stopping this one for
        try:
            found = json.loads(response.text[response.text.index("{") :]) if response.is_success else None
        except ValueError:
            return None
        return found if isinstance(found, dict) and found.get("app", app) == app else None


def revision_name(model: str, digest: str) -> str:
    """Name of a revision among those that must be up."""
    return f"{model}-{digest[:8]}"


def app_name(model: str, digest: str, profile: str) -> str:
    """Name of the application of a revision on the machines of one profile."""
    return f"{revision_name(model, digest)}-{profile}"


def place_of(app: str, model: str, digest: str) -> str | None:
    """The profile of an application, from its name; None when it is not one of this revision."""
    start = f"{revision_name(model, digest)}-"
    return app[len(start) :] if app.startswith(start) else None


def route_prefix(model: str, digest: str, profile: str) -> str:
    """Path under which the application answers."""
    return f"/m/{model}/{digest[:8]}/{profile}"


def app_for(
    revision: Revision,
    serve: Serve,
    store_uri: str,
    facts: ModelFacts,
    hardware: Hardware,
    bounds: Bounds,
    adapters: Sequence[Mapping[str, str]] = (),
    cpus: float = 1,
) -> dict[str, Any]:
    """The configuration of the application of a revision on one profile.

    revision: decides the answers. serve: the section as the manifest has it now; only what may change lightly is taken
    from it. facts: of the artifact. hardware: of one machine of the profile. bounds: the profile, and how many replicas
    it may have. adapters: as `cluster.adapters.adapters_for` finds them. cpus: logical CPUs that a replica holds.

    Raises ManifestInvalid for engine arguments that may not be there.
    """
    section = revision.section()
    parallel = section.engine.tensor_parallel or 1
    return {
        "name": app_name(revision.model, revision.digest, bounds.profile),
        "route_prefix": route_prefix(revision.model, revision.digest, bounds.profile),
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
                **scale(bounds, serve),
                "max_ongoing_requests": _most_at_once(section, facts, hardware, len(serve.profiles)),
                "graceful_shutdown_timeout_s": serve.stream_limit + DRAIN_MARGIN_SECONDS,
                # Always there: to Serve a block that appears is new code.
                "user_config": {
                    "adapters": [dict(adapter) for adapter in adapters],
                    "target": {"ttft_ms": None if serve.target.ttft is None else serve.target.ttft * 1000},
                },
                "ray_actor_options": {
                    "num_cpus": cpus,
                    "num_gpus": parallel if hardware.accelerators else 0,
                    "label_selector": {PROFILE_LABEL: bounds.profile},
                },
                **({} if hardware.accelerators or bounds.profile == LOCAL else {"max_replicas_per_node": 1}),
            }
        ],
    }


def _most_at_once(section: Serve, facts: ModelFacts, hardware: Hardware, profiles: int) -> int:
    """Requests that Serve lets into a replica at the same time."""
    queued = QUEUED_ROUNDS if profiles == 1 else SHARED_ROUNDS
    rounds = 1 if section.scheduler == "fcfs" else queued
    return rounds * plan_cache(facts, section, hardware).sequences + SPARE_SLOTS


def scale(bounds: Bounds, serve: Serve) -> dict[str, Any]:
    """How many replicas there may be and what to aim at, in Serve's words; `stages.serve.policy` reads them there.

    A fixed number is written as bounds that meet: to Serve an application that begins or ceases to have such a block is
    new code (Ray 2.60, `get_app_code_version`), and it would replace every replica. Without `metrics_interval_s` Ray
    2.60 takes 10 s to notice load, whatever its documented variables say.
    """
    return {
        "num_replicas": "auto",
        "autoscaling_config": {
            "min_replicas": bounds.least,
            "max_replicas": bounds.most,
            "target_ongoing_requests": serve.target.queue,
            "metrics_interval_s": METRICS_SECONDS,
            "look_back_period_s": LOOK_BACK_SECONDS,
            "upscale_delay_s": UPSCALE_SECONDS,
            "downscale_delay_s": DOWNSCALE_SECONDS,
            "downscale_to_zero_delay_s": DOWNSCALE_SECONDS if bounds.spilled else serve.replicas.idle,
            "policy": {"policy_function": POLICY},
        },
    }


def beginning(app: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration for an application that is not there yet: it starts one replica even where none must be kept,
    since a revision must come up once to be known good.

    Later it must be left out: Serve takes `initial_replicas` for the new number of replicas at every change of bounds.
    """
    deployments = []
    for deployment in app["deployments"]:
        scaling = deployment["autoscaling_config"]
        begins = {**scaling, "initial_replicas": max(1, scaling["min_replicas"])}
        deployments.append({**deployment, "autoscaling_config": begins})
    return {**app, "deployments": deployments}

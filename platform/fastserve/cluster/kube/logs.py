"""Logs of a Model's stages and replicas, from the Ray heads of its namespace.

A head keeps the log of every job that it ran for as long as it lives, and hands out the files of all its machines. It
is reached through kubectl, with the token of its RayCluster, so who may read that Secret and forward a port may read
logs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from fastserve.cluster.kube.api import RAY_CLUSTERS, Object
from fastserve.cluster.kube.door import Door
from fastserve.cluster.kube.forward import forwarded
from fastserve.cluster.kube.ray import DASHBOARD_PORT, RayClusterHead, service_of
from fastserve.cluster.kube.ray_clusters import MODEL_LABEL
from fastserve.cluster.ray_jobs import Jobs
from fastserve.cluster.ray_rest import RayRest
from fastserve.errors import ClusterFailed, UsageInvalid
from fastserve.plan.stages import Stage
from fastserve.telemetry.curve import heard

SERVE = "serve"
WHOLE = 10**9
"""Lines of a log that is read from its beginning."""


def log_of(door: Door, name: str, stage: str | None, lines: int) -> str:
    """The end of the newest log of a Model's stage, of its replicas (`serve`), or of its newest stage.

    Raises UsageInvalid when there is none, ClusterFailed when no head can be asked.
    """
    if stage is not None and stage not in (SERVE, *(item.value for item in Stage)):
        raise UsageInvalid(f"there is no stage {stage}; stages are source, train, compress, evaluate, serve")
    door.models.get(name)
    refused: ClusterFailed | None = None
    for head in _heads(door, name):
        try:
            found = _of_head(door, head, name, stage, lines)
        except ClusterFailed as error:
            refused = refused or error
            continue
        if found:
            return found
    if refused is not None:
        raise refused
    raise UsageInvalid(
        f"no Ray head of namespace {door.namespace} has a log of {stage or 'any stage'} of {name}; a head keeps logs "
        "only as long as it lives, and a stage whose artifact was there already never ran"
    )


def curve_of(door: Door, story: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of a Model's loss curve, as far as the log of its newest train job says them.

    story: of the Model. Raises UsageInvalid when the model is not trained, or no head has that log.
    """
    stages = story["stages"]
    train = stages.get(Stage.TRAIN.value)
    if stages and train is None:
        raise UsageInvalid(f"{story['name']} has no train stage, so there is no loss to plot; leave --plot out")
    if train is None or train["state"] in ("-", "waiting"):
        return []
    return list(heard(log_of(door, story["name"], Stage.TRAIN.value, WHOLE)))


def _heads(door: Door, name: str) -> Sequence[Object]:
    """RayClusters with a head: the Model's own first, then the shared ones, the newest first."""
    found = [item for item in door.api.list(RAY_CLUSTERS, door.namespace) if service_of(item)]
    if not found:
        raise ClusterFailed(
            f"namespace {door.namespace} has no RayCluster with a head, so no log can be found from here; where the "
            "operator was given --ray-address, that head's dashboard shows them"
        )

    def is_shared(item: Object) -> bool:
        return bool((item["metadata"].get("labels") or {}).get(MODEL_LABEL) != name)

    found.sort(key=lambda item: str(item["metadata"].get("creationTimestamp")), reverse=True)
    return sorted(found, key=is_shared)


def _of_head(door: Door, head: Object, name: str, stage: str | None, lines: int) -> str:
    token = RayClusterHead(door.api, door.namespace, head["metadata"]["name"], "python").endpoint(head).token
    with forwarded(door.reached, service_of(head), DASHBOARD_PORT) as url:
        return serve_log(url, token, name, lines) if stage == SERVE else stage_log(url, token, name, stage, lines)


def stage_log(url: str, token: str, name: str, stage: str | None, lines: int) -> str:
    """The end of the log of the newest job of a Model's stage; empty when the head ran none.

    url, token: of a head's dashboard.
    """
    jobs = Jobs(url, token)
    wanted = [stage] if stage is not None else [item.value for item in Stage]
    mine = [job for job in jobs.all().values() if any(_is_of(job.submission_id, name, item) for item in wanted)]
    if not mine:
        return ""
    newest = max(mine, key=lambda job: job.started_at or 0.0)
    told = jobs.logs(newest.submission_id, lines)
    return told or newest.message or f"{newest.submission_id} has written nothing yet."


def serve_log(url: str, token: str, name: str, lines: int) -> str:
    """The end of the log of each of a Model's replicas, machine by machine; empty when there is none."""
    rest = RayRest(url, token)
    answer = rest.call("GET", "/api/v0/nodes?limit=10000")
    if not answer.is_success:
        raise rest.failed(answer, "list its nodes")
    nodes = [row["node_id"] for row in answer.json()["data"]["result"]["result"] if row.get("state") == "ALIVE"]
    told = []
    for node in nodes:
        for file in _replica_files(rest, node, name):
            query = f"node_id={node}&filename={quote(file)}&lines={lines}"
            text = rest.call("GET", f"/api/v0/logs/file?{query}")
            if text.is_success:
                told.append(f"==> {file.rpartition('/')[2]}, node {node[:8]}\n{text.text}")
    return "\n".join(told)


def _replica_files(rest: RayRest, node: str, name: str) -> list[str]:
    answer = rest.call("GET", f"/api/v0/logs?node_id={node}&glob={quote(f'serve/replica_{name}-*')}")
    if not answer.is_success:
        raise rest.failed(answer, "list its logs")
    result = answer.json()["data"]["result"]
    mine = re.compile(rf"replica_{re.escape(name)}-[0-9a-f]{{8}}-[^/]*\.log$")
    return sorted({file for files in result.values() for file in files if mine.search(file)})


def _is_of(submission: str, name: str, stage: str) -> bool:
    """Whether a job is an attempt of that stage of that Model: `NAME-STAGE-KEY-NUMBER`."""
    head, _, number = submission.rpartition("-")
    front, _, key = head.rpartition("-")
    return front == f"{name}-{stage}" and number.isdigit() and len(key) == 12

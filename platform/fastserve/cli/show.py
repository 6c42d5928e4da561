"""The commands that look and change nothing but a pointer: validate, plan, status, why, logs, rollback, schema."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastserve.cli import render, stories
from fastserve.cli.manifests import read_manifests, require_keys_open
from fastserve.cluster.home import Home
from fastserve.cluster.local import LocalCluster
from fastserve.cluster.status import current_stage, curve_of, status_of
from fastserve.cluster.survey import machines_here, survey
from fastserve.errors import ClusterFailed, UsageInvalid
from fastserve.plan import keys
from fastserve.plan.pipeline import wanted_revision
from fastserve.plan.rollback import pin_of, rollback_target
from fastserve.spec import load
from fastserve.spec.model import HardwareProfile, Model
from fastserve.spec.schema import schema as manifest_schema

ROLLBACK_SECONDS = 600.0


def validate(file: Path, as_json: bool) -> None:
    """Say that a manifest is right, or raise everything that is wrong."""
    manifests = read_manifests(file)
    if as_json:
        render.as_json([load.dump(item) for item in manifests])
        return
    for item in manifests:
        render.answer(f"{item.kind} {item.metadata.name}: valid")


def plan(file: Path, home: Home, as_json: bool) -> None:
    """Show what `up` would do with each Model of a manifest."""
    manifests = read_manifests(file)
    profiles = [item for item in manifests if isinstance(item, HardwareProfile)]
    require_keys_open(manifests)
    here = machines_here(home)
    models = [item for item in manifests if isinstance(item, Model)]
    sheets = [survey(home, home.store_uri, item, profiles, here).sheet for item in models]
    render.sheets(sheets, as_json)
    if not models and not as_json:
        render.say(f"{file} holds no Model, so nothing would run.")


def status(home: Home, name: str | None, watch: bool, as_json: bool, plot: bool = False) -> None:
    """One line a model, or everything about one of them; with `plot` its loss curve too."""
    if plot:
        stories.require_name_to_plot(name)

    def look() -> list[dict[str, Any]]:
        found = [_status(home, model) for model in ([name] if name else home.model_names())]
        return [item | {"curve": curve_of(item, LocalCluster(home).store)} for item in found] if plot else found

    stories.status(look, name, watch, as_json)


def why(home: Home, name: str, as_json: bool) -> None:
    """Why a model is as it is: the moves that are due, each with its reason."""
    found = _status(home, name)
    if as_json:
        told = ("why", "conditions", "gate", "rollout", "pin")
        render.as_json({"name": name, **{key: found[key] for key in told}})
        return
    stories.why(found)


def logs(home: Home, name: str, stage: str | None, tail: int) -> None:
    """The end of a stage's log, of the serving replicas' log, or of the newest stage."""
    if name not in home.known_models():
        raise UsageInvalid(
            f"no model named {name} is known in {home.path} (known: {', '.join(home.known_models()) or 'none'})"
        )
    cluster = LocalCluster(home)
    text = cluster.serve_log(name) if stage == "serve" else _stage_log(cluster, name, stage)
    render.answer("\n".join(text.splitlines()[-tail:]))


def rollback(home: Home, name: str, revision: str | None, as_json: bool) -> None:
    """Pin an earlier revision and wait until it has the traffic."""
    cluster = LocalCluster(home)
    if home.tender() is None:
        raise UsageInvalid(f"{name} is not up, nor is anything in {home.path}; run `fastserve up FILE --detach` first")
    beat = cluster.look(name)
    wanted = wanted_revision(beat.model, beat.observed, keys.stage_keys(beat.model, beat.observed.digests))
    if wanted is None:
        raise UsageInvalid(f"{name} has no revision yet; `fastserve status {name}` shows its stages")
    target = rollback_target(name, beat.observed, list(home.revisions(name)), wanted.digest, revision)
    stepped = beat.model.spec.serve is not None and beat.model.spec.serve.rollout is not None
    home.set_pin(name, pin_of(target, wanted.digest, stepped))
    if not as_json:
        render.say(f"rolling {name} back to revision {target[:8]}; it stays until the manifest changes")
    deadline = time.monotonic() + ROLLBACK_SECONDS
    while home.weights(name) != {target: 100}:
        if time.monotonic() > deadline:
            raise ClusterFailed(f"revision {target[:8]} did not come up; `fastserve why {name}` says why")
        time.sleep(0.2)
    if as_json:
        render.as_json({"name": name, "revision": target})
    else:
        render.answer(f"{name} serves revision {target[:8]}")


def schema() -> None:
    """The JSON schema of the three kinds."""
    render.as_json(manifest_schema())


def _status(home: Home, name: str) -> dict[str, Any]:
    cluster = LocalCluster(home)
    beat = cluster.look_back(name) or cluster.look(name)
    scaling = cluster.scaling(name)
    found = status_of(beat.model, beat.observed, beat.moves, cluster.store, cluster.gateway.url, scaling)
    return found | {"stage": current_stage(beat.moves)}


def _stage_log(cluster: LocalCluster, name: str, stage: str | None) -> str:
    """The live log when its job still runs, else the kept one."""
    running = [job for job in cluster.jobs() if job.startswith(f"{name}-") and (stage is None or f"-{stage}-" in job)]
    if running:
        return cluster.job_log(running[-1])
    kept = sorted(
        (cluster.home.path / "logs").glob(f"{name}-{stage or '*'}-*.log"), key=lambda path: path.stat().st_mtime
    )
    if not kept:
        raise UsageInvalid(
            f"{name} has no log of {stage or 'any stage'} yet; stages are source, train, compress, evaluate, serve"
        )
    return kept[-1].read_text()

"""Looking: what the store, Ray's jobs and Serve's applications add up to, and the status that follows from it."""

import time
from pathlib import Path

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.cluster.home import Home
from fastserve.cluster.observe import observe, submission_id
from fastserve.cluster.ray_jobs import Job, JobState
from fastserve.cluster.ray_serve import AppStatus, app_name
from fastserve.cluster.status import status_of
from fastserve.plan import keys
from fastserve.plan.observed import AttemptState, RevisionState
from fastserve.plan.pipeline import next_moves
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.load import read
from fastserve.spec.model import Model

DIGESTS = {"hf://a/b": "1" * 64}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path / "home")
    found.create()
    return found


@pytest.fixture
def store(home: Home) -> Store:
    return open_store(home.store_uri)


@pytest.fixture
def model(home: Home) -> Model:
    head = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: chat}\n"
    found = read(head + "spec: {source: hf://a/b, serve: {}}")[0]
    home.want(found, DIGESTS, {})
    return found


def claim(store: Store, model: Model, attempt: int = 1) -> str:
    request = keys.request_for(model, Stage.SOURCE, DIGESTS, attempt)
    attempts.claim(store, request)
    return request.key


def job(model: Model, key: str, state: JobState, attempt: int = 1) -> dict[str, Job]:
    name = submission_id(model.name, Stage.SOURCE, key, attempt)
    return {name: Job(name, state, message="said Ray", ended_at=123.0)}


def test_an_attempt_runs_while_its_job_does(home: Home, store: Store, model: Model) -> None:
    key = claim(store, model)
    seen = observe(home, store, model, job(model, key, JobState.RUNNING), {})
    assert seen.attempts[key].state is AttemptState.RUNNING


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.STOPPED, JobState.SUCCEEDED])
def test_an_attempt_whose_job_ended_without_a_word_is_lost(
    home: Home, store: Store, model: Model, state: JobState
) -> None:
    key = claim(store, model)
    attempt = observe(home, store, model, job(model, key, state), {}).attempts[key]
    assert (attempt.state, attempt.message, attempt.ended_at) == (AttemptState.LOST, "said Ray", 123.0)


def test_an_attempt_that_no_head_knows_is_lost(home: Home, store: Store, model: Model) -> None:
    key = claim(store, model)
    assert observe(home, store, model, {}, {}).attempts[key].state is AttemptState.LOST


def test_the_newest_attempt_counts(home: Home, store: Store, model: Model) -> None:
    key = claim(store, model)
    claim(store, model, attempt=2)
    seen = observe(home, store, model, job(model, key, JobState.RUNNING, attempt=2), {})
    assert (seen.attempts[key].number, seen.attempts[key].state) == (2, AttemptState.RUNNING)


def test_a_failure_says_why_and_whether_to_try_again(home: Home, store: Store, model: Model) -> None:
    key = claim(store, model)
    request = attempts.request_of(store, Stage.SOURCE, key, 1)
    attempts.fail(store, request, "SourceInvalid", "a pickle", final=True)
    seen = observe(home, store, model, {}, {})
    assert (seen.attempts[key].reason, seen.attempts[key].final) == ("SourceInvalid", True)
    moves = next_moves(model, seen, time.time())
    status = status_of(model, seen, moves, store, None)
    assert status["conditions"][0]["reason"] == "SourceInvalid"
    assert status["stages"]["source"]["message"] == "a pickle"


def test_a_running_job_at_a_key_that_nobody_wants_any_more_is_seen(home: Home, store: Store, model: Model) -> None:
    stale = submission_id("chat", Stage.TRAIN, "f" * 64, 3)
    other = submission_id("chat-two", Stage.TRAIN, "e" * 64, 1)
    jobs = {name: Job(name, JobState.RUNNING) for name in (stale, other)}
    seen = observe(home, store, model, jobs, {})
    assert {key: attempt.number for key, attempt in seen.attempts.items()} == {"f" * 12: 3}


def commit(home: Home, store: Store, model: Model, tmp_path: Path) -> Revision:
    key = claim(store, model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("w")
    request = attempts.request_of(store, Stage.SOURCE, key, 1)
    record = attempts.commit(store, request, tmp_path / "out", {}, {})
    return Revision("chat", Stage.SOURCE, key, record.digest, {})


@pytest.mark.parametrize(
    ("state", "seen_as"),
    [
        ("RUNNING", RevisionState.READY),
        ("DEPLOYING", RevisionState.STARTING),
        ("UNHEALTHY", RevisionState.STARTING),
        ("DEPLOY_FAILED", RevisionState.FAILED),
        (None, RevisionState.STARTING),
    ],
)
def test_a_revision_is_as_serve_says(
    home: Home, store: Store, model: Model, tmp_path: Path, state: str | None, seen_as: RevisionState
) -> None:
    revision = commit(home, store, model, tmp_path)
    name = app_name("chat", revision.digest)
    home.keep_revision(revision, 1.0)
    home.start_serving(name, revision)
    home.set_weights("chat", {revision.digest: 100})
    apps = {} if state is None else {name: AppStatus(name, state, replicas=1)}
    seen = observe(home, store, model, {}, apps)
    assert [live.state for live in seen.revisions] == [seen_as]
    status = status_of(model, seen, next_moves(model, seen, 0.0), store, "http://here/v1")
    assert status["url"] == ("http://here/v1" if seen_as is RevisionState.READY else None)


def test_an_application_that_nobody_wants_is_on_its_way_out(
    home: Home, store: Store, model: Model, tmp_path: Path
) -> None:
    revision = commit(home, store, model, tmp_path)
    home.keep_revision(revision, 1.0)
    name = app_name("chat", revision.digest)
    seen = observe(home, store, model, {}, {name: AppStatus(name, "DELETING")})
    assert [live.state for live in seen.revisions] == [RevisionState.STOPPING]

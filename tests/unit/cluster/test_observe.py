"""Looking: what the store, Ray's jobs and Serve's applications add up to, and the status that follows from it."""

import time
from pathlib import Path
from typing import Any

import pytest

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.cluster.home import Home
from fastserve.cluster.observe import observe, running_attempts, submission_id
from fastserve.cluster.ray_jobs import Job, JobState
from fastserve.cluster.ray_serve import AppStatus, app_name, revision_name
from fastserve.cluster.status import status_of
from fastserve.plan import keys
from fastserve.plan.moves import StartRevision
from fastserve.plan.observed import AttemptState, Pin, RevisionState
from fastserve.plan.pipeline import next_moves
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.plan.steps import ROLLED_BACK
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


def test_an_attempt_of_another_model_that_asks_for_the_same_runs_and_is_that_ones(
    home: Home, store: Store, model: Model
) -> None:
    """Also where one name begins as the other one does."""
    key = claim(store, model)
    other = model.model_copy(update={"metadata": model.metadata.model_copy(update={"name": "chat-b"})})
    home.want(other, DIGESTS, {})
    attempt = observe(home, store, other, job(model, key, JobState.RUNNING), {}).attempts[key]
    assert (attempt.state, attempt.number, attempt.model) == (AttemptState.RUNNING, 1, "chat")
    attempt = observe(home, store, other, job(model, key, JobState.FAILED), {}).attempts[key]
    assert (attempt.state, attempt.message) == (AttemptState.LOST, "said Ray")
    running = (
        job(model, key, JobState.RUNNING) | job(other, key, JobState.RUNNING, 2) | job(model, key, JobState.STOPPED, 3)
    )
    assert running_attempts("chat", running) == [(key[:12], 1)]
    assert running_attempts("chat-b", running) == [(key[:12], 2)]


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
    ("state", "replicas", "seen_as"),
    [
        ("RUNNING", 1, RevisionState.READY),
        ("RUNNING", 0, RevisionState.READY),
        ("DEPLOYING", 0, RevisionState.STARTING),
        ("DEPLOYING", 1, RevisionState.READY),
        ("UNHEALTHY", 0, RevisionState.STARTING),
        ("UNHEALTHY", 1, RevisionState.READY),
        ("DEPLOY_FAILED", 1, RevisionState.FAILED),
        (None, 0, RevisionState.STARTING),
    ],
)
def test_a_revision_is_as_serve_says(
    home: Home, store: Store, model: Model, tmp_path: Path, state: str | None, replicas: int, seen_as: RevisionState
) -> None:
    revision = serve(home, store, model, tmp_path)
    name = app_name("chat", revision.digest, "local")
    apps = {} if state is None else {name: AppStatus(name, state, replicas=replicas, wanted=2)}
    seen = observe(home, store, model, {}, apps)
    assert [live.state for live in seen.revisions] == [seen_as]
    status = status_of(model, seen, next_moves(model, seen, 0.0), store, "http://here/v1")
    assert status["url"] == ("http://here/v1" if seen_as is RevisionState.READY else None)
    places = [] if state is None else [("local", seen_as.value, replicas, 2)]
    (shown,) = status["revisions"]
    assert [(at["profile"], at["state"], at["replicas"], at["wanted"]) for at in shown["places"]] == places


def serve(home: Home, store: Store, model: Model, tmp_path: Path) -> Revision:
    """A revision with all the traffic."""
    revision = commit(home, store, model, tmp_path)
    home.keep_revision(revision, 1.0)
    home.start_serving(revision_name("chat", revision.digest), revision)
    home.set_weights("chat", {revision.digest: 100})
    return revision


def test_a_revision_answers_when_one_of_its_places_does(home: Home, store: Store, model: Model, tmp_path: Path) -> None:
    revision = serve(home, store, model, tmp_path)
    names = {profile: app_name("chat", revision.digest, profile) for profile in ("local", "spare")}
    apps = {
        names["spare"]: AppStatus(names["spare"], "RUNNING", replicas=2),
        names["local"]: AppStatus(names["local"], "DEPLOY_FAILED", message="no memory"),
    }
    (live,) = observe(home, store, model, {}, apps).revisions
    assert (live.state, live.replicas) == (RevisionState.READY, 2)
    assert [(place.profile, place.message) for place in live.places] == [("local", "no memory"), ("spare", "")]
    assert live.since is not None


def test_an_application_that_nobody_wants_is_on_its_way_out(
    home: Home, store: Store, model: Model, tmp_path: Path
) -> None:
    revision = commit(home, store, model, tmp_path)
    home.keep_revision(revision, 1.0)
    name = app_name("chat", revision.digest, "local")
    seen = observe(home, store, model, {}, {name: AppStatus(name, "DELETING")})
    assert [live.state for live in seen.revisions] == [RevisionState.STOPPING]


def told(requests: int, errors: int, ttft_ms: float | None) -> dict[str, Any]:
    return {
        "requests": requests,
        "errors": errors,
        "ttftMs": {"p50": ttft_ms, "p95": ttft_ms, "count": 0 if ttft_ms is None else requests},
        "tokensPerSecond": {"mean": None, "p50": None, "p5": None, "count": 0},
    }


def test_what_the_gateway_counted_becomes_windows(home: Home, store: Store, model: Model, tmp_path: Path) -> None:
    revision = serve(home, store, model, tmp_path)
    at = home.shifted_at("chat")
    assert at is not None
    revisions = {revision.digest: told(90, 1, 20.0)}
    adapter = {revision.digest: told(10, 2, None)}
    models = {"chat": {"revisions": revisions}, "chat-polite": {"revisions": adapter}, "other": {"revisions": {}}}
    for started, seconds in ((at - 5, 30.0), (at + 20, 10.0)):  # a gateway that started later has seen less
        stats = {"at": at + 30, "started": started, "models": models}
        seen = observe(home, store, model, {}, {}, stats=stats)
        window = seen.windows[revision.digest]
        assert window.seconds == pytest.approx(seconds)
        assert (window.requests, window.errors, window.ttft_ms, window.first_tokens) == (100, 3, 20.0, 90)
    assert observe(home, store, model, {}, {}).windows == {}
    shown = status_of(model, seen, next_moves(model, seen, 0.0), store, None)["revisions"][0]["window"]
    assert (shown["requests"], shown["ttftMs"]) == (100, 20.0)
    assert "tokensPerSecond" not in shown


def test_the_status_shows_where_a_rollout_stands_and_why_it_was_rolled_back(
    home: Home, store: Store, model: Model, tmp_path: Path
) -> None:
    old = serve(home, store, model, tmp_path)
    head = "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: chat}\n"
    (stepped,) = read(head + "spec: {source: hf://a/b, serve: {context: 64, rollout: {steps: [5, 25, 100]}}}")
    assert isinstance(stepped, Model)
    home.want(stepped, DIGESTS, {})
    (start,) = next_moves(stepped, observe(home, store, stepped, {}, {}), time.time())
    assert isinstance(start, StartRevision)
    new = start.revision
    home.keep_revision(new, 2.0)
    home.start_serving(revision_name("chat", new.digest), new)
    home.set_weights("chat", {old.digest: 75, new.digest: 25})
    names = [app_name("chat", item.digest, "local") for item in (old, new)]
    apps = {name: AppStatus(name, "RUNNING", replicas=1, wanted=1) for name in names}
    at = home.shifted_at("chat")
    assert at is not None
    revisions = {old.digest: told(750, 0, 40.0), new.digest: told(250, 1, 41.0)}
    stats = {"at": at + 12, "started": 0.0, "models": {"chat": {"revisions": revisions}}}
    seen = observe(home, store, stepped, {}, apps, stats=stats)
    moves = next_moves(stepped, seen, at + 12)
    rollout = status_of(stepped, seen, moves, store, None)["rollout"]
    assert (rollout["revision"], rollout["from"], rollout["weight"]) == (new.digest, old.digest, 25)
    assert (rollout["step"], rollout["steps"], rollout["holdSeconds"]) == (2, [5, 25, 100], 60.0)
    assert rollout["message"] == (
        f"step 2 of 3: revision {new.short} has 25 % of traffic, 1 of 250 requests failed in 12 s, 41 ms to the first "
        f"token; {old.short} 0 of 750 requests failed in 12 s, 40 ms to the first token"
    )
    home.set_pin("chat", Pin(old.digest, new.digest, ROLLED_BACK, "It was slow."))
    home.set_weights("chat", {old.digest: 100})
    home.stop_serving(revision_name("chat", new.digest))
    back = observe(home, store, stepped, {}, {names[0]: apps[names[0]]})
    status = status_of(stepped, back, next_moves(stepped, back, at + 20), store, "http://here/v1")
    (ready,) = status["conditions"]
    assert (ready["status"], ready["reason"], ready["message"]) == ("True", ROLLED_BACK, "It was slow.")
    assert (status["rollout"], status["pin"]["reason"], status["url"]) == (None, ROLLED_BACK, "http://here/v1")

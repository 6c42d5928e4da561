"""The Jobs and Serve clients against a small server that speaks Ray's routes as Ray 2.60 does."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from fastserve.cluster.nodes import machines
from fastserve.cluster.processes import free_port
from fastserve.cluster.ray_jobs import Jobs, JobState
from fastserve.cluster.ray_rest import RayRest
from fastserve.cluster.ray_serve import ServeApi
from fastserve.errors import ClusterFailed

TOKEN = "right"


@dataclass
class Head:
    """What a Ray head knows, and how it misbehaves."""

    url: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    serve: dict[str, Any] = field(default_factory=dict)
    put: dict[str, Any] = field(default_factory=dict)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """Logs beside that of Serve's controller, which runs on node n1."""

    agent_after: float = 0.0
    """Until then there is no agent that takes jobs (monotonic seconds)."""

    serve_status: int = 200
    stall_seconds: float = 0.0


class Routes(BaseHTTPRequestHandler):
    """Ray's routes."""

    head: Head

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def answer(self, status: int, value: Any) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # a client that gave up
            self.wfile.write(data)

    def allowed(self) -> bool:
        time.sleep(self.head.stall_seconds)
        given = self.headers.get("Authorization")
        if given is None:
            self.answer(401, "Unauthorized: missing authentication token")
        elif given != f"Bearer {TOKEN}":
            self.answer(403, "Forbidden: invalid authentication token")
        return given == f"Bearer {TOKEN}"

    def do_GET(self) -> None:
        if not self.allowed():
            return
        parts = self.path.strip("/").split("/")
        if self.path == "/api/serve/applications/":
            self.answer(self.head.serve_status, self.head.serve)
        elif self.path.startswith("/api/v0/logs/file?node_id=n1&filename=serve/"):
            name = self.path.partition("serve/")[2].partition("&")[0]
            text = self.head.files.get(name)
            self.answer(500, "no such file") if text is None else self.answer(200, text)
        elif self.path == "/api/jobs/":
            self.answer(200, list(self.head.jobs.values()))
        elif parts[2] not in self.head.jobs:
            self.answer(404, f"Job {parts[2]} does not exist")
        elif parts[-1] == "logs":
            self.answer(200, {"logs": "one\ntwo\nthree\n"})
        else:
            self.answer(200, self.head.jobs[parts[2]])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.allowed():
            return
        parts = self.path.strip("/").split("/")
        if parts[-1] == "stop":
            known = parts[2] in self.head.jobs
            self.answer(200 if known else 404, {"stopped": True} if known else f"Job {parts[2]} does not exist")
            return
        value = json.loads(body)
        if time.monotonic() < self.head.agent_after:
            self.answer(500, "No available agent to submit job, please try again later.")
        elif value["submission_id"] in self.head.jobs:
            self.answer(
                500, f"Traceback ...\nValueError: Job with submission_id {value['submission_id']} already exists."
            )
        elif not value["entrypoint"]:
            self.answer(400, "Traceback ...\nValueError: entrypoint must not be empty")
        else:
            self.head.submitted.append(value)
            self.head.jobs[value["submission_id"]] = job(value["submission_id"], "PENDING")
            self.answer(200, {"job_id": value["submission_id"], "submission_id": value["submission_id"]})

    def do_PUT(self) -> None:
        self.head.put = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.allowed():
            self.answer(
                self.head.serve_status, "" if self.head.serve_status == 200 else "bad config\nValueError: no such field"
            )


def job(name: str | None, status: str, **more: Any) -> dict[str, Any]:
    return {"type": "SUBMISSION", "submission_id": name, "status": status, "message": "", "start_time": 1_000, **more}


@pytest.fixture
def head() -> Iterator[Head]:
    state = Head()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Routes,), {"head": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def jobs(head: Head) -> Jobs:
    return Jobs(head.url, TOKEN)


def test_a_job_is_submitted_with_its_variables(head: Head, jobs: Jobs) -> None:
    jobs.submit("m-train-ab-1", "python -m x", {"A": "b"})
    assert head.submitted == [
        {
            "submission_id": "m-train-ab-1",
            "entrypoint": "python -m x",
            "entrypoint_num_cpus": 0,
            "runtime_env": {"env_vars": {"A": "b"}},
        }
    ]


def test_submitting_twice_equals_once(head: Head, jobs: Jobs) -> None:
    jobs.submit("one", "true", {})
    jobs.submit("one", "true", {})
    assert len(head.submitted) == 1


def test_a_head_without_an_agent_yet_is_waited_for(head: Head, jobs: Jobs) -> None:
    head.agent_after = time.monotonic() + 0.8
    jobs.submit("one", "true", {})
    assert jobs.state("one") is JobState.PENDING


def test_a_job_that_ray_refuses_is_an_error_with_its_reason(jobs: Jobs) -> None:
    with pytest.raises(ClusterFailed, match="entrypoint must not be empty"):
        jobs.submit("one", "", {})


def test_an_unknown_job_has_no_state_and_no_log(jobs: Jobs) -> None:
    assert jobs.state("nobody") is None
    assert jobs.logs("nobody") == ""
    jobs.stop("nobody")


def test_a_job_that_ended_says_when_and_why(head: Head, jobs: Jobs) -> None:
    head.jobs["x"] = job("x", "FAILED", message="exit code 7", end_time=4_500, driver_exit_code=7)
    found = jobs.find("x")
    assert found is not None
    assert (found.state, found.message, found.started_at, found.ended_at, found.exit_code) == (
        JobState.FAILED,
        "exit code 7",
        1.0,
        4.5,
        7,
    )


def test_drivers_without_a_submission_are_not_listed(head: Head, jobs: Jobs) -> None:
    head.jobs = {"a": job("a", "RUNNING"), "driver": job(None, "RUNNING")}
    assert list(jobs.all()) == ["a"]


@pytest.mark.parametrize(
    ("lines", "text"), [(None, "one\ntwo\nthree\n"), (2, "two\nthree\n"), (9, "one\ntwo\nthree\n"), (0, "")]
)
def test_the_end_of_a_log_can_be_asked_for(head: Head, jobs: Jobs, lines: int | None, text: str) -> None:
    head.jobs["x"] = job("x", "RUNNING")
    assert jobs.logs("x", lines) == text


def test_a_job_that_does_not_end_in_time_is_an_error(head: Head, jobs: Jobs) -> None:
    head.jobs["x"] = job("x", "RUNNING")
    with pytest.raises(ClusterFailed, match="has not ended"):
        jobs.await_end("x", 0.1)


def test_a_name_cannot_leave_its_route(head: Head, jobs: Jobs) -> None:
    assert jobs.find("../serve/applications/") is None


def test_a_missing_token_and_a_wrong_token_are_told_apart(head: Head) -> None:
    with pytest.raises(ClusterFailed, match="asks for a token"):
        Jobs(head.url, "").all()
    with pytest.raises(ClusterFailed, match="refuses this home's token"):
        Jobs(head.url, "wrong").all()


def test_a_head_that_is_gone_does_not_answer() -> None:
    with pytest.raises(ClusterFailed, match="does not answer"):
        Jobs(f"http://127.0.0.1:{free_port()}", TOKEN).all()


def test_a_head_that_hangs_is_given_up(head: Head) -> None:
    head.stall_seconds = 10.0
    with pytest.raises(ClusterFailed, match="did not answer"):
        RayRest(head.url, TOKEN).call("GET", "/api/jobs/", answer_seconds=0.2)


def test_an_empty_serve_has_no_applications(head: Head) -> None:
    head.serve = {"controller_info": {}, "applications": {}}
    assert ServeApi(head.url, TOKEN).get() == {}


def test_an_application_says_how_it_stands(head: Head) -> None:
    replicas = [{"pid": 7, "state": "RUNNING"}, {"pid": None, "state": "STARTING"}]
    deployments = {"engine": {"status": "UPDATING", "message": "one to go", "replicas": replicas}}
    head.serve = {"applications": {"m-1": {"status": "DEPLOYING", "message": "", "deployments": deployments}}}
    status = ServeApi(head.url, TOKEN).get()["m-1"]
    assert (status.state, status.message, status.replicas) == ("DEPLOYING", "one to go", 1)
    assert status.deployments is not None
    assert [replica.pid for replica in status.deployments["engine"].replicas] == [7, None]


def test_of_a_replicas_traceback_the_cause_is_told(head: Head) -> None:
    said = (
        "The deployment failed to start 2 times in a row. Error:\nray::ServeReplica.initialize() (pid=1)\n"
        '  File "app.py", line 3, in __init__\nfastserve.errors.EngineFailed: vLLM refuses its arguments; change X\n'
    )
    deployments = {"engine": {"status": "UNHEALTHY", "message": said, "replicas": []}}
    head.serve = {"applications": {"m-1": {"status": "DEPLOY_FAILED", "message": "", "deployments": deployments}}}
    status = ServeApi(head.url, TOKEN).get()["m-1"]
    assert status.message == "EngineFailed: vLLM refuses its arguments; change X"
    assert status.deployments is not None
    assert status.deployments["engine"].message == said, "the whole of it is kept for the log"


def test_a_put_names_every_application_and_stays_on_loopback(head: Head) -> None:
    ServeApi(head.url, TOKEN).put([{"name": "a"}, {"name": "b"}], 8123)
    assert [app["name"] for app in head.put["applications"]] == ["a", "b"]
    assert (head.put["http_options"]["host"], head.put["http_options"]["port"]) == ("127.0.0.1", 8123)
    assert head.put["proxy_location"] == "HeadOnly"


def test_no_request_is_written_into_serves_access_log(head: Head) -> None:
    ServeApi(head.url, TOKEN).put([], 8123)
    assert head.put["logging_config"] == {"enable_access_log": False}


def test_a_put_that_serve_refuses_is_an_error_with_its_reason(head: Head) -> None:
    head.serve_status = 400
    with pytest.raises(ClusterFailed, match="no such field"):
        ServeApi(head.url, TOKEN).put([], 8123)


def test_what_a_policy_noted_is_read_beside_the_controllers_log(head: Head) -> None:
    api = ServeApi(head.url, TOKEN)
    assert api.scaling("chat-1-local") is None, "nobody has said yet where the controller runs"
    head.serve = {"controller_info": {"node_id": "n1"}, "applications": {}}
    api.get()
    assert api.scaling("chat-1-local") is None
    head.files["fastserve_scaling_chat-1-local.json"] = json.dumps({"app": "chat-1-local", "wanted": 2})
    assert api.scaling("chat-1-local") == {"app": "chat-1-local", "wanted": 2}
    head.files["fastserve_scaling_chat-1-local.json"] = '{"app": "chat-1-l'
    assert api.scaling("chat-1-local") is None


@pytest.mark.parametrize("told", [[], {}, {"data": None}, ["x"], {"applications": 3}, {"applications": {"a": []}}])
def test_an_answer_that_is_not_rays_is_said_so(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is wrong with it: then one head is to blame, and not the one who asks."""
    monkeypatch.setattr(RayRest, "call", lambda *_, **__: httpx.Response(200, json=told))
    calls = (
        Jobs("http://h", "").all,
        ServeApi("http://h", "").get,
        lambda: Jobs("http://h", "").find("job"),
        lambda: machines("http://h", ""),
    )
    said = []
    for call in calls:
        try:
            call()
        except ClusterFailed as error:
            said.append(str(error))
    assert said
    assert all("http://h is not understood" in text for text in said)


def test_an_answer_that_is_no_json_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RayRest, "call", lambda *_, **__: httpx.Response(200, text="<html>a proxy</html>"))
    for call in (Jobs("http://h", "").all, ServeApi("http://h", "").get, lambda: machines("http://h", "")):
        with pytest.raises(ClusterFailed, match="is not understood"):
            call()

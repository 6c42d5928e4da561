"""Stages as Ray jobs, through the Jobs REST API: the very calls that work on a laptop and on a cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self
from urllib.parse import quote

from fastserve.cluster.ray_rest import RayRest
from fastserve.errors import ClusterFailed

SUBMIT_SECONDS = 60.0
"""How long a fresh head may take until it has an agent that starts jobs."""


class JobState(StrEnum):
    """Ray's own words for how a job stands."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the head knows it."""

    submission_id: str
    state: JobState
    message: str = ""
    """What Ray says of it; for a job that failed, the end of its log."""

    started_at: float | None = None
    """Unix seconds."""

    ended_at: float | None = None
    """Unix seconds; None while it runs."""

    exit_code: int | None = None
    """Of its entrypoint; None while it runs and when it was killed with its head."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From an answer of the Jobs API."""
        return cls(
            submission_id=value["submission_id"],
            state=JobState(value["status"]),
            message=value.get("message") or "",
            started_at=_seconds(value.get("start_time")),
            ended_at=_seconds(value.get("end_time")),
            exit_code=value.get("driver_exit_code"),
        )


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


class Jobs:
    """The jobs of one Ray head."""

    def __init__(self, dashboard_url: str, token: str) -> None:
        self._rest = RayRest(dashboard_url, token)

    def submit(self, submission_id: str, entrypoint: str, env: Mapping[str, str], cpus: float = 0) -> None:
        """Start `entrypoint`, a shell command, under this id. Submitting an id again changes nothing.

        env: variables on top of the head's environment. cpus: logical CPUs that the driver itself holds.
        Raises ClusterFailed when the head does not take it.
        """
        value: dict[str, Any] = {"submission_id": submission_id, "entrypoint": entrypoint, "entrypoint_num_cpus": cpus}
        if env:
            value["runtime_env"] = {"env_vars": dict(env)}
        deadline = time.monotonic() + SUBMIT_SECONDS
        while True:
            response = self._rest.call("POST", "/api/jobs/", value=value, answer_seconds=SUBMIT_SECONDS)
            # Ray answers a second submission with an error that is only told apart by its text, so look instead.
            if response.is_success or self.find(submission_id) is not None:
                return
            if response.status_code < 500 or time.monotonic() > deadline:
                raise self._rest.failed(response, f"start job {submission_id}")
            time.sleep(0.5)

    def find(self, submission_id: str) -> Job | None:
        """One job; None when the head does not know it."""
        response = self._rest.call("GET", _path(submission_id))
        if response.status_code == 404:
            return None
        if not response.is_success:
            raise self._rest.failed(response, f"say how job {submission_id} stands")
        with self._rest.understood():
            return Job.from_json(response.json())

    def state(self, submission_id: str) -> JobState | None:
        """How a job stands; None when the head does not know it."""
        job = self.find(submission_id)
        return None if job is None else job.state

    def all(self) -> dict[str, Job]:
        """Every job that was submitted to this head, by its id."""
        response = self._rest.call("GET", "/api/jobs/")
        if not response.is_success:
            raise self._rest.failed(response, "list its jobs")
        # Drivers that connect by themselves are listed too, without a submission id; they are not ours.
        with self._rest.understood():
            jobs = [Job.from_json(value) for value in response.json() if value.get("submission_id")]
        return {job.submission_id: job for job in jobs}

    def stop(self, submission_id: str) -> None:
        """Ask a job to end: SIGTERM, and SIGKILL when it does not listen.

        Nothing to do when it has ended or is unknown.
        """
        response = self._rest.call("POST", _path(submission_id, "/stop"))
        if not response.is_success and response.status_code != 404:
            raise self._rest.failed(response, f"stop job {submission_id}")

    def logs(self, submission_id: str, last_lines: int | None = None) -> str:
        """What a job wrote, or the end of it.

        Empty when the head does not know the job, or it has not begun to write.
        """
        if self.find(submission_id) is None:
            return ""
        response = self._rest.call("GET", _path(submission_id, "/logs"))
        if not response.is_success:
            raise self._rest.failed(response, f"show the log of job {submission_id}")
        text = str(response.json().get("logs") or "")
        if last_lines is None:
            return text
        return "".join(text.splitlines(keepends=True)[-last_lines:]) if last_lines > 0 else ""

    def await_end(self, submission_id: str, seconds: float) -> Job:
        """The job when it has ended. Raises ClusterFailed when it does not within `seconds`, or is unknown."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.find(submission_id)
            if job is None:
                raise ClusterFailed(f"the Ray head does not know the job {submission_id}; run `fastserve up` again")
            if job.ended_at is not None or job.state in (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED):
                return job
            if time.monotonic() > deadline:
                raise ClusterFailed(f"job {submission_id} has not ended in {seconds:.0f}s; see `fastserve logs`")
            time.sleep(0.3)


def _path(submission_id: str, tail: str = "") -> str:
    return f"/api/jobs/{quote(submission_id, safe='')}{tail}"

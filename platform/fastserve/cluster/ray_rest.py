"""Calls to a Ray head's REST API: one place that knows the token, the waiting times and what each failure means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from fastserve.errors import ClusterFailed

CONNECT_SECONDS = 5.0


class RayRest:
    """The REST API of one head. Jobs and Serve share it, on a laptop as on a cluster."""

    def __init__(self, dashboard_url: str, token: str) -> None:
        """token: sent as a bearer token; empty when the head asks for none."""
        self._url = dashboard_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def call(self, method: str, path: str, *, value: Any = None, answer_seconds: float = 30.0) -> httpx.Response:
        """One request; `value` goes as JSON. The answer may have any status but 401 and 403.

        answer_seconds: longest wait for the answer. Raises ClusterFailed when there is none, or the token is refused.
        """
        timeout = httpx.Timeout(answer_seconds, connect=CONNECT_SECONDS)
        try:
            # trust_env: a proxy that the shell names must never see the token.
            with httpx.Client(trust_env=False, timeout=timeout, headers=self._headers) as client:
                response = client.request(method, self._url + path, json=value)
        except httpx.TimeoutException as error:
            raise ClusterFailed(
                f"the Ray head at {self._url} did not answer {method} {path} in {answer_seconds:.0f}s; "
                "the machine is very busy or the head hangs: try again, or run `fastserve down` and `fastserve up`"
            ) from error
        except httpx.HTTPError as error:
            raise ClusterFailed(
                f"the Ray head at {self._url} does not answer ({error}); run `fastserve up` again to start it"
            ) from error
        if response.status_code == 401:
            raise ClusterFailed(
                f"the Ray head at {self._url} asks for a token (401); run `fastserve down` and `fastserve up`"
            )
        if response.status_code == 403:
            raise ClusterFailed(
                f"the Ray head at {self._url} refuses this home's token (403): it belongs to another home; "
                "run `fastserve down` and `fastserve up`"
            )
        return response

    @contextmanager
    def understood(self) -> Iterator[None]:
        """While the block reads an answer. Raises ClusterFailed for one that is not as Ray's own: then one head is to
        blame, and whoever looks at several goes on with the others."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ClusterFailed(
                f"what answers at {self._url} is not understood ({error!r}); is it a Ray head, and of this version?"
            ) from error

    def failed(self, response: httpx.Response, what: str) -> ClusterFailed:
        """The error for an answer that is not a success, with the last line of what the head said."""
        lines = response.text.strip().splitlines()
        said = lines[-1][:300] if lines else "nothing"
        return ClusterFailed(
            f"the Ray head at {self._url} could not {what} ({response.status_code}: {said}); see its logs"
        )

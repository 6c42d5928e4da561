"""Every answer that is not a success, in the one shape that OpenAI clients read.

Engines, Ray Serve and FastAPI each have an error format of their own, and some are plain text. Clients branch on
`error.code` and on `Retry-After` (openai-python stops retrying above 120 s), so all of them are translated here.
Inner addresses, stack traces and routes never pass outwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fastserve.errors import FastServeError

RETRY_AFTER_SECONDS = 5
LONGEST_MESSAGE = 2000
"""Characters of an engine's message that are passed on."""

_DIMENSIONS = re.compile(r"matryoshka|supports dimensions", re.IGNORECASE)
_SCHEMA = re.compile(r"json schema|grammar", re.IGNORECASE)


class Refusal(FastServeError):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The answer's JSON body."""
        return json.dumps({"error": self.error()}).encode()

    def error(self) -> dict[str, str | None]:
        """The inside of the body: message, type, param, code."""
        return {"message": self.message, "type": type_of(self.status), "param": self.param, "code": self.code}

    def event(self) -> bytes:
        """The answer as the last event of a stream that has already begun."""
        return b"data: " + self.body + b"\n\n"


def type_of(status: int) -> str:
    """OpenAI's error type for an HTTP status."""
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """A 400 that names the field."""
    return Refusal(400, message, param=param, code=code)


def unsupported(param: str, message: str | None = None) -> Refusal:
    """A 400 for a field that is known and not allowed."""
    return bad_request(message or f"'{param}' is not supported here; leave it out.", param, "unsupported_parameter")


def model_not_found(model: str) -> Refusal:
    """The same answer for a model that does not exist and for one that the key may not ask for."""
    return Refusal(
        404,
        f"The model '{model[:128]}' does not exist or this key may not use it; GET /v1/models lists those it may.",
        code="model_not_found",
        param="model",
    )


def model_loading(model: str) -> Refusal:
    """No replica could take the request in the time that it may wait."""
    return Refusal(
        503,
        f"No replica of the model '{model}' could take the request in time; try again soon, "
        f"'fastserve status {model}' says how far it is.",
        code="model_loading",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def overloaded(model: str) -> Refusal:
    """The model has no free slot, and too many wait already."""
    return Refusal(
        429,
        f"The model '{model}' is busy; try again soon.",
        code="overloaded",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def unreachable() -> Refusal:
    """No replica could be asked, or it was lost before it had said anything."""
    return Refusal(
        503,
        "The model's replica was lost before it answered; try again.",
        code="upstream_unavailable",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def upstream_lost() -> Refusal:
    """A replica was lost in the middle of a stream."""
    return Refusal(
        502, "The model's replica was lost in the middle of the answer; send the request again.", code="upstream_lost"
    )


def too_slow(seconds: float) -> Refusal:
    """The whole time of a request is used up."""
    return Refusal(
        504,
        f"The answer was not complete after {seconds:g} s; ask for fewer tokens (max_tokens).",
        code="deadline_exceeded",
    )


def stopping() -> Refusal:
    """The gateway is being stopped."""
    return Refusal(
        503,
        "The gateway is being stopped; send the request again.",
        code="gateway_stopping",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


def translate(status: int, content_type: str, body: bytes, model: str) -> Refusal:
    """An engine's, FastAPI's or Ray Serve's error as ours.

    status, content_type, body: as received; the body may be cut.
    Only messages of 4xx are passed on: a 5xx talks about the inside.
    """
    found = _read(content_type, body)
    if found is None:
        # Ray Serve answers for itself in plain text: no such route (404), replica died (500), none free (503).
        return model_loading(model) if status in (404, 503) else _without_words(status, model)
    message, param = found
    if status in (400, 422):
        return _engines_words(message, param, model)
    if status == 404 and message != "Not Found":
        return model_not_found(model)
    if status == 413:
        return Refusal(413, message, param=param, code="request_too_large")
    return _without_words(status, model)


def _engines_words(message: str, param: str | None, model: str) -> Refusal:
    """An engine's 400; clients get the field's name and a code where the engine gave none."""
    if "maximum context length" in message:
        return bad_request(message, param, "context_length_exceeded")
    if "tool choice requires" in message:
        words = (
            f"The model '{model}' has no parser for calls of tools; leave 'tools' out. (Whoever serves the model can "
            "name one in serve.engine.extraArgs: --enable-auto-tool-choice, --tool-call-parser=NAME.)"
        )
        return bad_request(words, "tools", "unsupported_parameter")
    if _DIMENSIONS.search(message):
        return bad_request(message, param or "dimensions")
    if _SCHEMA.search(message):
        return bad_request(message, param or "response_format", "invalid_json_schema")
    return bad_request(message, param)


def _without_words(status: int, model: str) -> Refusal:
    if status in (400, 422):
        return Refusal(400, f"The engine of the model '{model}' did not understand the request.")
    if status == 429:
        return overloaded(model)
    if status in (500, 502, 503):
        return unreachable()
    if status == 504:
        return Refusal(504, f"The model '{model}' did not answer in time; try again.", code="upstream_timeout")
    return Refusal(
        502,
        f"The model '{model}' answered with the unexpected status {status}; 'fastserve logs {model} serve' shows why.",
        code="upstream_failed",
    )


def _read(content_type: str, body: bytes) -> tuple[str, str | None] | None:
    """Message and param of an error body; None when it is not one that an application wrote."""
    if "json" not in content_type:
        return None
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if "detail" in value:
        return _fastapi(value["detail"])
    inner = value["error"] if isinstance(value.get("error"), dict) else value
    message = inner.get("message") or value.get("error")
    if not isinstance(message, str):
        return None
    param = inner.get("param")
    return message[:LONGEST_MESSAGE], param if isinstance(param, str) else None


def _fastapi(detail: object) -> tuple[str, str | None]:
    """FastAPI's `{"detail": "words"}` or `{"detail": [{"loc": ["body", "messages", 0], "msg": "words"}]}`."""
    first = detail[0] if isinstance(detail, list) and detail else detail
    if not isinstance(first, dict):
        return str(first)[:LONGEST_MESSAGE], None
    place = first.get("loc")
    param = ".".join(str(step) for step in place if step != "body") if isinstance(place, list | tuple) else None
    return str(first.get("msg", "The request is not valid."))[:LONGEST_MESSAGE], param or None

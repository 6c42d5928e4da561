"""`fastserve chat`: one answer, or a conversation, streamed through the gateway like any client's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from fastserve.cli import render
from fastserve.cluster.access import local_key
from fastserve.cluster.gateway_process import GatewayProcess
from fastserve.cluster.home import Home
from fastserve.errors import ClusterFailed, UsageInvalid

Message = dict[str, str]


def chat(home: Home, name: str, message: str | None, max_tokens: int, temperature: float, as_json: bool) -> None:
    """One question, or questions line by line until the input ends."""
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    if message is not None:
        _turn(home, name, [{"role": "user", "content": message}], settings, as_json)
        return
    talk: list[Message] = []
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if line.strip():
            talk.append({"role": "user", "content": line})
            talk.append({"role": "assistant", "content": _turn(home, name, talk, settings, as_json)})


def _turn(home: Home, name: str, talk: Sequence[Message], settings: Mapping[str, Any], as_json: bool) -> str:
    said = []
    for piece in stream(home, name, talk, settings):
        said.append(piece)
        if not as_json:
            render.answer(piece, end="")
    text = "".join(said)
    if as_json:
        render.as_json({"model": name, "content": text})
    else:
        render.answer("")
    return text


def stream(home: Home, name: str, talk: Sequence[Message], settings: Mapping[str, Any]) -> Iterator[str]:
    """The answer's text, piece by piece as it is generated.

    Raises UsageInvalid when nothing serves or the model is unknown, ClusterFailed when the answer was cut.
    """
    gateway = GatewayProcess(home)
    if gateway.url is None or not gateway.alive():
        raise UsageInvalid(f"nothing serves in {home.path}; run `fastserve up FILE` first, or name its --home")
    body = {"model": name, "messages": list(talk), "stream": True, **settings}
    headers = {"Authorization": f"Bearer {local_key(home)}"}
    finished = False
    try:
        with httpx.stream(
            "POST", f"{gateway.url}/chat/completions", json=body, headers=headers, timeout=600
        ) as response:
            if response.status_code != 200:
                raise _refused(response)
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    finished = True
                elif line.startswith("data: "):
                    yield from _text(json.loads(line[6:]))
    except httpx.TransportError as error:
        raise ClusterFailed(
            f"the endpoint at {gateway.url} broke off ({error}); try again, `fastserve status {name}` shows its state"
        ) from error
    if not finished:
        raise ClusterFailed(f"the answer was cut short; try again, `fastserve status {name}` shows the model's state")


def _text(event: Mapping[str, Any]) -> Iterator[str]:
    if "error" in event:
        raise ClusterFailed(f"the answer was cut short: {event['error'].get('message', event['error'])}")
    for choice in event.get("choices", ()):
        piece = choice.get("delta", {}).get("content")
        if piece:
            yield piece


def _refused(response: httpx.Response) -> Exception:
    response.read()
    try:
        error = response.json()["error"]
        message, code = error["message"], error.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = response.text[:300], None
    if response.status_code in (400, 404):
        return UsageInvalid(message)
    return ClusterFailed(f"{message} ({code or response.status_code})")

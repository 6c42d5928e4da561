"""`fastserve chat`: one answer, or a conversation, streamed through the gateway like any client's."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx

from fastserve.cli import render
from fastserve.cluster.access import local_key
from fastserve.cluster.gateway_process import GatewayProcess
from fastserve.cluster.home import Home
from fastserve.errors import ClusterFailed, UsageInvalid

if TYPE_CHECKING:
    from fastserve.cluster.kube.door import Door

KEY_SECONDS = 90.0
"""How long a new key may take until every gateway has it; a volume is renewed within a minute or so."""

Message = dict[str, str]
Answer = Callable[[Sequence[Message]], Iterator[str]]
"""Streams the answer to a conversation."""


def chat(home: Home, name: str, message: str | None, max_tokens: int, temperature: float, as_json: bool) -> None:
    """Talk to a model of this machine."""
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    converse(lambda talk: stream(home, name, talk, settings), name, message, as_json)


def chat_on_cluster(
    door: Door, name: str, message: str | None, url: str | None, settings: Mapping[str, Any], as_json: bool
) -> None:
    """Talk to a model of a cluster, with a key that may be read there.

    url: of the gateway, where it is reached without Kubernetes; by default the model's own, and where that is a name
    inside the cluster, a forwarded port of its Service.
    """
    from fastserve.cluster.kube.forward import forwarded
    from fastserve.cluster.kube.gateway import NAME, PORT
    from fastserve.cluster.kube.keys import key_for

    own = door.story(name)["url"]
    if own is None and url is None:
        raise UsageInvalid(f"{name} answers nowhere yet; `fastserve why {name} -n {door.namespace}` says why")
    base = url or own
    with contextlib.ExitStack() as stack:
        key = stack.enter_context(key_for(door, name))
        if (urlsplit(base).hostname or "").endswith((".svc", ".svc.cluster.local")):
            base = f"{stack.enter_context(forwarded(door.reached, NAME, PORT))}/v1"
        base = base.rstrip("/")
        _await_key(base, key)
        converse(lambda talk: stream_from(base, key, name, talk, settings), name, message, as_json)


def _await_key(url: str, key: str) -> None:
    """Wait until the gateway knows a key; one that was made now is on its way there."""
    end = time.monotonic() + KEY_SECONDS
    headers, trust = {"Authorization": f"Bearer {key}"}, _is_elsewhere(url)
    try:
        while httpx.get(f"{url}/models", headers=headers, timeout=30, trust_env=trust).status_code == 401:
            if time.monotonic() > end:
                raise ClusterFailed(f"the gateway at {url} does not know the key in {KEY_SECONDS:.0f}s; try again")
            time.sleep(0.3)
    except httpx.TransportError as error:
        raise ClusterFailed(
            f"the gateway at {url} does not answer ({error}); name another address with --url"
        ) from error


def converse(answer: Answer, name: str, message: str | None, as_json: bool) -> None:
    """One question, or questions line by line until the input ends."""
    if message is not None:
        _turn(answer, name, [{"role": "user", "content": message}], as_json)
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
            talk.append({"role": "assistant", "content": _turn(answer, name, talk, as_json)})


def _turn(answer: Answer, name: str, talk: Sequence[Message], as_json: bool) -> str:
    said = []
    for piece in answer(talk):
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
    """The answer's text from this machine's gateway, piece by piece as it is generated.

    Raises UsageInvalid when nothing serves or the model is unknown, ClusterFailed when the answer was cut.
    """
    gateway = GatewayProcess(home)
    if gateway.url is None or not gateway.alive():
        raise UsageInvalid(f"nothing serves in {home.path}; run `fastserve up FILE` first, or name its --home")
    yield from stream_from(gateway.url, local_key(home), name, talk, settings)


def stream_from(url: str, key: str, name: str, talk: Sequence[Message], settings: Mapping[str, Any]) -> Iterator[str]:
    """The answer's text from the gateway at a base URL, piece by piece. Raises as `stream` does."""
    body = {"model": name, "messages": list(talk), "stream": True, **settings}
    headers = {"Authorization": f"Bearer {key}"}
    finished = False
    try:
        with httpx.stream(
            "POST", f"{url}/chat/completions", json=body, headers=headers, timeout=600, trust_env=_is_elsewhere(url)
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
            f"the endpoint at {url} broke off ({error}); try again, `fastserve status {name}` shows its state"
        ) from error
    if not finished:
        raise ClusterFailed(f"the answer was cut short; try again, `fastserve status {name}` shows the model's state")


def _is_elsewhere(url: str) -> bool:
    """Whether a proxy that the shell names may be asked: never for this machine, since it must not see the key."""
    return urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1")


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

"""Secrets from the outside: cleaned once at the door, and kept out of every message.

A token file often ends in a newline; sent as it is, it becomes an illegal header and an error that prints the token.

On a laptop they come from variables. On a cluster a source names a Secret, and gets that one's values and no others:
the operator reads it by name (`secrets_from`), and Ray's machines have it as files, which the chart mounts (`FOLDER`).
So no secret travels with a job, and none stands in a store or a log.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fastserve.errors import SecretMissing, SourceInvalid

FOLDER = "FASTSERVE_TOKENS"
"""Variable that names a folder with a folder for each Secret that sources may name: each key is a file."""

MOUNT_SECONDS = 90.0
"""A kubelet brings a Secret that was made just now to its pods within a minute or so."""

KEYS = ("token", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""Keys of such a Secret: `token` for the hub, the others for a bucket."""

_reader: ContextVar[Callable[[str], Mapping[str, str]] | None] = ContextVar("reader", default=None)


@contextmanager
def secrets_from(read: Callable[[str], Mapping[str, str]]) -> Iterator[None]:
    """While the block runs, the Secrets that sources name are read so, in this thread.

    read: takes a Secret's name, gives its values by key. Raises SecretMissing.
    """
    before = _reader.set(read)
    try:
        yield
    finally:
        _reader.reset(before)


def variables_of(token_secret: str | None, environment: Mapping[str, str]) -> Mapping[str, str]:
    """The variables that a source's credentials are read from: on a laptop, and for a source that names no Secret, the
    process' own; else what the Secret holds. Raises SecretMissing."""
    read, folder = _reader.get(), environment.get(FOLDER, "").strip()
    if token_secret is None or (read is None and not folder):
        return environment
    values = read(token_secret) if read is not None else mounted(Path(folder), token_secret)
    found = {key: text for key, text in values.items() if key in KEYS}
    if not found:
        raise SecretMissing(
            f"the Secret {token_secret} (tokenSecret) has none of the keys {', '.join(KEYS)}; "
            "put the token under `token`"
        )
    return {("HF_TOKEN" if key == "token" else key): text for key, text in found.items()}


def mounted(folder: Path, name: str, seconds: float = MOUNT_SECONDS) -> Mapping[str, str]:
    """The values of a mounted Secret by key; one that is not there yet is waited for.

    Raises SecretMissing when it is not mounted, or does not come.
    """
    place = folder / name
    if name != Path(name).name or name == ".." or not place.is_dir():
        raise SecretMissing(
            f"the Secret {name} (tokenSecret) is not mounted on Ray's machines; add it to the chart's ray.tokenSecrets"
        )
    end = time.monotonic() + seconds
    while not (found := {key: (place / key).read_text() for key in KEYS if (place / key).is_file()}):
        if time.monotonic() > end:
            raise SecretMissing(
                f"the Secret {name} (tokenSecret) is not there, or has none of the keys {', '.join(KEYS)}; "
                "make it in the Model's namespace"
            )
        time.sleep(min(1.0, seconds))
    return found


class Secret:
    """A value that no `repr`, log line or traceback shows. `reveal()` where it is put on the wire, nowhere else."""

    __slots__ = ("_value", "name")

    def __init__(self, value: str, name: str) -> None:
        self._value = value
        self.name = name

    def reveal(self) -> str:
        """The value itself."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({self.name})"

    __str__ = __repr__


def clean(value: str | None, name: str) -> Secret | None:
    """The secret without one newline and blanks at its ends; None when nothing is left: then no header is sent.

    name: what the user knows it by, such as `HF_TOKEN`; the only thing a message shows.
    Raises SourceInvalid for a blank or a control character inside.
    """
    text = (value or "").strip(" \t")
    text = text.removesuffix("\n").removesuffix("\r").strip(" \t")
    if not text:
        return None
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise SourceInvalid(
            f"{name} has a control character or a second line inside; write the token alone, on one line"
        )
    if any(letter.isspace() for letter in text):
        raise SourceInvalid(f"{name} has a blank inside; write the token alone, without blanks")
    if not text.isascii():
        raise SourceInvalid(f"{name} has a letter that no token has; copy the token again")
    return Secret(text, name)


def hub_token(token_secret: str | None, environment: Mapping[str, str]) -> Secret | None:
    """The hub's token: on a laptop always from HF_TOKEN, whatever Secret the manifest names for the cluster."""
    name = f"HF_TOKEN (tokenSecret: {token_secret})" if token_secret else "HF_TOKEN"
    return clean(environment.get("HF_TOKEN"), name)


def s3_credentials(token_secret: str | None, environment: Mapping[str, str]) -> dict[str, Secret]:
    """Arguments of boto3's client by name, from the AWS variables; empty when none is set (boto3 then looks further).

    Raises SourceInvalid when one of the two keys is set without the other.
    """
    behind = f" (tokenSecret: {token_secret})" if token_secret else ""
    found: dict[str, Secret] = {}
    for argument in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token"):
        secret = clean(environment.get(argument.upper()), argument.upper() + behind)
        if secret is not None:
            found[argument] = secret
    if ("aws_access_key_id" in found) != ("aws_secret_access_key" in found):
        raise SourceInvalid(f"only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set{behind}; set both or none")
    return found

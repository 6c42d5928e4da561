"""Secrets from the outside: cleaned once at the door, and kept out of every message.

A token file often ends in a newline; sent as it is, it becomes an illegal header and an error that prints the token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from fastserve.errors import SourceInvalid


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

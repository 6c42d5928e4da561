"""Forms with a file (multipart/form-data, RFC 7578): taken apart, and written anew for the engine.

A form is never passed on raw: parsers disagree about odd ones, and what one of them overlooks the next one reads. Only
fields that were understood and the file's bytes go inwards, under a boundary and a file name of our own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.gateway.answers import Refusal, bad_request

FORM = "multipart/form-data"
MOST_PARTS = 32
LONGEST_HEAD_BYTES = 2048
LONGEST_FIELD_BYTES = 64 * 1024
KINDS = ("flac", "m4a", "mp3", "mp4", "mpeg", "mpga", "oga", "ogg", "wav", "webm")
"""Endings of the files that may be sent."""

_BOUNDARY = re.compile(r"""boundary=(?:"([^"\\\r\n]{1,70})"|([^\s;,"]{1,70}))""", re.IGNORECASE)
_NAME = re.compile(r'(?:^|;)[ \t]*name="([^"\r\n]{1,64})"', re.IGNORECASE)
_FILE_NAME = re.compile(r'(?:^|;)[ \t]*filename="([^"\r\n]{0,255})"', re.IGNORECASE)
_PLAIN = ("", "7bit", "8bit", "binary")


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a form."""

    kind: str
    """One of KINDS."""

    data: bytes


def parse(content_type: str, body: bytes, lists: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a form: texts, for names in `lists` a list of texts, for a file an Upload.

    content_type: the header, with the boundary in it.

    Raises Refusal (400): `invalid_form`, or with the field's name as param.
    """
    found: dict[str, Any] = {}
    for head, content in _parts(content_type, body):
        disposition = head.get("content-disposition", "")
        name = _NAME.search(disposition)
        if not disposition.lower().startswith("form-data") or name is None:
            raise _invalid("has a part without a name")
        if head.get("content-transfer-encoding", "").lower() not in _PLAIN:
            raise _invalid("has a part with a Content-Transfer-Encoding")
        file_name = _FILE_NAME.search(disposition)
        value = _text(content, name[1]) if file_name is None else _upload(file_name[1], content, name[1])
        if name[1] in lists:
            found.setdefault(name[1], []).append(value)
        elif name[1] in found:
            raise bad_request(f"'{name[1]}' stands twice in the form.", name[1])
        else:
            found[name[1]] = value
    return found


def build(fields: Mapping[str, object], file: Upload) -> tuple[str, bytes]:
    """A form with these fields (a list gives one part an item) and the file as `file`; its content type and body."""
    boundary = f"fastserve-{secrets.token_hex(16)}"
    parts = []
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{item}\r\n'.encode())
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="audio.{file.kind}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode()
    )
    parts += [file.data, f"\r\n--{boundary}--\r\n".encode()]
    return f"{FORM}; boundary={boundary}", b"".join(parts)


def _parts(content_type: str, body: bytes) -> list[tuple[dict[str, str], bytes]]:
    match = _BOUNDARY.search(content_type)
    if match is None:
        raise _invalid("has no boundary in its Content-Type")
    mark = b"--" + (match[1] or match[2]).encode("latin-1", "replace")
    pieces = (b"\r\n" + body).split(b"\r\n" + mark, MOST_PARTS + 2)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise _invalid(f"is not complete, or has more than {MOST_PARTS} parts")
    parts = []
    for piece in pieces[1:-1]:
        head, end, content = piece.partition(b"\r\n\r\n")
        if not end or not head.startswith(b"\r\n") or len(head) > LONGEST_HEAD_BYTES:
            raise _invalid("has a part without a head")
        lines = head[2:].decode("utf-8", "replace").split("\r\n")
        parts.append(
            ({name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}, content)
        )
    return parts


def _text(content: bytes, name: str) -> str:
    if len(content) > LONGEST_FIELD_BYTES:
        raise bad_request(f"'{name}' is longer than {LONGEST_FIELD_BYTES} bytes.", name)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise bad_request(f"'{name}' is not a text in UTF-8.", name) from None


def _upload(file_name: str, content: bytes, name: str) -> Upload:
    kind = file_name.rpartition(".")[2].lower()
    if kind not in KINDS:
        raise bad_request(f"'{name}' is not a file whose name ends with one of {', '.join(KINDS)}.", name)
    if not content:
        raise bad_request(f"'{name}' is an empty file.", name)
    return Upload(kind, content)


def _invalid(what: str) -> Refusal:
    return bad_request(f"The form {what}; send {FORM}.", code="invalid_form")

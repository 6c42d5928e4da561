"""Which store a place names."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from fastserve.artifacts.store import Store, problem_of
from fastserve.errors import UsageInvalid


def open_store(uri: str) -> Store:
    """The store at `/path`, `path`, `file:///path` or `s3://bucket[/prefix][?endpoint=URL&region=NAME]`.

    Without `endpoint`, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL decide, then AWS itself. Nothing is read or made yet.
    Raises UsageInvalid for anything else.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme is None:
        return _folder(Path(uri).expanduser())
    if scheme[1] == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or parts.query or not parts.path.startswith("/"):
            raise UsageInvalid(f"'{uri}' is no folder of this machine; write file:///path or a plain path")
        return _folder(Path(unquote(parts.path)))
    if scheme[1] == "s3":
        return _bucket(uri)
    raise UsageInvalid(f"a store cannot be at '{scheme[0]}'; use a folder or s3://bucket/prefix")


def _folder(path: Path) -> Store:
    from fastserve.artifacts.folder_store import FolderStore

    return FolderStore(path)


def _bucket(uri: str) -> Store:
    from fastserve.artifacts.s3_store import S3Store

    shown = uri.partition("?")[0]
    if "@" in shown:
        raise UsageInvalid(
            "an s3:// store must not carry credentials; put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    parts = urlsplit(uri)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", parts.netloc) or parts.fragment:
        raise UsageInvalid(
            f"'{shown}' names no bucket; write s3://bucket/prefix with 3 to 63 lower-case letters, digits, '.' or '-'"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(set(options) - {"endpoint", "region"}):
        raise UsageInvalid(f"'{shown}?{unknown[0]}=' is not known; a store takes ?endpoint= and &region=")
    prefix = unquote(parts.path).strip("/")
    if prefix and (problem := problem_of(prefix)):
        raise UsageInvalid(f"'{shown}' has a prefix that cannot be used: {problem}")
    return S3Store(parts.netloc, prefix, endpoint=options.get("endpoint"), region=options.get("region"))

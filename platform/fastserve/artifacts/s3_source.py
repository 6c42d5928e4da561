"""Sources in a bucket: one object, everything below a prefix, or a pattern such as `s3://acme/chats/*.jsonl`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.artifacts import s3_client
from fastserve.artifacts.file_types import choose
from fastserve.artifacts.resolved import CHUNK_BYTES, Resolved, SourceFile, Tick
from fastserve.artifacts.tokens import s3_credentials, variables_of
from fastserve.errors import DigestMismatch, SourceInvalid, SourceNotFound, StageFailed, StoreFailed
from fastserve.plan.digest import digest_of
from fastserve.plan.keys import Role, ident_of
from fastserve.spec.source import Source

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_LISTED_LIMIT = 100_000
_CHANGED = {"PreconditionFailed", "412", "NoSuchKey", "404", "ConditionalRequestConflict"}


class S3Source:
    """Objects of one bucket; AWS_ENDPOINT_URL names another server than AWS."""

    def __init__(self, source: Source, role: Role) -> None:
        self._ident = ident_of(source)
        self._role = role
        self._token_secret = source.token_secret
        self._variables = variables_of(source.token_secret, os.environ)
        self._bucket, _, self._path = source.uri.removeprefix("s3://").partition("/")
        self._made: S3Client | None = None

    def resolve(self, digest: str | None = None) -> Resolved:
        """List the objects and their ETags."""
        del digest  # a bucket without versions has no history
        try:
            prefix, pattern = _split_pattern(self._path)
        except re.error as error:
            raise SourceInvalid(f"{self._ident}: the pattern cannot be read ({error}); use *, ** or ?") from error
        with self._errors(SourceNotFound):
            listed = self._list(prefix)
        single = pattern is None and self._path in listed
        if single:
            start = self._path.rpartition("/")[0] + "/" if "/" in self._path else ""
            keys = [self._path]
        else:
            start = prefix[: prefix.rfind("/") + 1] if pattern else (self._path.rstrip("/") + "/" if self._path else "")
            keys = [key for key in listed if key.startswith(start) and (pattern is None or pattern.fullmatch(key))]
        if not keys:
            raise SourceNotFound(
                f"{self._ident}: no object in bucket '{self._bucket}' matches '{self._path}'; correct the "
                f"path{self._where()}"
            )
        names = choose([key.removeprefix(start) for key in keys], self._role, self._ident, remote=True)
        files = tuple(
            SourceFile(name, listed[start + name][0], start + name, listed[start + name][1]) for name in names
        )
        content = [[file.path, file.size_bytes, file.stamp] for file in files]
        return Resolved(self._ident, "s3", self._role, digest_of(content), files, single)

    def pull(self, file: SourceFile, target: Path, tick: Tick) -> None:
        """Stream one object, if it still has the ETag that it was resolved with."""
        received = 0
        with self._errors(StageFailed):
            answer = self._client.get_object(Bucket=self._bucket, Key=file.at, IfMatch=file.stamp)
            with target.open("xb") as new:
                for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                    new.write(chunk)
                    received += len(chunk)
                    tick(len(chunk))
        if received != file.size_bytes or answer["ETag"] != file.stamp:
            raise self._changed(file.at)

    def head(self, file: SourceFile, size_bytes: int) -> bytes:
        """First bytes of one object."""
        with self._errors(SourceNotFound):
            wanted = f"bytes=0-{size_bytes - 1}"
            answer = self._client.get_object(Bucket=self._bucket, Key=file.at, IfMatch=file.stamp, Range=wanted)
            return answer["Body"].read(size_bytes)

    def place(self, resolved: Resolved) -> Path | None:
        """Not on this machine."""

    @property
    def _client(self) -> S3Client:
        if self._made is None:
            s3_credentials(
                self._token_secret, self._variables
            )  # a bad one is the source's error, with its Secret's name
            self._made = s3_client.connect(s3_client.endpoint_of(None), variables=self._variables)
        return self._made

    def _list(self, prefix: str) -> dict[str, tuple[int, str]]:
        """Size and ETag by key, folders' own markers left out."""
        found: dict[str, tuple[int, str]] = {}
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):
                    found[item["Key"]] = (item["Size"], item["ETag"])
            if len(found) > _LISTED_LIMIT:
                raise SourceInvalid(
                    f"{self._ident}: more than {_LISTED_LIMIT} objects lie below '{prefix}'; name a narrower path"
                )
        return found

    @contextlib.contextmanager
    def _errors(self, kind: type[SourceNotFound] | type[StageFailed]) -> Iterator[None]:
        """What the server and boto say, as an error of the source."""
        from botocore.exceptions import ClientError

        try:
            with s3_client.s3_errors(self._bucket, s3_client.endpoint_of(None), self._path):
                yield
        except StoreFailed as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and kind is StageFailed and s3_client.code_of(cause) in _CHANGED:
                raise self._changed(self._path) from None
            raise kind(f"{self._ident}: {error}") from None

    def _changed(self, key: str) -> DigestMismatch:
        return DigestMismatch(
            f"{self._ident}: '{key}' changed in the bucket after it was resolved; run `fastserve up` again to use "
            "what is there now"
        )

    def _where(self) -> str:
        endpoint = s3_client.endpoint_of(None)
        return (
            f", or AWS_ENDPOINT_URL (now {endpoint})"
            if endpoint
            else ", or set AWS_ENDPOINT_URL for another server than AWS"
        )


def _split_pattern(path: str) -> tuple[str, re.Pattern[str] | None]:
    """The fixed beginning, and the pattern for whole keys: `*` stops at `/`, `**` does not."""
    first = min((path.find(letter) for letter in "*?[" if letter in path), default=-1)
    if first < 0:
        return path, None
    text = ""
    for piece in re.split(r"(\*\*/?|\*|\?|\[[^\]/]+\])", path):
        if piece.startswith("**"):
            text += "(?:.*/)?" if piece.endswith("/") else ".*"
        elif piece == "*":
            text += "[^/]*"
        elif piece == "?":
            text += "[^/]"
        elif piece.startswith("[") and piece.endswith("]"):
            text += "[" + piece[1:-1].replace("\\", r"\\").replace("!", "^", 1) + "]"
        else:
            text += re.escape(piece)
    return path[:first], re.compile(text)

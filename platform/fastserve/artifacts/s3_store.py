"""The store as a bucket: what a cluster's machines share.

A PUT is whole or absent by itself, and a multipart upload appears when it is completed, so nothing here renames. Each
part carries its MD5 for the server to compare; every download is hashed while it streams and takes its name only when
it is whole.
"""

from __future__ import annotations

import base64
import hashlib
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlencode

from fastserve.artifacts.durable import CHUNK_BYTES, disk_errors, expect, replace_file
from fastserve.artifacts.folder_store import open_local
from fastserve.artifacts.s3_client import code_of, connect, endpoint_of, is_aws, s3_errors
from fastserve.artifacts.s3_turns import Turns
from fastserve.artifacts.store import RESERVED, Checksum, Store, check_name, check_prefix
from fastserve.errors import StoreFailed

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

_MOST_PARTS = 10_000
_PARTS_AT_ONCE = 2  # times `parallel` files, times part_bytes: what an upload holds in memory
_TRIES = 5
_WRITER = "fastserve-writer"


class S3Store(Store):
    """Objects below `prefix` in a bucket.

    part_bytes: size of a part of a multipart upload (S3 wants 5 MiB at least); larger for files beyond 10,000 parts.
    turn_seconds: see `s3_turns`; only used where the server has no conditional writes.
    """

    parallel = 4

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        endpoint: str | None = None,
        region: str | None = None,
        *,
        part_bytes: int = 16 << 20,
        turn_seconds: float = 2.0,
    ) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.endpoint = endpoint_of(endpoint)
        self.region = region
        self.part_bytes = part_bytes
        self.turn_seconds = turn_seconds
        options = {"endpoint": self.endpoint, "region": region}
        query = urlencode({name: value for name, value in options.items() if value}, safe=":/[]")
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/") + (f"?{query}" if query else "")
        self._lock = threading.Lock()
        self._conditional: bool | None = True if is_aws(self.endpoint) else None

    def read(self, name: str) -> bytes:
        """One GET."""
        with self._errors(check_name(name)):
            return b"".join(self._stream(self.prefix + name))

    def write(self, name: str, data: bytes) -> None:
        """One PUT."""
        with self._errors(check_name(name)):
            self._client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data, ContentMD5=_md5(data))

    def create(self, name: str, data: bytes) -> bool:
        """One PUT with `If-None-Match: *`; taking turns where the server has no such thing."""
        with self._errors(check_name(name)):
            if not self._is_conditional():
                return Turns(self._client, self.bucket, self.turn_seconds).create(self.prefix + name, data)
            return self._put_if_free(self.prefix + name, data)

    def delete(self, name: str) -> None:
        """One DELETE."""
        with self._errors(check_name(name)):
            self._client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def names(self, prefix: str) -> list[str]:
        """A listing, a thousand names a page."""
        with self._errors(check_prefix(prefix)):
            keys = [key.removeprefix(self.prefix) for key in self._keys(prefix)]
        return sorted(key for key in keys if not key.endswith("/") and f"/{RESERVED}" not in f"/{key}")

    def put_file(self, name: str, source: Path) -> Checksum:
        """One PUT, or parts at once where the file is larger than a part."""
        key = self.prefix + check_name(name)
        with open_local(source) as file, self._errors(name), disk_errors(str(source.parent), source.name):
            size_bytes = source.stat().st_size
            if size_bytes > self.part_bytes:
                return self._put_parts(key, file, max(self.part_bytes, -(-size_bytes // _MOST_PARTS)))
            data = file.read()
            self._client.put_object(Bucket=self.bucket, Key=key, Body=data, ContentMD5=_md5(data))
            return Checksum(len(data), hashlib.sha256(data).hexdigest())

    def get_file(self, name: str, into: Path, sha256: str | None = None) -> Checksum:
        """One GET, taken up again where it broke off."""
        key = self.prefix + check_name(name)

        def fill(target: BinaryIO) -> Checksum:
            digest, size_bytes = hashlib.sha256(), 0
            for chunk in self._stream(key):
                digest.update(chunk)
                size_bytes += target.write(chunk)
            expect(self._place, name, digest.hexdigest(), sha256)
            return Checksum(size_bytes, digest.hexdigest())

        with self._errors(name), disk_errors(str(into.parent), into.name):
            return replace_file(into, fill)

    def delete_under(self, prefix: str) -> None:
        """One DELETE a name: the request for many is where servers differ most."""
        folder = _folder_prefix(prefix)
        with self._errors(folder), ThreadPoolExecutor(self.parallel) as pool:
            self._abort_uploads(folder, datetime.now(UTC) + timedelta(days=1))
            deletions = [
                pool.submit(self._client.delete_object, Bucket=self.bucket, Key=key) for key in self._keys(folder)
            ]
            for deletion in deletions:
                deletion.result()

    def sweep(self, prefix: str, older_than_seconds: float = 86400.0) -> None:
        """Abort old multipart uploads: their parts cost space and are listed nowhere."""
        with self._errors(_folder_prefix(prefix)):
            self._abort_uploads(prefix, datetime.now(UTC) - timedelta(seconds=older_than_seconds))

    def folder(self, prefix: str) -> Path | None:
        """None: a bucket is nowhere on this machine."""
        _folder_prefix(prefix)
        return None

    @cached_property
    def _client(self) -> S3Client:
        return connect(self.endpoint, self.region)

    @property
    def _place(self) -> str:
        return f"s3://{self.bucket}"

    def _errors(self, name: str) -> AbstractContextManager[None]:
        return s3_errors(self.bucket, self.endpoint, name)

    def _keys(self, prefix: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        for page in pages:
            for item in page.get("Contents", []):
                yield item["Key"]

    def _put_if_free(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        # A PUT that is tried again after a lost answer would be refused because of itself; the mark tells.
        writer = secrets.token_hex(16)
        for attempt in range(_TRIES):
            try:
                self._client.put_object(
                    Bucket=self.bucket,
                    Key=key,
                    Body=data,
                    ContentMD5=_md5(data),
                    IfNoneMatch="*",
                    Metadata={_WRITER: writer},
                )
                return True
            except ClientError as error:
                code = code_of(error)
                if code in {"PreconditionFailed", "412"}:
                    return self._writer_of(key) == writer
                if code not in {"ConditionalRequestConflict", "409"} or attempt == _TRIES - 1:
                    raise
            _wait(attempt)
        return False

    def _writer_of(self, key: str) -> str | None:
        return self._client.head_object(Bucket=self.bucket, Key=key)["Metadata"].get(_WRITER)

    def _is_conditional(self) -> bool:
        """Whether the server keeps `If-None-Match: *`: asked once, by writing one object twice."""
        from botocore.exceptions import ClientError

        client = self._client
        with self._lock:
            if self._conditional is None:
                key = f"{self.prefix}{RESERVED}/probe-{secrets.token_hex(8)}"
                try:
                    client.put_object(Bucket=self.bucket, Key=key, Body=b"1", IfNoneMatch="*")
                    client.put_object(Bucket=self.bucket, Key=key, Body=b"2", IfNoneMatch="*")
                    self._conditional = False
                except ClientError as error:
                    code = code_of(error)
                    if code in {"NotImplemented", "501", "InvalidArgument", "InvalidRequest"}:
                        self._conditional = False
                    elif code in {"PreconditionFailed", "412"}:
                        self._conditional = True
                    else:
                        raise
                finally:
                    if self._conditional is not None:
                        client.delete_object(Bucket=self.bucket, Key=key)
            return self._conditional

    def _put_parts(self, key: str, file: BinaryIO, part_bytes: int) -> Checksum:
        upload_id = self._client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]
        upload: dict[str, Any] = {"Bucket": self.bucket, "Key": key, "UploadId": upload_id}
        digest, size_bytes = hashlib.sha256(), 0
        parts: list[CompletedPartTypeDef] = []
        running: deque[Future[CompletedPartTypeDef]] = deque()
        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                while data := file.read(part_bytes):
                    digest.update(data)
                    size_bytes += len(data)
                    running.append(pool.submit(self._put_part, upload, len(parts) + len(running) + 1, data))
                    if len(running) >= _PARTS_AT_ONCE:
                        parts.append(running.popleft().result())
                parts += [future.result() for future in running]
            self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except BaseException:
            self._abort(key, upload_id)
            raise
        return Checksum(size_bytes, digest.hexdigest())

    def _put_part(self, upload: dict[str, Any], number: int, data: bytes) -> CompletedPartTypeDef:
        answer = self._client.upload_part(**upload, PartNumber=number, Body=data, ContentMD5=_md5(data))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _abort_uploads(self, prefix: str, before: datetime) -> None:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.bucket, Prefix=self.prefix + prefix
        )
        for page in pages:
            for upload in page.get("Uploads", []):
                if upload["Initiated"] < before:
                    self._abort(upload["Key"], upload["UploadId"])

    def _abort(self, key: str, upload_id: str) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        # What cannot be aborted now is invisible and swept later; the error that led here matters more.
        try:
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)
        except (ClientError, BotoCoreError):
            return

    def _stream(self, key: str) -> Iterator[bytes]:
        """The object's bytes. A broken stream goes on where it stopped, as long as it is still the same object."""
        from botocore.exceptions import BotoCoreError

        position, etag, size_bytes = 0, "", None
        attempt = 0
        while size_bytes is None or position < size_bytes:
            wanted: dict[str, Any] = {"IfMatch": etag, "Range": f"bytes={position}-"} if etag and position else {}
            answer = self._client.get_object(Bucket=self.bucket, Key=key, **wanted)
            if size_bytes is None:
                etag, size_bytes = answer["ETag"], answer["ContentLength"]
            before = position
            try:
                with closing(answer["Body"]) as body:
                    for chunk in body.iter_chunks(CHUNK_BYTES):
                        position += len(chunk)
                        yield chunk
            except BotoCoreError:
                attempt = 0 if position > before else attempt + 1
                if attempt >= _TRIES:
                    raise
                _wait(attempt)


def _folder_prefix(prefix: str) -> str:
    if not prefix.endswith("/"):
        raise StoreFailed(f"'{prefix}' names no folder of the store; end it with a '/'")
    return check_prefix(prefix)


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _wait(attempt: int) -> None:
    """Full jitter: anywhere up to 0.2, 0.4, 0.8, ... seconds, 5 at most."""
    time.sleep(random.uniform(0, min(5.0, 0.2 * 2**attempt)))

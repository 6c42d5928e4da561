"""`create` on S3 servers that know no conditional writes.

AWS, MinIO, Ceph, versitygw and others take `If-None-Match: *` on a PUT and let one writer win. Where a server refuses
or ignores it, writers take turns: Fischer's timed lock (in Lamport, "A fast mutual exclusion algorithm", 1987).

    read the turn; when it is free, write my id into it; wait; when it still holds my id, the turn is mine.

This is right as long as a write that began before the wait has landed when the wait ends. A writer that was slower than
half of the wait steps back by itself, and a turn whose holder died is free again after `stale_seconds` by the server's
clock. A server so slow that a single PUT hangs longer than that could let two writers through; use one with conditional
writes where several machines share a store.
"""

from __future__ import annotations

import random
import secrets
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from fastserve.artifacts.s3_client import code_of
from fastserve.artifacts.store import RESERVED
from fastserve.errors import StoreFailed

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_GIVE_UP_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Turns:
    """Turns at one bucket.

    wait_seconds: longer than any small PUT takes there. stale_seconds: the age at which a turn's holder counts as dead.
    """

    client: S3Client
    bucket: str
    wait_seconds: float = 2.0
    stale_seconds: float = 60.0

    def create(self, key: str, data: bytes) -> bool:
        """Put an object if its key is free: True for one writer, False for the others.

        Raises boto's ClientError, and StoreFailed when no turn comes within five minutes.
        """
        folder, _, last = key.rpartition("/")
        turn = f"{folder}/{RESERVED}-turn-{last}".lstrip("/")
        mine = secrets.token_hex(16).encode()
        give_up = time.monotonic() + _GIVE_UP_SECONDS
        while time.monotonic() < give_up:
            if self._holder(key) is not None:
                return False
            looked = time.monotonic()
            if self._holder(turn) is not None:
                time.sleep(random.uniform(0.1, 0.5))
                continue
            self.client.put_object(Bucket=self.bucket, Key=turn, Body=mine)
            slow = time.monotonic() - looked > self.wait_seconds / 2
            time.sleep(self.wait_seconds)
            if slow or self._holder(turn) != mine:
                continue
            won = self._holder(key) is None
            if won:
                self.client.put_object(Bucket=self.bucket, Key=key, Body=data)
            self.client.delete_object(Bucket=self.bucket, Key=turn)
            return won
        raise StoreFailed(
            f"s3://{self.bucket}/{key}: no turn to write it for {_GIVE_UP_SECONDS:.0f}s; "
            "use a server with conditional writes"
        )

    def _holder(self, key: str) -> bytes | None:
        """Bytes of an object; None when there is none, or when it is a turn that went stale."""
        from botocore.exceptions import ClientError

        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=key)
        except ClientError as error:
            if code_of(error) in {"NoSuchKey", "404"}:
                return None
            raise
        with closing(answer["Body"]) as body:
            data = body.read()
        stale = _age_seconds(answer["LastModified"], answer["ResponseMetadata"]["HTTPHeaders"]) > self.stale_seconds
        return None if stale and f"{RESERVED}-turn-" in key else data


def _age_seconds(modified: datetime, headers: dict[str, str]) -> float:
    """Age by the server's own clock; 0 when it does not say the time."""
    date = headers.get("date", "")
    return (parsedate_to_datetime(date) - modified).total_seconds() if date else 0.0

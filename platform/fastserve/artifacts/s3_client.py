"""The way to an S3 endpoint: who we are, where it is, and what its errors mean in this project's words.

boto3 is imported on first use (0.3 s), so that commands which need no bucket do not pay for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastserve.artifacts.tokens import s3_credentials
from fastserve.errors import ArtifactNotFound, SourceInvalid, StoreFailed, StoreFull, UsageInvalid

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_ABSENT = {"NoSuchKey", "404", "NotFound"}
_FULL = {"InsufficientStorage", "QuotaExceeded", "StorageFull", "XMinioStorageFull"}
# Besides whatever comes with the status 401 or 403. The last is versitygw's, with 404, for an unknown access key.
_DENIED = {
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
    "XAdminUserNotFound",
}


def endpoint_of(wanted: str | None) -> str | None:
    """The endpoint to use: the one wanted, else AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, else None for AWS itself.

    Raises UsageInvalid when it is no plain http(s) address; it must not carry credentials.
    """
    chosen = (
        wanted or os.environ.get("AWS_ENDPOINT_URL_S3", "").strip() or os.environ.get("AWS_ENDPOINT_URL", "").strip()
    )
    if not chosen:
        return None
    try:
        parts = urlsplit(chosen)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc or parts.query or parts.fragment:
        # The text may hold a password, so it is not repeated.
        raise UsageInvalid(
            "the S3 endpoint (AWS_ENDPOINT_URL or ?endpoint=) must be http://host[:port] or https://host[:port], "
            "without credentials"
        )
    return chosen.rstrip("/")


def is_aws(endpoint: str | None) -> bool:
    """Whether this is AWS itself, which offers everything; others are asked."""
    host = urlsplit(endpoint).hostname or "" if endpoint else "amazonaws.com"
    return host.endswith(("amazonaws.com", "amazonaws.com.cn"))


def connect(endpoint: str | None, region: str | None = None, variables: Mapping[str, str] = os.environ) -> S3Client:
    """A client for threads to share: five tries with jittered waits, path-style addresses away from AWS.

    Credentials: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN as `tokens` cleans them; where they are
    absent or empty, what boto3 finds (profile, instance role). Raises StoreFailed, naming the variable, for one that
    cannot be; values are never shown. variables: where these stand.
    """
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    session = botocore.session.get_session()
    # Read here instead, without the newline that a value from a file ends in.
    session.get_component("credential_provider").remove("env")
    try:
        given = {argument: secret.reveal() for argument, secret in s3_credentials(None, variables).items()}
    except SourceInvalid as error:
        raise StoreFailed(str(error)) from error
    settings = Config(
        retries={"mode": "standard", "total_max_attempts": _tries()},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=16,
        s3={"addressing_style": "auto" if is_aws(endpoint) else "path"},
        # Content-MD5 is sent and sha256 compared instead: many servers refuse the newer CRC trailers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        made = boto3.Session(botocore_session=session)
        return made.client(
            "s3",
            region_name=region or os.environ.get("AWS_REGION", "").strip() or made.region_name or "us-east-1",
            endpoint_url=endpoint,
            aws_access_key_id=given.get("aws_access_key_id"),
            aws_secret_access_key=given.get("aws_secret_access_key"),
            aws_session_token=given.get("aws_session_token"),
            config=settings,
        )
    except (BotoCoreError, ValueError) as error:
        raise StoreFailed(f"no way to S3: {error}; correct ~/.aws/config or the AWS_ variables") from error


def _tries() -> int:
    """Five, or AWS_MAX_ATTEMPTS."""
    wanted = os.environ.get("AWS_MAX_ATTEMPTS", "").strip()
    return max(1, int(wanted)) if wanted.isdecimal() else 5


def code_of(error: Exception) -> str:
    """The error code that the server gave; empty when it gave none."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", "") or _status_of(error) or "")


def _status_of(error: Exception) -> int:
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextlib.contextmanager
def s3_errors(bucket: str, endpoint: str | None, name: str) -> Iterator[None]:
    """Turn what boto and the server say into the store's own errors."""
    from botocore import exceptions as boto

    place = f"s3://{bucket}" + (f" at {endpoint}" if endpoint else "")
    try:
        yield
    except boto.ClientError as error:
        raise _from_server(error, bucket, place, name) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise StoreFailed(
            f"{place}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError) as error:
        raise StoreFailed(
            f"{place} cannot be reached, or breaks off ({type(error).__name__}, {_tries()} tries); "
            "check AWS_ENDPOINT_URL, the network, and that the server runs"
        ) from error
    except boto.BotoCoreError as error:
        raise StoreFailed(f"{place}: {name}: {error}; check the AWS_ variables and the store's address") from error


def _from_server(error: Exception, bucket: str, place: str, name: str) -> StoreFailed:
    code, status = code_of(error), _status_of(error)
    if code == "NoSuchBucket":
        return StoreFailed(f"{place}: there is no bucket '{bucket}'; create it, or correct the store's address")
    if code in _ABSENT:
        return ArtifactNotFound(f"{place} has no {name}; check that the store is the one that the stage wrote to")
    if code in _FULL or status == 507:
        return StoreFull(
            f"no space left in {place} for {name}; free space there, raise the quota, or use another store"
        )
    if code in _DENIED or status in (401, 403):
        return StoreFailed(
            f"{place}: {name}: refused ({code}); "
            "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and the bucket's policy"
        )
    if code in {"PermanentRedirect", "301", "IllegalLocationConstraintException"}:
        return StoreFailed(
            f"{place}: the bucket is in another region; set AWS_REGION or add ?region= to the store's address"
        )
    return StoreFailed(f"{place}: {name}: the server answered {code}; look into the server's log, then try again")

"""Sources in a bucket, against moto on loopback (tier `s3`: versitygw)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import model_files
import pytest
import s3_servers

from fastserve.artifacts import sources
from fastserve.artifacts.describe import describe
from fastserve.errors import DigestMismatch, SourceInvalid, SourceNotFound
from fastserve.spec.source import Source

Put = Callable[[dict[str, bytes]], str]


@pytest.fixture(params=["moto", pytest.param("versitygw", marks=pytest.mark.s3)])
def put(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """Puts objects into a new bucket and returns its name."""
    server: s3_servers.S3Server = request.getfixturevalue(request.param)
    for name, value in {**server.environment, "AWS_ENDPOINT_URL": server.endpoint}.items():
        monkeypatch.setenv(name, value + "\n" if name.endswith("KEY") else value)  # as if read from a file
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
    )
    bucket = f"b{secrets.token_hex(8)}"
    client.create_bucket(Bucket=bucket)

    def write(objects: dict[str, bytes]) -> str:
        for key, data in objects.items():
            client.put_object(Bucket=bucket, Key=key, Body=data)
        return bucket

    yield write
    client.close()


def test_a_folder_of_a_bucket_is_a_model(put: Put, tmp_path: Path) -> None:
    bucket = put(
        {f"m/{name}": data for name, data in model_files.model_folder().items()} | {"m/README.md": b"x", "mother": b"y"}
    )
    source = Source(uri=f"s3://{bucket}/m")
    resolved = sources.resolve(source)
    assert sources.resolve(Source(uri=f"s3://{bucket}/m/")).digest == resolved.digest
    assert describe(sources.outline(source, resolved, tmp_path / "outline")).parameters == 48
    into = sources.fetch(source, resolved.digest, tmp_path / "into", role="model")
    assert sorted(path.name for path in into.iterdir()) == sorted(model_files.model_folder())
    assert (into / "model.safetensors").read_bytes() == model_files.safetensors()


def test_a_pattern_takes_what_matches(put: Put, tmp_path: Path) -> None:
    bucket = put({"chats/b.jsonl": b"b", "chats/a.jsonl": b"a", "chats/c.csv": b"c", "chats/sub/d.jsonl": b"d"})
    resolved = sources.resolve(Source(uri=f"s3://{bucket}/chats/*.jsonl"), role="data")
    assert [file.path for file in resolved.files] == ["a.jsonl", "b.jsonl"]
    deep = Source(uri=f"s3://{bucket}/chats/**/*.jsonl")
    resolved = sources.resolve(deep, role="data")
    assert [file.path for file in resolved.files] == ["a.jsonl", "b.jsonl", "sub/d.jsonl"]
    into = sources.fetch(deep, resolved.digest, tmp_path / "into")
    assert (into / "sub" / "d.jsonl").read_bytes() == b"d"


def test_one_object_is_a_file(put: Put, tmp_path: Path) -> None:
    bucket = put({"rows.jsonl": b"{}\n", "rows.jsonl.old": b"x"})
    source = Source(uri=f"s3://{bucket}/rows.jsonl")
    resolved = sources.resolve(source, role="data")
    assert sources.fetch(source, resolved.digest, tmp_path / "into").read_bytes() == b"{}\n"


def test_an_object_that_changed_is_not_used(put: Put, tmp_path: Path) -> None:
    bucket = put({"rows.jsonl": b"{}\n"})
    source = Source(uri=f"s3://{bucket}/rows.jsonl")
    digest = sources.resolve(source, role="data").digest
    put({"rows.jsonl": b"[]\n"})
    with pytest.raises(DigestMismatch, match="has changed since it was resolved"):
        sources.fetch(source, digest, tmp_path / "into")


@pytest.mark.parametrize("put", ["moto"], indirect=True)  # a server over a file system takes no such keys itself
@pytest.mark.parametrize(
    "key",
    ["m/../../evil.json", "m//etc/evil.json", "m/a\\..\\evil.json", "m/CON", "m/%2e%2e/evil.json", "m/a#evil.json"],
)
def test_a_key_that_could_leave_the_folder_is_refused_and_nothing_is_written(
    put: Put, tmp_path: Path, key: str
) -> None:
    bucket = put({f"m/{name}": data for name, data in model_files.model_folder().items()} | {key: b"{}"})
    with pytest.raises(SourceInvalid, match="nothing was written"):
        sources.resolve(Source(uri=f"s3://{bucket}/m"))
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_in_a_bucket_is_refused_by_name(put: Put) -> None:
    bucket = put({f"m/{name}": data for name, data in model_files.model_folder(pytorch_model__bin=b"x").items()})
    with pytest.raises(SourceInvalid, match=r"'pytorch_model\.bin' is refused"):
        sources.resolve(Source(uri=f"s3://{bucket}/m"))


def test_what_is_not_there_says_where_it_was_looked_for(put: Put) -> None:
    bucket = put({"rows.jsonl": b"{}"})
    with pytest.raises(SourceNotFound, match=r"no object in bucket .* matches 'gone\.jsonl'.*AWS_ENDPOINT_URL"):
        sources.resolve(Source(uri=f"s3://{bucket}/gone.jsonl"), role="data")
    with pytest.raises(SourceNotFound, match="there is no bucket"):
        sources.resolve(Source(uri=f"s3://{bucket}-gone/rows.jsonl"), role="data")


def test_a_key_with_a_blank_inside_is_refused_without_being_shown(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = put({"rows.jsonl": b"{}"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc 123")
    with pytest.raises(
        SourceInvalid, match=r"AWS_SECRET_ACCESS_KEY \(tokenSecret: bucket\) has a blank inside"
    ) as caught:
        sources.resolve(
            Source.model_validate({"uri": f"s3://{bucket}/rows.jsonl", "tokenSecret": "bucket"}), role="data"
        )
    assert "abc" not in str(caught.value)

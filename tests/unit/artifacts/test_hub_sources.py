"""Sources on a hub, against a stand-in on loopback that speaks the hub's protocol and notes who asks."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import hub_stand_in
import model_files
import pytest
from huggingface_hub import constants
from pydantic import ValidationError

from fastserve.artifacts import sources
from fastserve.artifacts.describe import describe
from fastserve.artifacts.huggingface import Address, parse_address
from fastserve.errors import DigestMismatch, SourceInvalid, SourceNotFound
from fastserve.spec.source import Source

FILES = {**model_files.model_folder(), "README.md": b"hi", ".gitattributes": b"x", "logo.png": b"y"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stand_in.Hub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    # The library reads its own switch once, at import; these tests set it per test.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with hub_stand_in.hub() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        yield made


def source(uri: str = "hf://acme/model", **more: str) -> Source:
    return Source.model_validate({"uri": uri, **more})


def test_a_repository_is_pinned_to_a_commit_and_only_its_allowed_files_come(
    hub: hub_stand_in.Hub, tmp_path: Path
) -> None:
    commit = hub.repository("acme/model").commit(FILES)
    resolved = sources.resolve(source())
    assert resolved.digest.startswith(commit)
    assert len(resolved.digest) == 64
    seen: list[int] = []
    into = sources.fetch(
        source(), resolved.digest, tmp_path / "into", role="model", progress=lambda done, total: seen.append(done)
    )
    assert seen == sorted(seen)
    assert seen[-1] == resolved.size_bytes
    assert sorted(path.name for path in into.iterdir()) == sorted(model_files.model_folder())
    assert sorted(hub.downloads()) == sorted(model_files.model_folder())
    assert (into / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_branch_that_moved_on_changes_nothing_for_who_resolved_before(hub: hub_stand_in.Hub, tmp_path: Path) -> None:
    repository = hub.repository("acme/model")
    repository.commit(FILES)
    digest = sources.resolve(source()).digest
    repository.commit({**FILES, "generation_config.json": b'{"eos_token_id": 0}'})
    into = sources.fetch(source(), digest, tmp_path / "into", role="model")
    assert json.loads((into / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
    assert sources.resolve(source()).digest != digest


def test_a_revision_stands_behind_the_name_or_beside_it(hub: hub_stand_in.Hub) -> None:
    repository = hub.repository("acme/model")
    old = repository.commit(FILES, branch="v1")
    repository.commit({**FILES, "config.json": b"{}"})
    assert sources.resolve(source("hf://acme/model@v1")).digest.startswith(old)
    assert sources.resolve(source(revision="v1")).digest.startswith(old)
    assert sources.resolve(source(revision=old)).digest.startswith(old)
    with pytest.raises(SourceNotFound, match="no revision 'v9'"):
        sources.resolve(source(revision="v9"))


def test_a_plan_needs_only_the_heads_of_the_weights(hub: hub_stand_in.Hub, tmp_path: Path) -> None:
    tensors = {"embed": {"dtype": "F32", "shape": [6, 200_000], "data_offsets": [0, 4_800_000]}}
    hub.repository("acme/model").commit({**FILES, "model.safetensors": model_files.safetensors(tensors)})
    resolved = sources.resolve(source())
    outline = sources.outline(source(), resolved, tmp_path / "outline")
    assert describe(outline).parameters == 1_200_000
    weights = outline / "model.safetensors"
    assert weights.stat().st_size > 4_800_000
    assert weights.stat().st_blocks * 512 < 100_000
    ranges = [asked.range for asked in hub.asked if asked.path.endswith("model.safetensors") and asked.method == "GET"]
    assert ranges
    assert all(ranges)


def test_one_gguf_file_of_many_is_named_by_its_path(hub: hub_stand_in.Hub, tmp_path: Path) -> None:
    packed = model_files.gguf(model_files.gguf_metadata())
    hub.repository("acme/gguf").commit({"a.gguf": packed, "sub/b.gguf": packed})
    with pytest.raises(SourceInvalid, match=r"name one of them, such as hf://acme/gguf/a\.gguf"):
        sources.resolve(source("hf://acme/gguf"))
    resolved = sources.resolve(source("hf://acme/gguf/sub/b.gguf@main"))
    assert resolved.single
    assert describe(sources.outline(source("hf://acme/gguf/sub/b.gguf@main"), resolved, tmp_path / "o")).layers == 1
    fetched = sources.fetch(source("hf://acme/gguf/sub/b.gguf@main"), resolved.digest, tmp_path / "into", role="model")
    assert fetched == tmp_path / "into" / "b.gguf"
    with pytest.raises(SourceNotFound, match=r"no 'c\.gguf' at"):
        sources.resolve(source("hf://acme/gguf/c.gguf"))


def test_rows_come_from_the_hubs_data_sets(hub: hub_stand_in.Hub, tmp_path: Path) -> None:
    hub.repository("datasets/acme/rows").commit(
        {"train/a.jsonl": b"{}\n", "train/b.jsonl": b"{}\n", "test/c.jsonl": b"{}\n"}
    )
    chosen = source("hf://acme/rows/train/*.jsonl")
    resolved = sources.resolve(chosen, role="data")
    into = sources.fetch(chosen, resolved.digest, tmp_path / "into")
    assert sorted(path.name for path in into.iterdir()) == ["a.jsonl", "b.jsonl"]
    assert sources.resolve(source("hf://datasets/acme/rows/train/*.jsonl"), role="data").digest == resolved.digest


def test_a_hub_without_sizes_in_its_listing_will_do(hub: hub_stand_in.Hub, tmp_path: Path) -> None:
    hub.with_sizes = False
    hub.repository("acme/model").commit(FILES)
    resolved = sources.resolve(source())
    assert resolved.size_bytes == sum(map(len, model_files.model_folder().values()))
    sources.fetch(source(), resolved.digest, tmp_path / "into", role="model")


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("pytorch_model.bin", b"x", r"'pytorch_model\.bin' is refused"),
        ("modeling_acme.py", b"x", r"'modeling_acme\.py' is refused"),
        ("../evil.json", b"{}", "leaves the folder"),
        ("/etc/evil.json", b"{}", "is an absolute path"),
        ("a\\..\\evil.json", b"{}", "has a backslash"),
        ("%2e%2e/evil.json", b"{}", "means something else in an address"),
    ],
)
def test_an_unsafe_repository_is_refused_before_anything_is_downloaded(
    hub: hub_stand_in.Hub, tmp_path: Path, name: str, data: bytes, why: str
) -> None:
    hub.repository("acme/model").commit({**FILES, name: data})
    with pytest.raises(SourceInvalid, match=why):
        sources.resolve(source())
    assert hub.downloads() == []
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("config.json", b'{"auto_map": {"AutoModel": "m.M"}}', "asks for code"),
        ("model.safetensors", model_files.safetensors()[:-1], "puts tensor"),
        ("tokenizer.json", b"\x80\x04\x95" + bytes(20), "a pickle"),
    ],
)
def test_an_unsafe_file_is_refused_when_it_came(
    hub: hub_stand_in.Hub, tmp_path: Path, name: str, data: bytes, why: str
) -> None:
    hub.repository("acme/model").commit({**FILES, name: data})
    resolved = sources.resolve(source())
    for bring in (
        lambda: sources.outline(source(), resolved, tmp_path / "outline"),
        lambda: sources.fetch(source(), resolved.digest, tmp_path / "into", role="model"),
    ):
        with pytest.raises(SourceInvalid, match=why):
            bring()


@pytest.mark.parametrize("value", ["abc123\n", "abc123\r\n", "  abc123"])
def test_a_token_reaches_the_hub_without_what_surrounds_it(
    hub: hub_stand_in.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.repository("acme/private", token="abc123").commit(FILES)
    monkeypatch.setenv("HF_TOKEN", value)
    private = source("hf://acme/private", revision="main", tokenSecret="hub")
    resolved = sources.resolve(private)
    sources.outline(private, resolved, tmp_path / "outline")
    sources.fetch(private, resolved.digest, tmp_path / "into", role="model")
    assert hub.authorizations() == {"Bearer abc123"}
    assert "abc123" not in caplog.text + repr(resolved)


def test_a_token_with_a_blank_inside_is_refused_before_any_request(
    hub: hub_stand_in.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc 123")
    with pytest.raises(SourceInvalid, match=r"HF_TOKEN \(tokenSecret: hub\) has a blank inside") as caught:
        sources.resolve(source(tokenSecret="hub"))
    assert "abc" not in str(caught.value)
    assert hub.asked == []


@pytest.mark.parametrize("value", ["", "\n", None])
def test_without_a_token_no_header_is_sent_and_a_public_model_comes(
    hub: hub_stand_in.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    # What `hf auth login` once left must not be sent either.
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("left-behind")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    if value is not None:
        monkeypatch.setenv("HF_TOKEN", value)
    hub.repository("acme/model").commit(FILES)
    resolved = sources.resolve(source(tokenSecret="hub"))
    sources.outline(source(), resolved, tmp_path / "outline")
    sources.fetch(source(), resolved.digest, tmp_path / "into", role="model")
    assert hub.authorizations() == {None}


@pytest.mark.parametrize("value", ["", None, "wrong1"])
def test_a_hub_that_refuses_leads_to_the_token(
    hub: hub_stand_in.Hub, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is not None:
        monkeypatch.setenv("HF_TOKEN", value)
    hub.repository("acme/private", token="abc123").commit(FILES)
    with pytest.raises(SourceNotFound, match="token") as caught:
        sources.resolve(source("hf://acme/private", tokenSecret="hub"))
    assert "HF_TOKEN" in str(caught.value)
    assert "wrong1" not in str(caught.value)
    hub.repository("acme/gated", gated=True).commit(FILES)
    with pytest.raises(SourceNotFound, match="accept its terms"):
        sources.resolve(source("hf://acme/gated"))


def test_another_token_gives_the_same_digest(hub: hub_stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository("acme/model").commit(FILES)
    without = sources.resolve(source()).digest
    monkeypatch.setenv("HF_TOKEN", "abc123")
    assert sources.resolve(source()).digest == without


def test_offline_the_local_cache_serves_what_it_has_with_the_same_digest(
    hub: hub_stand_in.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repository("acme/model").commit(FILES)
    resolved = sources.resolve(source())
    sources.fetch(source(), resolved.digest, tmp_path / "into", role="model")
    before = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for revision in ("main", resolved.digest[:40]):
        again = sources.resolve(source(revision=revision))
        assert again.digest == resolved.digest
    assert describe(sources.outline(source(), resolved, tmp_path / "outline")).layers == 1
    into = sources.fetch(source(), resolved.digest, tmp_path / "again", role="model")
    assert (into / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert len(hub.asked) == before


def test_offline_without_a_copy_says_so_and_what_to_do(hub: hub_stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        SourceNotFound, match=r"offline \(HF_HUB_OFFLINE is set\).*not in the local cache.*hf download acme/model"
    ):
        sources.resolve(source())
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_named(hub: hub_stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceNotFound, match=r"the hub at http://127\.0\.0\.1:9 cannot be reached.*HF_HUB_OFFLINE=1"):
        sources.resolve(source())


def test_a_cached_file_that_was_damaged_is_not_used(hub: hub_stand_in.Hub, tmp_path: Path) -> None:
    hub.repository("acme/model").commit(FILES)
    resolved = sources.resolve(source())
    sources.fetch(source(), resolved.digest, tmp_path / "into", role="model")
    blob = next(path for path in (tmp_path / "hf").rglob("snapshots/*/model.safetensors")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    with pytest.raises(DigestMismatch, match=r"'model\.safetensors' is not what it was"):
        sources.fetch(source(), resolved.digest, tmp_path / "again", role="model")


@pytest.mark.parametrize(
    "uri",
    ["hf://-a/b", "hf://a/b.", "hf://a/..b", "hf://a b/c", "hf://a/b@x y", "hf://a/b@x..y", "hf://a/b/c#d.gguf",
     "hf://a/b/%2e%2e/c"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(uri: str) -> None:
    with pytest.raises((SourceInvalid, ValidationError)):
        parse_address(Source(uri=uri), "model")


def test_the_parts_of_an_address() -> None:
    assert parse_address(Source(uri="hf://a/b/c/d*.gguf@refs/pr/1"), "model") == Address(
        "a/b", "model", "c/d*.gguf", "refs/pr/1"
    )
    assert parse_address(Source(uri="hf://datasets/a/b"), "model") == Address("a/b", "dataset", "", "main")
    assert parse_address(Source(uri="hf://gpt2"), "model") == Address("gpt2", "model", "", "main")

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import hub_stand_in
import pytest
from huggingface_hub import constants
from model_files import model_folder

from fastserve.artifacts import sources, tokens
from fastserve.artifacts.tokens import FOLDER, clean, hub_token, mounted, s3_credentials, secrets_from, variables_of
from fastserve.errors import SecretMissing, SourceInvalid, SourceNotFound
from fastserve.spec.source import Source


@pytest.mark.parametrize("value", ["abc123", "abc123\n", "abc123\r\n", "  abc123", "abc123 \t", " abc123 \n"])
def test_a_newline_and_blanks_at_the_ends_are_removed(value: str) -> None:
    secret = clean(value, "HF_TOKEN")
    assert secret is not None
    assert secret.reveal() == "abc123"


@pytest.mark.parametrize("value", [None, "", "\n", "  ", " \r\n"])
def test_an_empty_token_is_no_token(value: str | None) -> None:
    assert clean(value, "HF_TOKEN") is None


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("abc 123", "blank inside"),
        ("abc\u00a0123", "blank inside"),
        ("abc\n123", "control character or a second line"),
        ("abc123\n\n", "control character or a second line"),
        ("abc\x00123", "control character"),
        ("abc\u2013123", "letter that no token has"),
    ],
)
def test_a_token_that_no_header_can_carry_is_refused_by_its_name_and_never_shown(value: str, why: str) -> None:
    with pytest.raises(SourceInvalid, match=why) as caught:
        hub_token("hub", {"HF_TOKEN": value})
    message = str(caught.value)
    assert "HF_TOKEN" in message
    assert "tokenSecret: hub" in message
    assert "abc" not in message
    assert "123" not in message


def test_a_secret_shows_itself_nowhere_but_where_it_is_asked_for() -> None:
    secret = clean("abc123", "HF_TOKEN")
    assert "abc123" not in f"{secret} {secret!r} {[secret]} {vars if secret is None else dir(secret)}"


def test_keys_of_a_bucket_are_cleaned_as_tokens_are() -> None:
    found = s3_credentials(
        None, {"AWS_ACCESS_KEY_ID": "id\n", "AWS_SECRET_ACCESS_KEY": " secret\r\n", "AWS_SESSION_TOKEN": ""}
    )
    assert {name: secret.reveal() for name, secret in found.items()} == {
        "aws_access_key_id": "id",
        "aws_secret_access_key": "secret",
    }


def test_half_a_pair_of_keys_is_refused() -> None:
    with pytest.raises(SourceInvalid, match="set both or none"):
        s3_credentials("bucket", {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "\n"})


def test_a_source_that_names_a_secret_gets_its_values_and_no_others() -> None:
    environment = {"HF_TOKEN": "own", "AWS_ACCESS_KEY_ID": "own"}
    assert variables_of(None, environment) is environment
    assert variables_of("hub", environment) is environment, "on a laptop there are no Secrets"
    held = {"hub": {"token": "theirs"}, "s3": {"AWS_ACCESS_KEY_ID": "i", "other": "x"}, "odd": {"password": "x"}}
    with secrets_from(held.__getitem__):
        assert variables_of(None, environment) is environment
        assert variables_of("hub", environment) == {"HF_TOKEN": "theirs"}
        assert variables_of("s3", environment) == {"AWS_ACCESS_KEY_ID": "i"}
        with pytest.raises(SecretMissing, match=r"odd.*token"):
            variables_of("odd", environment)
    assert variables_of("hub", environment) is environment


def test_on_rays_machines_a_secret_is_a_mounted_folder(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text("abc\n")
    found = variables_of("hub", {FOLDER: str(tmp_path), "HF_TOKEN": "own"})
    secret = hub_token("hub", found)
    assert secret is not None
    assert secret.reveal() == "abc"
    for name in ("none", "..", "../hub", "/etc"):
        with pytest.raises(SecretMissing, match=r"ray\.tokenSecrets"):
            mounted(tmp_path, name, seconds=0)


def test_a_secret_that_is_mounted_later_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "late").mkdir()
    with pytest.raises(SecretMissing, match="late"):
        mounted(tmp_path, "late", seconds=0)

    def comes() -> None:
        time.sleep(0.2)
        (tmp_path / "new").write_text("abc")
        (tmp_path / "new").rename(tmp_path / "late" / "token")  # whole at once, as a kubelet does

    thread = threading.Thread(target=comes)
    thread.start()
    assert mounted(tmp_path, "late", seconds=60) == {"token": "abc"}
    thread.join()


def test_a_private_model_is_read_with_the_token_of_its_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "of-somebody-else")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tokens, "MOUNT_SECONDS", 0)
    source = Source.model_validate({"uri": "hf://acme/model", "tokenSecret": "hub"})
    with hub_stand_in.hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.repository("acme/model", token="right").commit(model_folder())
        with secrets_from(lambda name: {"token": "right\n"} if name == "hub" else {}):
            found = sources.resolve(source)
        assert hub.authorizations() == {"Bearer right"}
        monkeypatch.setenv(FOLDER, str(tmp_path / "mounted"))
        (tmp_path / "mounted" / "hub").mkdir(parents=True)
        (tmp_path / "mounted" / "hub" / "token").write_text("right")
        assert sources.resolve(source).digest == found.digest
        (tmp_path / "mounted" / "hub" / "token").write_text("wrong")
        with pytest.raises(SourceNotFound, match="tokenSecret: hub"):
            sources.resolve(source)
    assert "right" not in json.dumps([str(item) for item in found.files]) + caplog.text

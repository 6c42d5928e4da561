from __future__ import annotations

import pytest

from fastserve.artifacts.tokens import clean, hub_token, s3_credentials
from fastserve.errors import SourceInvalid


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

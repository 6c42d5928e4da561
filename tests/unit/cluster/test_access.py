"""Access keys of a home: shown once, kept as digests."""

from datetime import date
from pathlib import Path

import pytest

from fastserve.cluster import access
from fastserve.cluster.home import Home
from fastserve.errors import UsageInvalid
from fastserve.gateway.keys import digest
from fastserve.spec.load import read


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(tmp_path)
    found.create()
    return found


def access_key(models: str, expires: str = "2999-12-31"):
    return read(
        "apiVersion: fastserve.dev/v1alpha1\nkind: AccessKey\nmetadata: {name: team}\n"
        f"spec: {{models: [{models}], expires: {expires}}}"
    )[0]


def test_a_key_is_shown_once_and_kept_as_its_digest(home: Home) -> None:
    key = access.create_key(home, "team", ["chat"])
    kept = "".join(path.read_text() for path in home.path.rglob("*") if path.is_file())
    assert key not in kept
    assert digest(key) in kept
    assert access.list_keys(home) == [{"name": "team", "models": ["chat"], "expires": None}]


def test_the_gateway_gets_every_key_and_the_laptops_own(home: Home) -> None:
    access.create_key(home, "team", ["chat"], date(2999, 1, 1))
    own, team = access.gateway_keys(home)
    assert own.allows("anything")
    assert own.sha256 == digest(access.local_key(home))
    assert (team.name, team.allows("chat"), team.allows("other")) == ("team", True, False)


def test_a_revoked_key_is_gone_and_its_name_free(home: Home) -> None:
    access.create_key(home, "team", ["chat"])
    access.revoke_key(home, "team")
    assert access.list_keys(home) == []
    access.create_key(home, "team", ["chat"])


@pytest.mark.parametrize(
    ("name", "models", "expires", "message"),
    [
        ("Team", ["chat"], None, "is not a key's name"),
        ("team", [], None, "--model"),
        ("team", ["chat"], date(2001, 1, 1), "has passed"),
        ("local", ["chat"], None, "there is a key named local"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(home: Home, name: str, models: list[str], expires, message: str) -> None:
    with pytest.raises(UsageInvalid, match=message):
        access.create_key(home, name, models, expires)


def test_a_second_key_of_one_name_is_refused(home: Home) -> None:
    access.create_key(home, "team", ["chat"])
    with pytest.raises(UsageInvalid, match="revoke it first"):
        access.create_key(home, "team", ["chat"])
    with pytest.raises(UsageInvalid, match="the keys are: team"):
        access.revoke_key(home, "other")


def test_applying_a_manifest_twice_keeps_the_key_and_changes_its_rights(home: Home) -> None:
    key = access.apply_access_key(home, access_key("chat"))
    assert key is not None
    assert access.apply_access_key(home, access_key("chat, search")) is None
    (entry,) = access.list_keys(home)
    assert (entry["models"], entry["expires"]) == (["chat", "search"], "2999-12-31")
    assert access.gateway_keys(home)[1].sha256 == digest(key)

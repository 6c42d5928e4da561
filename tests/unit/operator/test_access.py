from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from kube_objects import KubeObjects

from fastserve.cluster.kube.api import KubeApi
from fastserve.errors import ClusterFailed
from fastserve_operator.access import tend_key

KEYS = "/apis/fastserve.dev/v1alpha1/namespaces/demo/accesskeys"
SECRET = "/api/v1/namespaces/demo/secrets/team-key"
NOW = "2027-01-02T03:04:05Z"


def wanted(objects: KubeObjects, **spec: Any) -> dict[str, Any]:
    value = {
        "apiVersion": "fastserve.dev/v1alpha1",
        "kind": "AccessKey",
        "metadata": {"name": "team"},
        "spec": {"models": ["small"], **spec},
    }
    return objects.put(f"{KEYS}/team", value)


def ready(objects: KubeObjects) -> tuple[str, str]:
    (told,) = objects.objects[f"{KEYS}/team"]["status"]["conditions"]
    return told["status"], told["reason"]


def test_the_key_stands_in_one_secret_and_its_digest_elsewhere(api: KubeApi, objects: KubeObjects) -> None:
    entry = tend_key(api, wanted(objects), NOW)
    key = base64.b64decode(objects.objects[SECRET]["data"]["key"]).decode()
    digest = hashlib.sha256(key.encode()).hexdigest()
    assert entry == {"name": "team", "sha256": digest, "models": ["small"], "expires": None}
    assert ready(objects) == ("True", "Ready")
    status = objects.objects[f"{KEYS}/team"]["status"]
    assert (status["secret"], status["sha256"]) == ("team-key", digest)
    others = json.dumps([item for path, item in objects.objects.items() if path != SECRET])
    assert key not in others


def test_it_is_made_once_and_told_once(api: KubeApi, objects: KubeObjects) -> None:
    first = tend_key(api, wanted(objects), NOW)
    before = len(objects.calls)
    assert tend_key(api, objects.objects[f"{KEYS}/team"], NOW) == first
    assert [call for call in objects.calls[before:] if call[0] != "GET"] == []


def test_a_removed_secret_means_a_new_key(api: KubeApi, objects: KubeObjects) -> None:
    first = tend_key(api, wanted(objects), NOW)
    objects.delete(SECRET)
    second = tend_key(api, objects.objects[f"{KEYS}/team"], NOW)
    assert first is not None
    assert second is not None
    assert first["sha256"] != second["sha256"]


def test_the_secret_goes_with_the_key(api: KubeApi, objects: KubeObjects) -> None:
    tend_key(api, wanted(objects), NOW)
    objects.delete(f"{KEYS}/team")
    assert SECRET not in objects.objects


def test_a_secret_of_somebody_else_opens_nothing_and_is_left_alone(api: KubeApi, objects: KubeObjects) -> None:
    theirs = objects.put(SECRET, {"metadata": {"name": "team-key"}, "data": {"key": "eA=="}})
    assert tend_key(api, wanted(objects), NOW) is None
    assert ready(objects) == ("Unknown", "NameConflict")
    assert objects.objects[SECRET] == theirs


@pytest.mark.parametrize("limit", [{"requestsPerMinute": 5}, {"maxParallel": 2}])
def test_a_limit_that_nothing_keeps_is_refused_by_name(
    api: KubeApi, objects: KubeObjects, limit: dict[str, int]
) -> None:
    assert tend_key(api, wanted(objects, **limit), NOW) is None
    assert ready(objects) == ("False", "NotExecutable")
    (told,) = objects.objects[f"{KEYS}/team"]["status"]["conditions"]
    assert f"spec.{next(iter(limit))}" in told["message"]
    assert SECRET not in objects.objects


def test_a_key_whose_last_day_is_over_says_so(api: KubeApi, objects: KubeObjects) -> None:
    entry = tend_key(api, wanted(objects, expires="2020-01-01"), NOW)
    assert ready(objects) == ("False", "Expired")
    assert entry is not None  # the gateway knows it, and when it ended
    assert entry["expires"] == "2020-01-01"


@pytest.mark.parametrize("data", [{}, {"key": ""}, {"key": "/v8="}])
def test_a_secret_that_holds_no_key_opens_nothing_and_says_so(
    api: KubeApi, objects: KubeObjects, data: dict[str, str]
) -> None:
    tend_key(api, wanted(objects), NOW)
    objects.objects[SECRET]["data"] = data
    assert tend_key(api, objects.objects[f"{KEYS}/team"], NOW) is None
    (told,) = objects.objects[f"{KEYS}/team"]["status"]["conditions"]
    assert told["reason"] == "NameConflict"
    assert "team-key holds no key; remove it" in told["message"]


def test_an_api_server_that_stumbles_takes_no_key_away(api: KubeApi, objects: KubeObjects) -> None:
    first = tend_key(api, wanted(objects), NOW)
    known = wanted(objects, models=["other"])
    objects.down = True
    assert first is not None
    assert tend_key(api, known, NOW) == {**first, "models": ["other"]}


def test_a_key_that_was_never_read_opens_nothing_until_it_is(api: KubeApi, objects: KubeObjects) -> None:
    found = wanted(objects)
    objects.down = True
    assert tend_key(api, found, NOW) is None


def test_a_key_that_was_taken_away_stays_shut_though_no_new_one_can_be_made(
    api: KubeApi, objects: KubeObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever removes the Secret of a key that leaked wants it shut."""
    tend_key(api, wanted(objects), NOW)
    objects.delete(SECRET)

    def full(*_: Any) -> Any:
        raise ClusterFailed("exceeded quota: secrets")

    monkeypatch.setattr(api, "create", full)
    assert tend_key(api, objects.objects[f"{KEYS}/team"], NOW) is None
    assert ready(objects) == ("Unknown", "ClusterFailed")

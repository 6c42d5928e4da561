"""The command line, and one operator over several namespaces."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from kube_objects import KubeObjects, served

from fastserve_operator.__main__ import Operator, parse

ALL = ["--all-namespaces", "--lease-namespace", "own"]


def test_each_namespace_has_a_store_of_its_own_and_is_no_matter_of_another(tmp_path: Path) -> None:
    objects = KubeObjects()
    for namespace in ("alpha", "beta"):
        value = {
            "apiVersion": "fastserve.dev/v1alpha1",
            "kind": "Model",
            "metadata": {"name": "same", "namespace": namespace},
            "spec": {"source": f"file:///nowhere/{namespace}"},
        }
        objects.put(f"/apis/fastserve.dev/v1alpha1/namespaces/{namespace}/models/same", value)
    # As the real server does, a list over all namespaces has them all.
    everything = [dict(item) for item in objects.objects.values()]
    for number, item in enumerate(everything):
        objects.objects[f"/apis/fastserve.dev/v1alpha1/models/{number}"] = item
    with served(objects) as api:
        options = parse([*ALL, "--store", str(tmp_path / "store"), "--scratch", str(tmp_path / "scratch")])
        operator = Operator(api, options)
        end = time.monotonic() + 120
        told: dict[str, str] = {}
        while len(told) < 2:
            assert time.monotonic() < end, told
            operator.tend()
            for namespace in ("alpha", "beta"):
                found = objects.objects[f"/apis/fastserve.dev/v1alpha1/namespaces/{namespace}/models/same"]
                for condition in found.get("status", {}).get("conditions", []):
                    if condition["reason"] == "SourceNotFound":
                        told[namespace] = condition["message"]
        stores = {name: tended._home.store_uri for name, tended in operator._namespaces.items()}
    assert "/nowhere/alpha" in told["alpha"]
    assert "/nowhere/beta" in told["beta"]
    assert stores == {name: f"{tmp_path}/store/{name}" for name in ("alpha", "beta")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--store", "s3://b"], "one of the arguments --namespace --all-namespaces is required"),
        (["--namespace", "a"], "--store"),
        (["--all-namespaces", "--store", "s3://b"], "--lease-namespace"),
        ([*ALL, "--store", "s3://b", "--ray-address", "http://ray:8265"], "--ray-address serves one namespace"),
        (["--namespace", "a", "--all-namespaces", "--store", "s3://b"], "not allowed with"),
    ],
)
def test_words_that_do_not_fit_together_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_lease_is_in_the_namespace_that_is_tended() -> None:
    options = parse(["--namespace", "a", "--store", "s3://b"])
    assert (options.lease_namespace, options.ray_cluster, options.stage_python) == ("a", "fastserve", "python")

from __future__ import annotations

import pytest

from fastserve.cluster.kube.heads import SHARED, OneHead, own_pool, pool_of
from fastserve.cluster.kube.ray import GivenRay
from fastserve.errors import NotExecutable
from fastserve.plan.executable import check
from fastserve.spec.model import Model


def model(cluster: str, name: str = "chat") -> Model:
    spec = {"source": "hf://org/name", "cluster": cluster, "serve": {}}
    head = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": name}}
    return Model.model_validate({**head, "spec": spec})


def test_a_model_is_of_the_shared_pool_or_of_its_own() -> None:
    assert pool_of(None) == pool_of(model("shared")) == SHARED
    assert pool_of(model("dedicated")) == own_pool("chat")
    assert pool_of(model("dedicated", name="shared")) != SHARED


def test_where_ray_is_somebody_elses_no_cluster_of_its_own_can_be_had() -> None:
    heads = OneHead(GivenRay("http://ray:8265", None, None, "python"))
    heads.require(model("shared"))
    with pytest.raises(NotExecutable, match="write shared") as caught:
        heads.require(model("dedicated"))
    assert [problem.path for problem in caught.value.problems] == ["spec.cluster"]
    assert heads.of(own_pool("chat")) is heads.of(SHARED)
    heads.end(heads.of(SHARED))
    assert {head.name for head in heads.all()} == heads.wanted()


def test_a_laptop_takes_both() -> None:
    for cluster in ("shared", "dedicated"):
        check(model(cluster))

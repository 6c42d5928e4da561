"""What the operator tells a stage beside its request."""

import time
from pathlib import Path

from model_files import write_model
from several_heads import several_heads

from fastserve.plan.brought import Kind, brought
from fastserve_operator.conditions import attempted

MODELS = "/apis/fastserve.dev/v1alpha1/namespaces/demo/models"
SECONDS = 60


def test_a_stage_is_told_which_machines_the_ray_cluster_may_grow_by(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model(source)
    with several_heads(tmp_path / "cluster") as cluster:
        cluster.chart(profiles=("l4", "local"))
        tended = cluster.operator()
        value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": "Model", "metadata": {"name": "m"}}
        cluster.objects.put(f"{MODELS}/m", {**value, "spec": {"source": f"file://{source}", "serve": {"context": 16}}})
        end = time.monotonic() + SECONDS
        while not (jobs := [job for ray in cluster.rays.values() for job in ray.jobs.values()]):
            assert time.monotonic() < end
            attempted(tended.tend)
            cluster.kube_ray()
            time.sleep(0.001)  # data is read in a thread
    assert brought(jobs[0]["environment"]) == {"l4": Kind(0), "local": Kind(0)}  # the template says no amounts

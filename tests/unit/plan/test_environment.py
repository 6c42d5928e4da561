"""What engines do not take over: the Services of a namespace, and settings of another vLLM or Ray."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.plan.environment import engine_environment, foreign, service_links

SERVICES = st.from_regex(r"[a-z]([-a-z0-9]{0,12}[a-z0-9])?", fullmatch=True).filter(lambda name: name != "kubernetes")
PORTS = st.lists(
    st.tuples(st.sampled_from(["http", "grpc-web", "dns"]), st.integers(1, 65535), st.sampled_from(["TCP", "UDP"])),
    min_size=1,
    max_size=3,
    unique_by=lambda port: port[0],
)
KEPT = st.dictionaries(
    st.sampled_from(["PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "HF_HOME", "FASTSERVE_HOME_ID"]),
    st.sampled_from(["1", "/usr/bin", "WARN"]),
)


def links(service: str, ports: list[tuple[str, int, str]], address: str = "10.96.0.10") -> dict[str, str]:
    """The variables that Kubernetes makes of a Service (its documentation, "Discovering services")."""
    name = service.upper().replace("-", "_")
    first_port, first = ports[0][1], ports[0][2]
    made = {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": str(first_port),
        f"{name}_PORT": f"{first.lower()}://{address}:{first_port}",
    }
    for port_name, port, protocol in ports:
        at = f"{name}_PORT_{port}_{protocol}"
        made[f"{name}_SERVICE_PORT_{port_name.upper().replace('-', '_')}"] = str(port)
        made[at] = f"{protocol.lower()}://{address}:{port}"
        made |= {f"{at}_PROTO": protocol.lower(), f"{at}_PORT": str(port), f"{at}_ADDR": address}
    return made


@given(st.lists(SERVICES, max_size=4), PORTS, KEPT)
def test_no_service_reaches_an_engine_whatever_its_name(
    services: list[str], ports: list[tuple[str, int, str]], kept: dict[str, str]
) -> None:
    around = {name: value for service in services for name, value in links(service, ports).items()} | kept
    assert engine_environment(around, {}) == kept


@pytest.mark.parametrize(
    "service", ["vllm", "vllm-router", "ray", "redis", "fastserve-gateway", "hf", "nccl", "master"]
)
def test_services_that_are_named_like_a_program(service: str) -> None:
    made = links(service, [("http", 8000, "TCP")])
    assert service_links(made) == set(made)


def test_the_api_server_stays_known() -> None:
    made = links("kubernetes", [("https", 443, "TCP")])
    assert {"KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"} <= set(made) - service_links(made)


@pytest.mark.parametrize(
    "name", ["MASTER_PORT", "DB_SERVICE_PORT", "OTEL_SERVICE_NAME", "RAY_PORT_5_TCP_PORT", "VLLM_PORT"]
)
def test_a_number_of_somebodys_own_is_no_link(name: str) -> None:
    assert service_links({name: "1234"}) == set()


def test_links_count_only_beside_their_host() -> None:
    around = {"DB_SERVICE_HOST": "10.0.0.1", "DB_SERVICE_PORT": "1", "DB_PORT": "5432", "LOG_SERVICE_PORT": "2"}
    assert service_links(around) == {"DB_SERVICE_HOST", "DB_SERVICE_PORT"}


def test_settings_of_another_vllm_are_left_out_and_those_that_are_named_are_not() -> None:
    around = {"VLLM_USE_V1": "0", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_X": "y", "VLLMX": "z"}
    assert foreign(around) == {"VLLM_USE_V1", "VLLM_LOGGING_LEVEL", "VLLM_X"}
    named = {**around, "FASTSERVE_ENGINE_VARIABLES": "VLLM_LOGGING_LEVEL, VLLM_X,NOT_THERE"}
    assert foreign(named) == {"VLLM_USE_V1"}


def test_an_address_is_left_out_even_where_its_name_is_named() -> None:
    around = {"VLLM_PORT": "tcp://10.96.0.10:8000", "FASTSERVE_ENGINE_VARIABLES": "VLLM_PORT"}
    assert foreign(around) == {"VLLM_PORT"}


def test_an_engine_has_no_credentials_but_those_that_are_named() -> None:
    around = {"AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": "http://s3", "HF_TOKEN": "secret", "HF_HOME": "/h"}
    assert engine_environment(around, {}) == {"HF_HOME": "/h"}
    named = {**around, "FASTSERVE_ENGINE_VARIABLES": "HF_TOKEN"}
    assert engine_environment(named, {})["HF_TOKEN"] == "secret"


def test_an_engine_is_no_part_of_ray_and_its_own_settings_win() -> None:
    around = {
        "RAY_ADDRESS": "a:1",
        "RAY_AUTH_TOKEN": "secret",
        "OMP_NUM_THREADS": "1",
        "VLLM_USE_V1": "0",
        "HOME": "/h",
    }
    own = {"OMP_NUM_THREADS": "8", "VLLM_NO_USAGE_STATS": "1"}
    assert engine_environment(around, own) == {"HOME": "/h", **own}

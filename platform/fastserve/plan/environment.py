"""Which environment variables a process of ours does not take over from where it was started.

Kubernetes tells every pod where the Services of its namespace are: one that is called `vllm` sets VLLM_PORT to
`tcp://10.96.0.10:8000` and VLLM_SERVICE_HOST beside it. The engine reads VLLM_PORT as a number and stops, and it warns
of each VLLM_ variable that it does not know; Ray has its own RAY_ family. A shell may carry settings of another vLLM as
well. So an engine gets what FastServe sets for it, and of others' settings only those that somebody names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PASSED_VARIABLE = "FASTSERVE_ENGINE_VARIABLES"
"""Names of variables, with blanks or commas between, that reach engines as they are: the way to set a VLLM_ variable
that has no key in the manifest."""

_ADDRESS = re.compile(r"[a-z0-9+.-]*(tcp|udp|sctp)://", re.IGNORECASE)
_HOST = "_SERVICE_HOST"
_LINK = re.compile(r"(.+)_(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_PROTO|_PORT|_ADDR)?)")
_RAY_OR_CREDENTIAL = re.compile(r"RAY_.*|AWS_.*|HF_TOKEN|HUGGING_FACE_HUB_TOKEN")
_API_SERVER = "KUBERNETES"
"""The one Service that programs in a pod are meant to find so."""


def service_links(environment: Mapping[str, str]) -> set[str]:
    """Names of the variables by which Kubernetes tells of Services, but not of its own API server.

    An address as the value (`tcp://...`) is enough, whatever the name. VLLM_SERVICE_PORT and the like count only beside
    VLLM_SERVICE_HOST, since a program may have a setting of such a name.
    """
    services = {name.removesuffix(_HOST) for name in environment if name.endswith(_HOST)} - {_API_SERVER}
    found = set()
    for name, value in environment.items():
        link = _LINK.fullmatch(name)
        if _ADDRESS.match(value) or (link and link.group(1) in services):
            found.add(name)
    return found


def passed(environment: Mapping[str, str]) -> set[str]:
    """Names that `FASTSERVE_ENGINE_VARIABLES` lists."""
    return set(re.split(r"[\s,]+", environment.get(PASSED_VARIABLE, ""))) - {""}


def foreign(environment: Mapping[str, str]) -> set[str]:
    """Names that a process which may load vLLM has to lose first: links of Services, and settings of another vLLM."""
    settings = {name for name in environment if name.startswith("VLLM_")}
    return service_links(environment) | (settings - passed(environment))


def engine_environment(around: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine's process, which is no part of Ray and fetches nothing.

    around: of the replica that starts it: the machine's devices, libraries and caches stay; credentials of stores and
    hubs do not, since the replica has brought everything, and an engine reads what strangers write.
    own: what FastServe sets for the engine (`plan.engine.engine_env`); it comes last.
    """
    others = {name for name in around if _RAY_OR_CREDENTIAL.fullmatch(name)} - passed(around)
    left_out = foreign(around) | others
    return {name: value for name, value in around.items() if name not in left_out} | dict(own)

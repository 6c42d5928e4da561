"""`python -m fastserve_operator`: watches, and looks every few seconds and on every change.

What watches the API server tells that something changed, never what: what to do is found out by looking
(`fastserve_operator.model`). kopf watches AccessKeys and HardwareProfiles; Models and what is kept of them, of which
there may be thousands, are watched by what also keeps them in memory (`fastserve.cluster.kube.watched`). No handler of
kopf touches an object, so it puts no finalizer and no annotation of its own anywhere, and nothing that is wrong with an
object can stop a handler. Of several replicas the one that holds the Lease acts; the others wait.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kopf

from fastserve.cluster.kube.api import ACCESS_KEYS, CONFIG_MAPS, MODELS, PROFILES, KubeApi
from fastserve.cluster.kube.cluster import KubeCluster
from fastserve.cluster.kube.gateway import NAME as GATEWAY
from fastserve.cluster.kube.gateway import KubeGateway, is_empty
from fastserve.cluster.kube.heads import Heads, OneHead
from fastserve.cluster.kube.home import STATES, KubeHome
from fastserve.cluster.kube.lease import LEASE_SECONDS, Lease
from fastserve.cluster.kube.ray import GivenRay, RayClusterHead
from fastserve.cluster.kube.ray_clusters import RayClusters
from fastserve.cluster.kube.watched import Watched, WatchedApi
from fastserve.errors import FastServeError
from fastserve.spec.model import GROUP, VERSION
from fastserve_operator.conditions import Trouble, attempted
from fastserve_operator.model import Namespace
from fastserve_operator.rounds import Rounds

LEASE = "fastserve-operator"
LOOK_SECONDS = 3.0
CALM_SECONDS = 10.0
"""Between two looks while nothing is under way or served: a change of an object is seen at once all the same."""

GATHER_SECONDS = 0.2
"""Changes that come together are looked at together."""

MOST_COST_SECONDS = 4.0
"""However much a look costs, a change is looked at within so many seconds."""

FIRST_WAIT_SECONDS = 0.5
MOST_WAIT_SECONDS = 15.0
"""Between two watches of a collection; from the first to the most it doubles while they break at once."""

log = logging.getLogger("fastserve.operator")


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator was started with."""

    namespace: str | None
    """The only namespace to tend; None for all of them."""

    store: str
    ray_template: str | None
    """Name of the ConfigMap in each namespace that RayClusters are made from; None: none is made."""

    ray_cluster: str
    ray_address: str | None
    ray_token_file: Path | None
    serve_url: str | None
    stage_python: str
    gateway_url: str | None
    gateway_admin_url: str | None
    scratch: Path
    lease_namespace: str
    lease_seconds: int
    liveness: str | None


class Operator:
    """Everything that one operator tends, namespace by namespace."""

    def __init__(self, api: KubeApi, options: Options, acts: Callable[[], bool] = lambda: True) -> None:
        """acts: whether this process may still act."""
        self._acts = acts
        self._api = api.acting_only_while(acts)
        self._options = options
        self._namespaces: dict[str, Namespace] = {}
        self._rounds = Rounds()

    def tend(self) -> bool:
        """One look at every namespace. What goes wrong or hangs in one is no matter of another; and who may ask is
        looked at apart from what is served, so that a key that is taken away waits for no store and no Ray. Returns
        whether the next look is due soon."""
        looks: dict[str, Callable[[], bool]] = {}
        asked = self._asked_for()
        self._forget(asked)
        for name in sorted(asked | set(self._namespaces)):
            looks[f"namespace {name}"] = partial(self._tend, name)
        for name, tended in dict(self._namespaces).items():
            looks[f"namespace {name}, its keys"] = tended.tend_keys
        ended = self._rounds.go(looks, lambda name: looks[name]())
        for name, told in ended.items():
            if isinstance(told, Trouble):
                log.warning("%s: %s: %s", name, told.reason, told.message)
        return bool(self._rounds.under_way) or any(told is not False for told in ended.values())

    def _tend(self, name: str) -> bool:
        return self._namespace(name).tend_models()

    def close(self, seconds: float) -> None:
        """Wait for looks that are under way, but not longer than this."""
        self._rounds.close(seconds)

    def _asked_for(self) -> set[str]:
        """Namespaces in which somebody asks for something."""
        if self._options.namespace is not None:
            return {self._options.namespace}
        found = [*self._api.list(MODELS, None), *self._api.list(ACCESS_KEYS, None)]
        return {item["metadata"]["namespace"] for item in found}

    def _forget(self, asked: Collection[str]) -> None:
        """Leave namespaces alone in which nobody asks for anything any more: those that are gone themselves, and those
        whose gateway was told of it."""
        for name in self._namespaces.keys() - set(asked) - self._under_way():
            orders = attempted(partial(self._api.get, CONFIG_MAPS, name, GATEWAY))
            if orders is None or (not isinstance(orders, Trouble) and is_empty(orders)):
                del self._namespaces[name]

    def _under_way(self) -> set[str]:
        """Namespaces that are looked at."""
        return {name.removeprefix("namespace ").removesuffix(", its keys") for name in self._rounds.under_way}

    def _namespace(self, name: str) -> Namespace:
        if name not in self._namespaces:
            options = self._options
            # Namespaces share no artifact: what one puts in the store is never believed by another.
            home = KubeHome(self._api, name, options.scratch / name, f"{options.store.rstrip('/')}/{name}")
            home.create()
            gateway = KubeGateway(self._api, name, options.gateway_url, options.gateway_admin_url)
            cluster = KubeCluster(self._api, home, self._heads(name), gateway, say=log.info)
            self._namespaces[name] = Namespace(self._api, name, cluster, self._acts)
        return self._namespaces[name]

    def _heads(self, namespace: str) -> Heads:
        options, python = self._options, self._options.stage_python
        if options.ray_address is not None:
            return OneHead(GivenRay(options.ray_address, options.ray_token_file, options.serve_url, python))
        if options.ray_template is not None:
            return RayClusters(self._api, namespace, options.ray_template, python)
        return OneHead(RayClusterHead(self._api, namespace, options.ray_cluster, python))


def main(words: Sequence[str] | None = None) -> int:
    """Run until SIGTERM."""
    options = parse(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "kopf", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        api = WatchedApi.connect()
    except FastServeError as error:
        log.error("%s: %s", error.reason, error)
        return error.exit_code
    identity = f"{socket.gethostname()}_{os.getpid()}_{secrets.token_hex(4)}"
    lease = Lease(api, options.lease_namespace, LEASE, identity, options.lease_seconds)
    stop, wake = threading.Event(), threading.Event()
    watched = [
        api.keep(MODELS, options.namespace, changed=wake.set),
        api.keep(CONFIG_MAPS, options.namespace, STATES),
    ]
    operator = Operator(api, options, lambda: lease.held)
    died: list[str] = []
    threads = [
        _thread("lease", partial(_keep_lease, lease, stop, wake), stop, died),
        _thread("look", partial(_look, operator, lease, stop, wake, api.anew), stop, died),
        *(_thread("watch", partial(_watch, item, stop), stop, died) for item in watched),
    ]
    for thread in threads:
        thread.start()
    try:
        kopf.run(
            registry=_registry(wake),
            settings=_settings(),
            standalone=True,
            clusterwide=options.namespace is None,
            namespaces=[] if options.namespace is None else [options.namespace],
            liveness_endpoint=options.liveness,
        )
    finally:
        stop.set()
        wake.set()
        for thread in threads[:2]:  # a watch ends with the process
            thread.join(30)
        operator.close(10)
        attempted(lease.release)
    return int(bool(died))


def _thread(name: str, work: Callable[[], None], stop: threading.Event, died: list[str]) -> threading.Thread:
    """A thread that works until `stop`. One that ends before, of whatever cause, ends the process with it: an operator
    that lives, holds the lease and looks at nothing would be worse than one that is started anew."""

    def run() -> None:
        try:
            work()
        except BaseException:
            log.exception("the thread '%s' broke", name)
        finally:
            if not stop.is_set():
                died.append(name)
                os.kill(os.getpid(), signal.SIGTERM)

    return threading.Thread(target=run, name=name, daemon=True)


def _keep_lease(lease: Lease, stop: threading.Event, wake: threading.Event) -> None:
    """Renew the lease, or wait for it."""
    acted = False
    while not stop.is_set():
        told = attempted(lease.renew)
        if isinstance(told, Trouble):
            log.warning("the lease could not be renewed: %s", told.message)
        acts = lease.held  # it may also have run out by itself, while this process or the API server stood still
        if acts != acted:
            log.info("this replica %s", "acts" if acts else "waits: it holds the lease no longer")
            wake.set()
        acted = acts
        stop.wait(lease.renew_seconds)


def _watch(watched: Watched, stop: threading.Event) -> None:
    """Keep a collection watched; while it is not, each look lists it."""
    wait, told = FIRST_WAIT_SECONDS, False
    while not stop.is_set():
        began_at = time.monotonic()
        broke = attempted(lambda: watched.follow(patience_seconds=60.0))
        if isinstance(broke, Trouble) and not told:
            log.warning("%s are not watched for now, and listed at each look: %s", watched.name, broke.message)
        told = isinstance(broke, Trouble)
        if time.monotonic() > began_at + MOST_WAIT_SECONDS:
            wait = FIRST_WAIT_SECONDS
        stop.wait(wait)
        wait = min(2 * wait, MOST_WAIT_SECONDS)


def _look(
    operator: Operator, lease: Lease, stop: threading.Event, wake: threading.Event, anew: Callable[[], None]
) -> None:
    """Look every few seconds, and soon after a change. anew: called before the first look of a term, since another
    replica may have written until now."""
    term = 0
    while not stop.is_set():
        wake.clear()
        spent = time.process_time()
        told: bool | Trouble = False
        if lease.held:
            if term != lease.term:
                anew()
                term = lease.term
            told = attempted(operator.tend)
            if isinstance(told, Trouble):
                log.warning("%s: %s", told.reason, told.message)
        # Where there are thousands of objects a look costs seconds of a core: then looks are rarer.
        cost_seconds = min(time.process_time() - spent, MOST_COST_SECONDS)
        if wake.wait(max(LOOK_SECONDS if told else CALM_SECONDS, 10 * cost_seconds)):
            time.sleep(max(GATHER_SECONDS, cost_seconds))


def _registry(wake: threading.Event) -> kopf.OperatorRegistry:
    """Handlers that only say: look."""
    registry = kopf.OperatorRegistry()

    def changed(**_: Any) -> None:
        wake.set()

    for resource in (ACCESS_KEYS, PROFILES):
        kopf.on.event(GROUP, VERSION, resource.plural, registry=registry)(changed)

    @kopf.on.login(registry=registry)
    def login(**words: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**words) or kopf.login_with_kubeconfig(**words)

    return registry


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True  # our definitions are there before the operator is; it needs no right to watch
    settings.posting.enabled = False  # Events are written by whoever decides
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 60
    settings.watching.connect_timeout = 10
    settings.watching.server_timeout = 300  # a watch that is half open would be silent for ever
    return settings


def parse(words: Sequence[str] | None) -> Options:
    """The command line. Exits with 2, as argparse does, when it does not fit together."""
    parser = argparse.ArgumentParser(prog="python -m fastserve_operator", description="Tends Models on Kubernetes.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--namespace", help="tend this namespace alone")
    where.add_argument("--all-namespaces", action="store_true", help="tend every namespace")
    parser.add_argument(
        "--store", required=True, help="folder or s3:// URI; each namespace has a folder of its own in it"
    )
    ray = parser.add_mutually_exclusive_group()
    ray.add_argument("--ray-cluster", default="fastserve", help="name of each namespace's RayCluster")
    ray.add_argument("--ray-template", help="name of the ConfigMap that each namespace's RayClusters are made from")
    ray.add_argument("--ray-address", help="http://HOST:8265 of a Ray head, in place of a RayCluster")
    parser.add_argument("--ray-token-file", type=Path, help="file with the token of --ray-address")
    parser.add_argument(
        "--serve-url", help="where Serve's proxy of --ray-address answers; by default port 8000 of its host"
    )
    parser.add_argument("--stage-python", default="python", help="the interpreter that runs stages on Ray's machines")
    parser.add_argument("--gateway-url", help="where clients reach the gateway, ending in /v1")
    parser.add_argument("--gateway-admin-url", help="where the operator reaches the gateway's admin port")
    parser.add_argument("--scratch", type=Path, help="folder for what can be found out again")
    parser.add_argument("--lease-namespace", help="namespace of the Lease; by default the one that is tended")
    parser.add_argument(
        "--lease-seconds", type=int, default=LEASE_SECONDS, help="how long a replica that died is waited for"
    )
    parser.add_argument("--liveness", help="address of the liveness probe, such as http://0.0.0.0:8080/healthz")
    found = parser.parse_args(words)
    if found.all_namespaces and found.ray_address:
        parser.error("--ray-address serves one namespace; give --namespace, or use a RayCluster in each namespace")
    if found.all_namespaces and not found.lease_namespace:
        parser.error("--all-namespaces needs --lease-namespace: the operator's own")
    return Options(
        namespace=found.namespace,
        store=found.store,
        ray_template=found.ray_template,
        ray_cluster=found.ray_cluster,
        ray_address=found.ray_address,
        ray_token_file=found.ray_token_file,
        serve_url=found.serve_url,
        stage_python=found.stage_python,
        gateway_url=found.gateway_url,
        gateway_admin_url=found.gateway_admin_url,
        scratch=found.scratch or Path(tempfile.mkdtemp(prefix="fastserve-operator-")),
        lease_namespace=found.lease_namespace or found.namespace,
        lease_seconds=found.lease_seconds,
        liveness=found.liveness,
    )


if __name__ == "__main__":
    sys.exit(main())

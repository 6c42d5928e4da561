"""The cluster that a person means: a kubeconfig, one of its contexts, a namespace, found as kubectl finds them.

`--kubeconfig`, else KUBECONFIG (several files may be named), else `~/.kube/config`; in a pod without any of them its
own service account. A name that is not there is answered with those that are.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config

from fastserve.cluster.kube.api import BY_HAND, KubeApi
from fastserve.errors import ClusterFailed, UsageInvalid

DEFAULT_FILE = "~/.kube/config"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class Reached:
    """A namespace of a cluster, and how it was found."""

    api: KubeApi
    namespace: str
    context: str | None
    """None in a pod, which has no kubeconfig."""

    kubeconfig: str | None
    """The files that were read, as KUBECONFIG writes them; None in a pod."""

    @property
    def kubectl_flags(self) -> list[str]:
        """What makes kubectl look at the same place."""
        flags = [] if self.context is None else ["--context", self.context]
        return [*flags, "-n", self.namespace]


def reach(kubeconfig: Path | None, context: str | None, namespace: str | None) -> Reached:
    """Find the cluster and the namespace; nothing is asked of the cluster yet.

    namespace: None for the context's own, `default` where it has none. Raises UsageInvalid when there is no kubeconfig,
    it cannot be read, or has no such context.
    """
    files = str(kubeconfig) if kubeconfig is not None else os.environ.get("KUBECONFIG") or DEFAULT_FILE
    there = [name for name in files.split(os.pathsep) if name and Path(name).expanduser().is_file()]
    if not there:
        return _of_this_pod(files, context, namespace)
    contexts, current = _contexts(files)
    name = context or current
    if name is None:
        raise UsageInvalid(f"{files} names no current context; add --context NAME ({_named(contexts)})")
    if name not in contexts:
        raise UsageInvalid(f"there is no context {name} in {files}; {nearest(name, list(contexts))}")
    configuration = client.Configuration()
    try:
        config.load_kube_config(config_file=files, context=name, client_configuration=configuration)  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError, ValueError, KeyError, TypeError) as error:
        raise UsageInvalid(f"the context {name} of {files} cannot be used: {error}; mend the kubeconfig") from error
    wanted = namespace or contexts[name].get("namespace") or "default"
    return Reached(_api(configuration, f"context {name} of {files}"), wanted, name, files)


def nearest(word: str, names: Sequence[str], what: str = "there are") -> str:
    """What else there is: the names that are like a word, else all of them."""
    if not names:
        return "there is none at all"
    near = difflib.get_close_matches(word, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"{what}: {', '.join(sorted(names))}"


def _contexts(files: str) -> tuple[Mapping[str, Mapping[str, Any]], str | None]:
    """The contexts by name, and the current one's name."""
    try:
        merged = config.kube_config.KubeConfigMerger(files).config  # type: ignore[no-untyped-call]
        items = [item.value for item in merged.value.get("contexts") or ()]
        found = {item["name"]: dict(item.get("context") or {}) for item in items}
        current = merged.value.get("current-context") or None
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, config.ConfigException) as error:
        raise UsageInvalid(f"the kubeconfig {files} cannot be read: {error}; name another with --kubeconfig") from error
    return found, current


def _of_this_pod(files: str, context: str | None, namespace: str | None) -> Reached:
    if context is not None or not (ACCOUNT / "token").exists():
        raise UsageInvalid(
            f"there is no kubeconfig at {files}; name one with --kubeconfig FILE or KUBECONFIG, "
            "or leave --cluster, --context and --namespace out to work on this machine"
        )
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except config.ConfigException as error:
        raise ClusterFailed(f"the pod's service account cannot be used: {error}") from error
    own = (ACCOUNT / "namespace").read_text().strip()
    return Reached(_api(configuration, "the pod's service account"), namespace or own, None, None)


def _api(configuration: client.Configuration, words: str) -> KubeApi:
    configuration.retries = False
    advice = f"it is that of {words}: is that the cluster you mean, and is it up?"
    return KubeApi(client.ApiClient(configuration), BY_HAND, advice)


def _named(contexts: Mapping[str, object]) -> str:
    return f"there are: {', '.join(sorted(contexts))}" if contexts else "there is none"

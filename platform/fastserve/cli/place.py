"""Where a command works: the home folder of this machine, or a namespace of a cluster; and how it answers.

`--cluster`, `--context`, `--kubeconfig` or `-n` mean the cluster, found as kubectl finds it; `kubectl fastserve` always
does. Nothing of Kubernetes is imported until then.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fastserve.cluster.home import Home
from fastserve.errors import FastServeError, UsageInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastserve.cluster.kube.door import Door

PLUGIN: ContextVar[bool] = ContextVar("PLUGIN", default=False)
"""Whether the program is kubectl's plugin, which always means the cluster."""


class Output(StrEnum):
    """How an answer is written."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="text or json.")]


@dataclass(frozen=True, slots=True)
class Where:
    """What the options say of the place."""

    home_path: Path | None
    cluster: bool
    context: str | None
    kubeconfig: Path | None
    namespace: str | None

    @property
    def on_cluster(self) -> bool:
        """Whether a cluster is meant. Raises UsageInvalid when a home is named as well."""
        means = self.cluster or PLUGIN.get() or any((self.context, self.kubeconfig, self.namespace))
        if means and self.home_path is not None:
            raise UsageInvalid("--home is a folder of this machine and means no cluster; leave one of them out")
        return means

    def home(self) -> Home:
        """The home folder."""
        return Home(self.home_path)

    def door(self) -> Door:
        """The namespace of the cluster. Raises UsageInvalid when there is no such place."""
        try:
            from fastserve.cluster.kube.config import reach
            from fastserve.cluster.kube.door import Door
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("kubernetes", "urllib3"):
                raise
            raise UsageInvalid(
                "Kubernetes is reached with a package that is not installed here; install FastServe with its extra "
                "`operator`, as in `pip install 'fastserve[operator]'`"
            ) from error
        return Door(reach(self.kubeconfig, self.context, self.namespace))

    def local_only(self, command: str, instead: str) -> Home:
        """The home folder, for what only a laptop has. Raises UsageInvalid on a cluster."""
        if self.on_cluster:
            raise UsageInvalid(f"{command} works on this machine alone; on a cluster {instead}")
        return self.home()


@contextmanager
def as_plugin() -> Iterator[None]:
    """While it lasts, every command means the cluster."""
    token = PLUGIN.set(True)
    try:
        yield
    finally:
        PLUGIN.reset(token)


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the models in the home or the namespace, for shell completion; none when that cannot be said."""
    words = ctx.params
    known = {key: words.get(key) for key in ("context", "kubeconfig", "namespace")}
    where = Where(words.get("home"), bool(words.get("cluster")), **known)
    try:
        names = _names(where)
    except FastServeError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def _names(where: Where) -> list[str]:
    if not where.on_cluster:
        return where.home().known_models()
    return [str(item["metadata"]["name"]) for item in where.door().models.all()]


def _options(
    home: Annotated[
        Path | None,
        typer.Option("--home", help="Home folder; default: $FASTSERVE_HOME, else ~/.fastserve.", show_default=False),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="On the cluster of the current context, not on this machine.")
    ] = False,
    context: Annotated[
        str | None, typer.Option("--context", help="On the cluster of this context.", show_default=False)
    ] = None,
    kubeconfig: Annotated[
        Path | None,
        typer.Option("--kubeconfig", help="File that names clusters; default: $KUBECONFIG.", show_default=False),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", "-n", help="Namespace; default: the context's.", show_default=False),
    ] = None,
) -> Where:
    return Where(home, cluster, context, kubeconfig, namespace)


def placed(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say where it works, in place of its parameter `where`."""
    signature = inspect.signature(command)
    hints = get_type_hints(command, include_extras=True)
    options = inspect.signature(_options, eval_str=True).parameters

    @functools.wraps(command)
    def call(**words: Any) -> None:
        command(where=_options(**{name: words.pop(name) for name in options}), **words)

    own = [item.replace(annotation=hints[name]) for name, item in signature.parameters.items() if name != "where"]
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in (*own, *options.values())]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {item.name: item.annotation for item in parameters}
    return call

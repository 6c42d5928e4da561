"""`fastserve`: validate, plan, up, status, why, logs, chat, rollback, retry, keys, down, schema.

Exit codes: 0 done, 2 the manifest or the arguments are wrong, 3 the plan does not fit, 4 a gate refused, 5 the
cluster failed, 130 interrupted. A user's mistake never ends in a traceback; `--debug` shows it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastserve import __version__
from fastserve.cli import chat as chat_command
from fastserve.cli import keys as keys_command
from fastserve.cli import on_cluster, render, show, up_on_cluster
from fastserve.cli import up as up_command
from fastserve.cli.place import Output, OutputOption, Where, as_plugin, complete_model, placed
from fastserve.errors import FastServeError, UsageInvalid

INTERRUPTED = 130


class Commands(TyperGroup):
    """The commands, of which each may be interrupted with the exit code that shells expect."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="fastserve",
    cls=Commands,
    help="One Model manifest takes a language model from data to an endpoint: train, compress, evaluate, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(keys_command.app, name="keys", help="Create, list and revoke access keys.")


FileArgument = Annotated[Path, typer.Argument(help="Manifest: YAML with one or more objects; - is standard input.")]
NameArgument = Annotated[str, typer.Argument(help="Name of the model.", autocompletion=complete_model)]
OptionalName = Annotated[
    str | None,
    typer.Argument(help="Name of the model; default: all.", autocompletion=complete_model, show_default=False),
]


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.", is_eager=True)] = False,
) -> None:
    """Options before the command."""
    context.obj = {"debug": debug}
    if debug:
        os.environ["FASTSERVE_DEBUG"] = "1"
    if version:
        render.answer(__version__)
        raise typer.Exit


@app.command()
def validate(file: FileArgument, output: OutputOption = Output.TEXT) -> None:
    """Read a manifest and report everything that is wrong with it. Looks at nothing else."""
    show.validate(file, as_json=output is Output.JSON)


@app.command()
@placed
def plan(file: FileArgument, where: Where, output: OutputOption = Output.TEXT) -> None:
    """Show what `up` would do, how long and with how many bytes. Nothing runs."""
    if where.on_cluster:
        up_on_cluster.plan(where.door(), file, as_json=output is Output.JSON)
    else:
        show.plan(file, where.home(), as_json=output is Output.JSON)


@app.command()
@placed
def up(
    file: FileArgument,
    where: Where,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when the models are ready; `down` ends them.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of the endpoint; default: a free one.", show_default=False),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Artifact store: a folder or s3://bucket/prefix.", show_default=False)
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Bring the models of a manifest up.

    The stages that are due run, then what they made is served. On a cluster models are asked for and go on without
    this command, as with --detach.
    """
    if where.on_cluster:
        up_on_cluster.up(where.door(), file, port=port, store=store, as_json=output is Output.JSON)
        return
    up_command.up(file, where.home(), detach=detach, port=port, store=store, as_json=output is Output.JSON)


@app.command()
@placed
def status(
    where: Where,
    name: OptionalName = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the loss of the model's training.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show the state of one model or of all."""
    if where.on_cluster:
        on_cluster.status(where.door(), name, watch=watch, as_json=output is Output.JSON, plot=plot)
    else:
        show.status(where.home(), name, watch=watch, as_json=output is Output.JSON, plot=plot)


@app.command()
@placed
def why(name: NameArgument, where: Where, output: OutputOption = Output.TEXT) -> None:
    """Say why a model is in the state it is in, and what happens next."""
    if where.on_cluster:
        on_cluster.why(where.door(), name, as_json=output is Output.JSON)
    else:
        show.why(where.home(), name, as_json=output is Output.JSON)


@app.command()
@placed
def logs(
    name: NameArgument,
    where: Where,
    stage: Annotated[
        str | None,
        typer.Argument(help="source, train, compress, evaluate or serve; default: the newest.", show_default=False),
    ] = None,
    tail: Annotated[int, typer.Option(min=1, help="Lines from the end.")] = 200,
) -> None:
    """Show the log of a stage."""
    if where.on_cluster:
        on_cluster.logs(where.door(), name, stage, tail)
    else:
        show.logs(where.home(), name, stage, tail)


@app.command()
@placed
def chat(
    name: NameArgument,
    where: Where,
    message: Annotated[
        str | None, typer.Argument(help="What to say; without it a conversation begins.", show_default=False)
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="On a cluster: the gateway's address, ending in /v1, to use as it is.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is deterministic.")] = 0.0,
    output: OutputOption = Output.TEXT,
) -> None:
    """Talk to a model that is up."""
    as_json = output is Output.JSON
    if where.on_cluster:
        settings = {"max_tokens": max_tokens, "temperature": temperature}
        chat_command.chat_on_cluster(where.door(), name, message, url, settings, as_json)
        return
    if url is not None:
        raise UsageInvalid("--url is for a cluster; a home's own gateway is found without it")
    chat_command.chat(where.home(), name, message, max_tokens=max_tokens, temperature=temperature, as_json=as_json)


@app.command()
@placed
def rollback(
    name: NameArgument,
    where: Where,
    revision: Annotated[
        str | None, typer.Argument(help="First digits of the revision; default: the one before.", show_default=False)
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Serve an earlier revision, until the manifest changes."""
    if where.on_cluster:
        on_cluster.rollback(where.door(), name, revision, as_json=output is Output.JSON)
    else:
        show.rollback(where.home(), name, revision, as_json=output is Output.JSON)


@app.command()
@placed
def retry(name: NameArgument, where: Where, output: OutputOption = Output.TEXT) -> None:
    """Try failed stages again, on a cluster."""
    if not where.on_cluster:
        raise UsageInvalid("on this machine `fastserve up FILE` tries again; `retry` is for a cluster: add --cluster")
    on_cluster.retry(where.door(), name, as_json=output is Output.JSON)


@app.command()
@placed
def down(where: Where, name: OptionalName = None, output: OutputOption = Output.TEXT) -> None:
    """End one model, or everything in the home. Artifacts stay."""
    if where.on_cluster:
        on_cluster.down(where.door(), name, as_json=output is Output.JSON)
    else:
        up_command.down(where.home(), name, as_json=output is Output.JSON)


@app.command()
def schema() -> None:
    """Print the JSON schema of the manifest, for editors."""
    show.schema()


def main() -> None:
    """Entry point of the `fastserve` command."""
    sys.exit(run(sys.argv[1:]))


def plugin() -> None:
    """Entry point of `kubectl-fastserve`, which kubectl runs as `kubectl fastserve`: commands mean the cluster."""
    with as_plugin():
        sys.exit(run(sys.argv[1:], "kubectl fastserve"))


def run(arguments: list[str], program: str = "fastserve") -> int:
    """Run one command line and return its exit code."""
    wants_json = any(
        argument in ("-ojson", "--output=json", "-o=json") or (argument == "json" and before in ("-o", "--output"))
        for before, argument in zip(["", *arguments], arguments, strict=False)
    )
    try:
        app(args=arguments, prog_name=program)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except FastServeError as error:
        if os.environ.get("FASTSERVE_DEBUG"):
            render.err.print_exception()
        render.error(error, as_json_too=wants_json)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone; that is not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    main()

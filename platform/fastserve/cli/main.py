"""`fastserve`: validate, plan, up, status, why, logs, chat, rollback, keys, down, schema.

Exit codes: 0 done, 2 the manifest or the arguments are wrong, 3 the plan does not fit, 4 a gate refused, 5 the
cluster failed, 130 interrupted. A user's mistake never ends in a traceback; `--debug` shows it.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastserve import __version__
from fastserve.cli import chat as chat_command
from fastserve.cli import keys as keys_command
from fastserve.cli import render, show
from fastserve.cli import up as up_command
from fastserve.cluster.home import Home
from fastserve.errors import FastServeError

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


class Output(StrEnum):
    """How an answer is written."""

    TEXT = "text"
    JSON = "json"


def complete_model(incomplete: str) -> list[str]:
    """Names of the models in the default home, for shell completion."""
    return [name for name in Home().known_models() if name.startswith(incomplete)]


HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Home folder; default: $FASTSERVE_HOME, else ~/.fastserve.", show_default=False),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="text or json.")]
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
def plan(file: FileArgument, home: HomeOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show what `up` would do, how long and with how many bytes. Nothing runs."""
    show.plan(file, Home(home), as_json=output is Output.JSON)


@app.command()
def up(
    file: FileArgument,
    home: HomeOption = None,
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
    """Bring the models of a manifest up: run the stages that are due, then serve."""
    up_command.up(file, Home(home), detach=detach, port=port, store=store, as_json=output is Output.JSON)


@app.command()
def status(
    name: OptionalName = None,
    home: HomeOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the loss of the model's training.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show the state of one model or of all."""
    show.status(Home(home), name, watch=watch, as_json=output is Output.JSON, plot=plot)


@app.command()
def why(name: NameArgument, home: HomeOption = None, output: OutputOption = Output.TEXT) -> None:
    """Say why a model is in the state it is in, and what happens next."""
    show.why(Home(home), name, as_json=output is Output.JSON)


@app.command()
def logs(
    name: NameArgument,
    stage: Annotated[
        str | None,
        typer.Argument(help="source, train, compress, evaluate or serve; default: the newest.", show_default=False),
    ] = None,
    home: HomeOption = None,
    tail: Annotated[int, typer.Option(min=1, help="Lines from the end.")] = 200,
) -> None:
    """Show the log of a stage."""
    show.logs(Home(home), name, stage, tail)


@app.command()
def chat(
    name: NameArgument,
    message: Annotated[
        str | None, typer.Argument(help="What to say; without it a conversation begins.", show_default=False)
    ] = None,
    home: HomeOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is deterministic.")] = 0.0,
    output: OutputOption = Output.TEXT,
) -> None:
    """Talk to a model that is up."""
    chat_command.chat(
        Home(home), name, message, max_tokens=max_tokens, temperature=temperature, as_json=output is Output.JSON
    )


@app.command()
def rollback(
    name: NameArgument,
    revision: Annotated[
        str | None, typer.Argument(help="First digits of the revision; default: the one before.", show_default=False)
    ] = None,
    home: HomeOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Serve an earlier revision, until the manifest changes."""
    show.rollback(Home(home), name, revision, as_json=output is Output.JSON)


@app.command()
def down(name: OptionalName = None, home: HomeOption = None, output: OutputOption = Output.TEXT) -> None:
    """End one model, or everything in the home. Artifacts stay."""
    up_command.down(Home(home), name, as_json=output is Output.JSON)


@app.command()
def schema() -> None:
    """Print the JSON schema of the manifest, for editors."""
    show.schema()


def main() -> None:
    """Entry point of the `fastserve` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    wants_json = any(
        argument in ("-ojson", "--output=json", "-o=json") or (argument == "json" and before in ("-o", "--output"))
        for before, argument in zip(["", *arguments], arguments, strict=False)
    )
    try:
        app(args=arguments)
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

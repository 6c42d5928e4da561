"""`fastserve keys`: the key is shown once, when it is made."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Annotated

import typer

from fastserve.cli import render
from fastserve.cluster import access
from fastserve.cluster.home import Home
from fastserve.cluster.local import LocalCluster
from fastserve.errors import UsageInvalid

app = typer.Typer(no_args_is_help=True)

HomeOption = Annotated[Path | None, typer.Option("--home", help="Home folder.", show_default=False)]
JsonOption = Annotated[str, typer.Option("--output", "-o", help="text or json.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the key, such as the team that uses it.")],
    model: Annotated[
        list[str], typer.Option("--model", "-m", help="Model that the key may ask for; may be given again.")
    ],
    expires: Annotated[str | None, typer.Option(help="Last day, YYYY-MM-DD.", show_default=False)] = None,
    home: HomeOption = None,
    output: JsonOption = "text",
) -> None:
    """Make a key and show it, once."""
    where = Home(home)
    where.create()
    key = access.create_key(where, name, model, _day(expires))
    LocalCluster(where).refresh_gateway()
    if output == "json":
        render.as_json({"name": name, "models": model, "expires": expires, "key": key})
    else:
        render.answer(key)
        render.say("This key is shown once; only its SHA-256 is kept.")


@app.command("list")
def list_(home: HomeOption = None, output: JsonOption = "text") -> None:
    """Show the keys by name, with what each may do."""
    found = access.list_keys(Home(home))
    if output == "json":
        render.as_json(found)
    else:
        render.table(
            ["NAME", "MODELS", "EXPIRES"], [(k["name"], ", ".join(k["models"]), k["expires"] or "never") for k in found]
        )


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="Name of the key.")], home: HomeOption = None) -> None:
    """Take a key away; it works no longer within a second."""
    where = Home(home)
    access.revoke_key(where, name)
    LocalCluster(where).refresh_gateway()
    render.say(f"The key {name} is revoked.")


def _day(text: str | None) -> date | None:
    if text is None:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise UsageInvalid(f"--expires '{text}' is not a day; write YYYY-MM-DD") from None

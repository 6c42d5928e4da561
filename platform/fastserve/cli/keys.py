"""`fastserve keys`: the key is shown once, when it is made."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated

import typer

from fastserve.cli import render
from fastserve.cli.place import Output, OutputOption, Where, placed
from fastserve.cluster import access
from fastserve.cluster.local import LocalCluster
from fastserve.errors import UsageInvalid

app = typer.Typer(no_args_is_help=True)


@app.command()
@placed
def create(
    name: Annotated[str, typer.Argument(help="Name of the key, such as the team that uses it.")],
    where: Where,
    model: Annotated[
        list[str], typer.Option("--model", "-m", help="Model that the key may ask for; may be given again.")
    ],
    expires: Annotated[str | None, typer.Option(help="Last day, YYYY-MM-DD.", show_default=False)] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Make a key and show it.

    It is shown once on this machine; on a cluster it stays in the Secret NAME-key.
    """
    key, kept = _created(where, name, model, _day(expires))
    if output is Output.JSON:
        render.as_json({"name": name, "models": model, "expires": expires, "key": key})
    else:
        render.answer(key)
        render.say(kept)


def _created(where: Where, name: str, models: list[str], expires: date | None) -> tuple[str, str]:
    """The key, and where it is kept."""
    if where.on_cluster:
        from fastserve.cluster.kube.keys import create_key

        if expires is not None and expires < datetime.now(UTC).date():
            raise UsageInvalid(f"--expires {expires} has passed; give a day that is still to come")
        return create_key(where.door(), name, models, expires), f"It stays in the Secret {name}-key, under key."
    home = where.home()
    home.create()
    key = access.create_key(home, name, models, expires)
    LocalCluster(home).refresh_gateway()
    return key, "This key is shown once; only its SHA-256 is kept."


@app.command("list")
@placed
def list_(where: Where, output: OutputOption = Output.TEXT) -> None:
    """Show the keys by name, with what each may do."""
    if where.on_cluster:
        from fastserve.cluster.kube.keys import list_keys

        found = list_keys(where.door())
    else:
        found = access.list_keys(where.home())
    if output is Output.JSON:
        render.as_json(found)
    else:
        render.table(
            ["NAME", "MODELS", "EXPIRES"], [(k["name"], ", ".join(k["models"]), k["expires"] or "never") for k in found]
        )


@app.command()
@placed
def revoke(name: Annotated[str, typer.Argument(help="Name of the key.")], where: Where) -> None:
    """Take a key away. It works no longer within a second, on a cluster within some."""
    if where.on_cluster:
        from fastserve.cluster.kube.keys import revoke_key

        revoke_key(where.door(), name)
    else:
        home = where.home()
        access.revoke_key(home, name)
        LocalCluster(home).refresh_gateway()
    render.say(f"The key {name} is revoked.")


def _day(text: str | None) -> date | None:
    if text is None:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise UsageInvalid(f"--expires '{text}' is not a day; write YYYY-MM-DD") from None

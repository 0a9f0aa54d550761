"""`slimtune keys`: who may use the API. For the operator, on the database itself; no route makes keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.embedded import running_database_url
from cli.programs import ROOT
from cli.sizes import format_bytes, parse_bytes

HOME = ROOT / ".slimtune"

app = typer.Typer(name="keys", help="API keys: who may ask, and for how much.", no_args_is_help=True)

Home = Annotated[Path, typer.Option(help="Folder of the running service whose database is meant.", file_okay=False)]
DatabaseUrl = Annotated[
    str | None, typer.Option(envvar="DATABASE_URL", help="SQLAlchemy URL, in place of --home.", show_envvar=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key: it sees all that is this tenant's, and nothing else.")],
    name: Annotated[str, typer.Option(help="For you, to tell keys apart.")],
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Of each API process.")] = None,
    max_jobs: Annotated[int | None, typer.Option(min=1, help="Unfinished jobs of the tenant.")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="That the tenant may store, such as 50GiB.")] = None,
    expires_days: Annotated[float | None, typer.Option(help="Days for which it is valid.")] = None,
    home: Home = HOME,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once: only its hash is stored."""
    try:
        size = None if max_bytes is None else parse_bytes(max_bytes)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-bytes") from error
    options = {
        "--tenant": tenant,
        "--name": name,
        "--requests-per-minute": requests_per_minute,
        "--max-jobs": max_jobs,
        "--max-bytes": size,
        "--expires-days": expires_days,
    }
    given = [f"{option}={value}" for option, value in options.items() if value is not None]
    key = _ask(home, database_url, "create", *given)
    if as_json:
        typer.echo(json.dumps(key))
    else:
        typer.echo(f"{key['id']} of tenant {key['tenant']}; the key is shown this once:", err=True)
        typer.echo(key["key"])


@app.command(name="list")
def list_all(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    home: Home = HOME,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """All keys, those that are no longer valid too."""
    keys = _ask(home, database_url, "list", *([] if tenant is None else [f"--tenant={tenant}"]))
    if as_json:
        typer.echo(json.dumps(keys))
        return
    rows = [["id", "tenant", "name", "key", "created", "expires", "revoked", "last used", "limits"]]
    rows += [[key["id"], key["tenant"], key["name"], f"{key['prefix']}...", *_times(key), _limits(key)] for key in keys]
    printable = [[text.encode("ascii", "backslashreplace").decode() for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*printable, strict=True)]
    for row in printable:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `slimtune keys list` shows it: key_...")],
    home: Home = HOME,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make a key invalid, within seconds and for good. Its tenant's jobs and data stay."""
    key = _ask(home, database_url, "revoke", key_id)
    typer.echo(json.dumps(key) if as_json else f"{key['id']} ({key['name']}) is revoked")


def _ask(home: Path, database_url: str | None, *arguments: str) -> Any:
    """The answer of service.keys_program, a process of its own. Exits with its refusal."""
    url = database_url or running_database_url(home.resolve() / "servers")
    if url is None:
        raise _exit(f"no database runs in {home}: start `slimtune up`, give --home, or set DATABASE_URL")
    done = subprocess.run(  # noqa: S603  # our own program, its arguments one by one
        [sys.executable, "-m", "service.keys_program", *arguments],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    try:
        raise _exit(json.loads(done.stdout)["error"])
    except (ValueError, KeyError):
        raise _exit(done.stderr.strip().rpartition("\n")[2]) from None


def _exit(reason: str) -> typer.Exit:
    typer.echo(f"error: {reason}", err=True)
    return typer.Exit(1)


def _times(key: dict[str, Any]) -> list[str]:
    names = ("created_at", "expires_at", "revoked_at", "last_used_at")
    return [str(key[name])[:16].replace("T", " ") if key[name] else "" for name in names]


def _limits(key: dict[str, Any]) -> str:
    limits = {
        "requests_per_minute": "{} requests/min",
        "max_jobs": "{} jobs",
        "max_bytes": "{}",
    }
    values = {name: key[name] for name in limits if key[name] is not None}
    if "max_bytes" in values:
        values["max_bytes"] = format_bytes(values["max_bytes"])
    return ", ".join(limits[name].format(value) for name, value in values.items())

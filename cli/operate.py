"""Commands for the operator: each part of the service as a program of its own, the schema, the files.

They become the program that they are named for, with its exit code and its signals. The environment is the program's:
DATABASE_URL, REDIS_URL, SLIMTUNE_DATA_DIR and the others of docs/operating.md. What only looks at database and files
finds those of a running `slimtune up` by itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cli import programs
from cli.embedded import running_database_url
from cli.keys import HOME
from cli.output import fail

app = typer.Typer()
PANEL = "Operating a service"
ALWAYS = ("DATABASE_URL", "REDIS_URL", "SLIMTUNE_DATA_DIR")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[
    Path,
    typer.Option(help="Folder of the running service that is meant; DATABASE_URL goes before it.", file_okay=False),
]


@app.command(rich_help_panel=PANEL)
def api(
    host: Annotated[str, typer.Option(envvar="SLIMTUNE_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="SLIMTUNE_PORT", min=0, max=65_535, help="0 takes a free one.")] = 8000,
) -> None:
    """Run the HTTP API. On another address than a loopback one it asks for keys."""
    _become(programs.api(host, port), *ALWAYS, SLIMTUNE_HOST=host, SLIMTUNE_PORT=str(port))


@app.command(rich_help_panel=PANEL)
def worker() -> None:
    """Run a worker, on all that this machine has of it. SIGTERM has running jobs write a checkpoint first."""
    _become(programs.worker(), *ALWAYS)


@app.command(rich_help_panel=PANEL)
def sweeper() -> None:
    """Run the sweeper: it takes back what dead workers held, and deletes what has had its time. A second one waits."""
    _become(programs.sweeper(), *ALWAYS)


@app.command(rich_help_panel=PANEL)
def webhooks() -> None:
    """Run the sender of webhooks."""
    _become(programs.webhooks(), *ALWAYS)


@app.command(rich_help_panel=PANEL)
def migrate(revision: Annotated[str, typer.Argument(help="How far; without it, to the newest.")] = "head") -> None:
    """Bring the database's schema up to date. Two at once are fine; one that could not get a lock can be run again."""
    _become(programs.migrate(revision), "DATABASE_URL")


@app.command(rich_help_panel=PANEL)
def verify(
    hashes: Annotated[bool, typer.Option("--hashes", help="Read everything, and compare SHA-256s too.")] = False,
    collect: Annotated[
        bool, typer.Option("--collect", help="Have the sweeper remove, an hour later, what is nobody's.")
    ] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Is every file there that the database knows? After a restore. Exit code 1 if something is missing or damaged."""
    options = {"--hashes": hashes, "--collect": collect, "--json": as_json}
    command = programs.verify(*(name for name, wanted in options.items() if wanted))
    _become(command, *ALWAYS, **_of_running(home))


@app.command(rich_help_panel=PANEL)
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how much it would be.")] = False,
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Delete now what has had its time by SLIMTUNE_KEEP_METRICS_DAYS, SLIMTUNE_KEEP_CHECKPOINTS_DAYS and
    SLIMTUNE_KEEP_JOBS_DAYS, as the sweeper does little by little."""
    options = {"--dry-run": dry_run, "--json": as_json}
    command = programs.prune(*(name for name, wanted in options.items() if wanted))
    _become(command, *ALWAYS, **_of_running(home))


def _of_running(home: Path) -> dict[str, str]:
    """Where `slimtune up` keeps things, if it runs there and nothing else is meant."""
    url = None if os.environ.get("DATABASE_URL") else running_database_url(home.resolve() / "servers")
    if url is None:
        return {}
    data = os.environ.get("SLIMTUNE_DATA_DIR") or str(home.resolve() / "data")
    # There is a broker, which these programs do not ask.
    return {"DATABASE_URL": url, "REDIS_URL": "redis://", "SLIMTUNE_DATA_DIR": data}


def _become(command: list[str], *needed: str, **environment: str) -> NoReturn:
    """The program in place of this process."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        fail(f"{', '.join(missing)} must be set; `slimtune up` runs everything here, and sets them itself", 2)
    sys.stdout.flush()
    os.execve(command[0], command, environment)  # noqa: S606  # ours

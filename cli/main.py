"""The `slimtune` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.client import DamagedDownloadError, ServiceError
from cli.demo import STEPS, DemoError, run_demo
from cli.up import ROOT, Options, StackError, run_until_stopped

HOME = ROOT / ".slimtune"

app = typer.Typer(
    name="slimtune",
    help="Fine-tuning jobs under a hard memory budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Home = Annotated[Path, typer.Option(help="Folder of data, logs and sockets.", file_okay=False)]


@app.command()
def up(
    host: Annotated[str, typer.Option(envvar="SLIMTUNE_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="SLIMTUNE_PORT", min=0, max=65_535, help="0 takes a free one.")] = 8000,
    home: Home = HOME,
    database_url: Annotated[
        str | None, typer.Option(envvar="DATABASE_URL", help="SQLAlchemy URL; without it PostgreSQL is embedded.")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(envvar="REDIS_URL", help="Broker URL; without it Redis is embedded.")
    ] = None,
) -> None:
    """Run the whole service here until Ctrl-C: database, broker, API, one worker, sweeper."""
    console = Console(highlight=False, soft_wrap=True)
    options = Options(home, host, port, database_url or None, redis_url or None)
    try:
        run_until_stopped(options, lambda text: console.print(text, markup=False))
    except StackError as error:
        fail(error)


@app.command()
def demo(
    url: Annotated[
        str | None, typer.Option(help="Use a running service in place of one that is started and stopped.")
    ] = None,
    home: Home = HOME,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of the job.")] = STEPS,
) -> None:
    """Run one real training job through the REST API, from the upload to a generated sample."""
    try:
        run_demo(Console(highlight=False), home, url, steps)
    except (StackError, ServiceError, DamagedDownloadError, DemoError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def fail(error: Exception) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
    raise typer.Exit(1) from error


if __name__ == "__main__":
    app()

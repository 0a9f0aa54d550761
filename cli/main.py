"""The `slimtune` command."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.markup import escape

from cli import jobs, keys
from cli.client import Client, DamagedDownloadError, ServiceError
from cli.demo import STEPS, DemoError, run_demo
from cli.doctor import examine
from cli.output import EXITS, REFUSED, URL, Json, Url, exits, fail, print_json
from cli.up import Options, StackError, run_until_stopped

if TYPE_CHECKING:
    from cli.client.requests import SampleOptions

HOME = keys.HOME
MARKS = {"ok": "green", "warning": "yellow", "wrong": "red"}

app = typer.Typer(
    name="slimtune",
    help=f"Fine-tuning jobs under a hard memory budget.\n\n{EXITS}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(jobs.app)
app.add_typer(keys.app)

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


@app.command()
def generate(
    job: Annotated[str, typer.Argument(help="Id of the job whose checkpoint continues the prompt.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; without it and --file, that of stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with that text.", exists=True, dir_okay=False)] = None,
    checkpoint: Annotated[str, typer.Option(help="latest, best, final or a step.")] = "latest",
    max_tokens: Annotated[int | None, typer.Option(help="The most to say.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token every time.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only tokens with this probability together.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before; may be given several times.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    url: Url = URL,
) -> None:
    """Continue a text with a job's checkpoint and print what comes, as it comes; on stderr, what is said of it."""
    if prompt is not None and file is not None:
        raise typer.BadParameter("give one of --prompt and --file")
    if prompt is None:
        prompt = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    options = {
        "checkpoint": int(checkpoint) if checkpoint.isdecimal() else checkpoint,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop": stop or None,
        "seed": seed,
    }
    request = cast("SampleOptions", {name: value for name, value in options.items() if value is not None})
    with exits(), Client(url) as client:
        sample = client.jobs.get(job).generate(prompt, on_text=lambda text: typer.echo(text, nl=False), **request)
    typer.echo()
    reason = f"{sample['finish_reason']}: {sample['tokens']} tokens in {sample['seconds']:.1f} s"
    typer.echo(f"{reason}, step {sample['step']}, seed {sample['seed']}", err=True)


@app.command()
def doctor(home: Home = HOME, url: Url = URL, as_json: Json = False) -> None:
    """Find what is wrong with this installation, and how to mend it. Exit code 1 if something is."""
    found = []
    out = Console(highlight=False, soft_wrap=True)
    for finding in examine(url, home):
        found.append(finding)
        if not as_json:
            out.print(f"[{MARKS[finding.level]}]{finding.level:>7}[/]", escape(finding.what))
            if finding.mend:
                out.print(f"{'':>7} {finding.mend}", markup=False)
    if as_json:
        print_json([asdict(finding) for finding in found])
    raise typer.Exit(REFUSED if any(finding.level == "wrong" for finding in found) else 0)


if __name__ == "__main__":
    app()

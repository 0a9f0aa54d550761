"""Commands for jobs: plan, submit, look, steer, take the results home."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from cli.client import Client, FileRecord, Job
from cli.live import follow, why
from cli.output import NOT_SUCCEEDED, URL, Json, Url, console, exits, fail, print_json
from cli.plans import show_choice, show_frontier
from cli.sizes import format_bytes, format_seconds
from cli.specs import read_spec, upload_files, without_files

ID_WIDTH = 36

app = typer.Typer()

Spec = Annotated[
    Path | None, typer.Argument(help="YAML or JSON file with the fields of a job.", exists=True, dir_okay=False)
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job.")]
JobIds = Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids of jobs.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field, as in optimizer.learning_rate=3e-4."),
]
Model = Annotated[str | None, typer.Option(help="Name or id of the model.")]
Dataset = Annotated[str | None, typer.Option(help="Id of the training data, or a file to upload.")]
Validation = Annotated[str | None, typer.Option(help="The same for validation losses.")]
Cap = Annotated[str | None, typer.Option(metavar="BYTES", help="Hard memory cap, as in 1.5GiB.")]
Length = Annotated[int | None, typer.Option(help="Tokens per sequence.", min=1)]
Batch = Annotated[int | None, typer.Option(help="Sequences per optimiser step.", min=1)]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps.", min=1)]
Epochs = Annotated[int | None, typer.Option(help="Passes over the data, in place of steps.", min=1)]


@app.command()
def plan(
    spec: Spec = None,
    model: Model = None,
    dataset: Dataset = None,
    memory_cap: Cap = None,
    sequence_length: Length = None,
    batch_size: Batch = None,
    steps: Steps = None,
    epochs: Epochs = None,
    settings: Set = None,
    url: Url = URL,
    as_json: Json = False,
) -> None:
    """Would a job fit under its cap, how, and how fast? Runs nothing; uploads data only to count epochs."""
    given = {
        "model": model,
        "dataset": dataset,
        "memory_cap": memory_cap,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "steps": steps,
        "epochs": epochs,
    }
    with exits(as_json=as_json), Client(url) as client:
        body = read_spec(spec, given, settings or ())
        body = upload_files(client, body, _folder(spec), _say) if "epochs" in body else without_files(body)
        answer = client.plans.create(**body)
        if as_json:
            print_json(answer)
            return
        out = console()
        show_frontier(out, answer, f"{body.get('model')}, sequences of {body.get('sequence_length')} tokens")
        show_choice(out, answer)
        out.print(f"in all {format_seconds(answer['predicted_total_seconds'])}")


@app.command()
def submit(
    spec: Spec = None,
    name: Annotated[str | None, typer.Option(help="What to call the job.")] = None,
    model: Model = None,
    dataset: Dataset = None,
    validation_dataset: Validation = None,
    memory_cap: Cap = None,
    sequence_length: Length = None,
    batch_size: Batch = None,
    steps: Steps = None,
    epochs: Epochs = None,
    settings: Set = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show it until it ends.")] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key makes one job, however often it is sent.")
    ] = None,
    url: Url = URL,
    as_json: Json = False,
) -> None:
    """Queue a job; files of data are uploaded first. Prints its id."""
    given = {
        "name": name,
        "model": model,
        "dataset": dataset,
        "validation_dataset": validation_dataset,
        "memory_cap": memory_cap,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "steps": steps,
        "epochs": epochs,
    }
    with exits(as_json=as_json), Client(url) as client:
        body = upload_files(client, read_spec(spec, given, settings or ()), _folder(spec), _say)
        job = client.jobs.create(idempotency_key=idempotency_key, **body)
        if as_json and not watch:
            print_json(job.data)
            return
        if not as_json:
            show_choice(console(stderr=True), job.plan)
            typer.echo(job.id)
        if watch:
            _follow(job, as_json=as_json)


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(help="The most to show.", min=1)] = 20,
    url: Url = URL,
    as_json: Json = False,
) -> None:
    """Jobs, newest first."""
    with exits(as_json=as_json), Client(url) as client:
        found = [job for _, job in zip(range(limit), client.jobs.list(status), strict=False)]
    if as_json:
        print_json([job.data for job in found])
        return
    table = Table(box=None)
    table.add_column("job", min_width=ID_WIDTH)  # never cut: it is what the other commands want
    for column in ("name", "status", "step", "loss", "memory", "left"):
        table.add_column(column)
    for job in found:
        table.add_row(*_cells(job))
    console().print(table)


@app.command()
def watch(job: JobId, url: Url = URL, as_json: Json = False) -> None:
    """Show a job until it ends: progress, loss, memory against the cap. Exit code 4 if it did not succeed."""
    with exits(as_json=as_json), Client(url) as client:
        _follow(client.jobs.get(job), as_json=as_json)


@app.command()
def logs(
    job: JobId,
    follow_on: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    url: Url = URL,
    as_json: Json = False,
) -> None:
    """What happened to a job, one event a line."""
    with exits(as_json=as_json), Client(url) as client:
        found = client.jobs.get(job)
        for event in found.watch() if follow_on else found.events():
            if as_json:
                typer.echo(json.dumps(event))
            else:
                data = " ".join(f"{name}={value}" for name, value in event["data"].items() if value is not None)
                typer.echo(f"{event['created_at']} {event['type']} {data}".rstrip())


@app.command()
def metrics(job: JobId, url: Url = URL, as_json: Json = False) -> None:
    """The loss curve as CSV, or JSON, one object a line."""
    with exits(as_json=as_json), Client(url) as client:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        for number, row in enumerate(client.jobs.get(job).metrics()):
            if as_json:
                typer.echo(json.dumps(row))
                continue
            if number == 0:
                writer.writerow(row)
            writer.writerow(row.values())


@app.command()
def pause(jobs: JobIds, url: Url = URL, as_json: Json = False) -> None:
    """Have jobs write a checkpoint and wait."""
    _steer(jobs, url, as_json, Job.pause)


@app.command()
def resume(
    jobs: JobIds,
    memory_cap: Annotated[str | None, typer.Option(metavar="BYTES", help="Go on under another cap.")] = None,
    url: Url = URL,
    as_json: Json = False,
) -> None:
    """Queue paused jobs again; they go on from their checkpoints."""
    _steer(jobs, url, as_json, lambda job: job.resume(memory_cap))


@app.command()
def cancel(jobs: JobIds, url: Url = URL, as_json: Json = False) -> None:
    """End jobs."""
    _steer(jobs, url, as_json, Job.cancel)


@app.command()
def download(
    job: JobId,
    out: Annotated[Path, typer.Option(help="Folder for the files.", file_okay=False)] = Path(),
    checkpoint: Annotated[str, typer.Option(help="latest, best, final or a step.")] = "final",
    file: Annotated[list[str] | None, typer.Option(help="Only this file; may be given several times.")] = None,
    url: Url = URL,
) -> None:
    """Take a checkpoint home. Every SHA-256 is verified, and a download that broke off goes on where it was."""
    with exits(), Client(url) as client:
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
        with Progress(*columns, TransferSpeedColumn(), console=console(stderr=True)) as progress:
            tasks: dict[str, TaskID] = {}

            def moved(each: FileRecord, count: int) -> None:
                if each["name"] not in tasks:
                    tasks[each["name"]] = progress.add_task(each["name"], total=each["bytes"])
                progress.update(tasks[each["name"]], completed=count)

            try:
                paths = client.jobs.get(job).download(out, checkpoint, files=file or (), on_bytes=moved)
            except ValueError as error:
                fail(error)
        for path in paths:
            typer.echo(str(path))


def _steer(jobs: list[str], url: str, as_json: bool, act: Callable[[Job], Job]) -> None:
    with exits(as_json=as_json), Client(url) as client:
        for job_id in jobs:
            job = act(client.jobs.get(job_id))
            if as_json:
                typer.echo(json.dumps(job.data))
            else:
                typer.echo(f"{job.id} {job.status}{_wish(job)}")


def _wish(job: Job) -> str:
    """What a job has been asked for that it has not done yet."""
    asked = {"cancel": "will be cancelled", "pause": "will pause"}.get(job.data["desired"], "")
    return f", {asked}" if asked and job.status in ("queued", "running") else ""


def _follow(job: Job, *, as_json: bool) -> None:
    follow(console(stderr=as_json), job)
    if as_json:
        print_json(job.data)
    if job.status != "succeeded":
        if not as_json:
            fail(why(job), NOT_SUCCEEDED)
        raise typer.Exit(NOT_SUCCEEDED)


def _cells(job: Job) -> list[str]:
    progress, peak, left = job.progress, job.measured_peak_bytes, job.progress["eta_seconds"]
    return [
        job.id,
        job.name or "",
        job.status,
        f"{progress['step']}/{progress['total_steps']}",
        "" if progress["loss"] is None else f"{progress['loss']:.3f}",
        format_bytes(job.memory_cap_bytes)
        if peak is None
        else f"{format_bytes(peak)} of {format_bytes(job.memory_cap_bytes)}",
        format_seconds(left) if left and job.status == "running" else "",
    ]


def _folder(spec: Path | None) -> Path:
    return Path() if spec is None else spec.parent


def _say(text: str) -> None:
    typer.echo(text, err=True)

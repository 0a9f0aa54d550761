"""A job as it runs: a live view on a terminal, else a line every few steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.client import Job, Metric
from cli.sizes import format_bytes, format_seconds

POLL_SECONDS = 0.3
PLAIN_EVERY = 10
"""Steps between lines where there is no terminal to draw on."""
BAR_WIDTH = 40
_BLOCKS = "▁▂▃▄▅▆▇█"

Report = Callable[[Job, Sequence[Metric]], None]


def follow(console: Console, job: Job, check: Callable[[], None] = lambda: None) -> list[Metric]:
    """Show the job until it rests; returns the rows of all its steps. `check` may raise to give it up."""
    rows: dict[int, Metric] = {}
    with _reporter(console) as report:
        for look in job.follow(POLL_SECONDS):
            check()
            rows.update((row["step"], row) for row in look.metrics)
            report(job, [rows[step] for step in sorted(rows)])
    return [rows[step] for step in sorted(rows)]


def state(job: Job) -> str:
    """Where a job is, in one line: status, loss, step time, memory against the cap, time left."""
    progress = job.progress
    parts = [job.status] if job.status != "running" or progress["step"] == 0 else []
    if progress["loss"] is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    if progress["step_seconds"] is not None:
        parts.append(f"{format_seconds(progress['step_seconds'])}/step")
    if job.measured_peak_bytes is not None:
        parts.append(f"memory {format_bytes(job.measured_peak_bytes)} of {format_bytes(job.memory_cap_bytes)}")
    if progress["eta_seconds"]:
        parts.append(f"{format_seconds(progress['eta_seconds'])} left")
    return ", ".join(parts)


def why(job: Job) -> str:
    """How a job that has not succeeded ended, and what to do."""
    error = job.error
    if error is None:
        return f"{job.id} is {job.status}"
    hint = f" ({error['hint']})" if error.get("hint") else ""
    return f"{job.id} {job.status}: {error['code']}: {error['message']}{hint}"


def sparkline(values: Sequence[float], width: int = BAR_WIDTH) -> str:
    """The course of finite numbers in characters of eight heights, each the mean of its share of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    borders = [round(part * len(finite) / count) for part in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(borders)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1))] for mean in means)


@contextmanager
def _reporter(console: Console) -> Iterator[Report]:
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda job, metrics: live.update(_view(job, metrics))


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0
        self._status = ""

    def __call__(self, job: Job, _metrics: Sequence[Metric]) -> None:
        progress = job.progress
        if progress["step"] < self._next and job.status == self._status:
            return
        self._next = progress["step"] // PLAIN_EVERY * PLAIN_EVERY + PLAIN_EVERY
        self._status = job.status
        line = f"step {progress['step']}/{progress['total_steps']} {state(job)}"
        self._console.print(line, markup=False, soft_wrap=True)


def _view(job: Job, metrics: Sequence[Metric]) -> Group:
    progress, peak = job.progress, job.measured_peak_bytes
    table = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=progress["total_steps"], completed=progress["step"], width=BAR_WIDTH)
    table.add_row("step", bar, f"{progress['step']}/{progress['total_steps']}")
    losses = [row["loss"] for row in metrics if row["loss"] is not None]
    if losses:
        table.add_row("loss", Text(sparkline(losses), style="cyan"), f"{losses[-1]:.3f}")
    if peak is not None:
        held = ProgressBar(total=job.memory_cap_bytes, completed=peak, width=BAR_WIDTH, finished_style="yellow")
        table.add_row("memory", held, f"{format_bytes(peak)} of {format_bytes(job.memory_cap_bytes)}")
    return Group(Text(f"{job.id}  {state(job)}"), table)

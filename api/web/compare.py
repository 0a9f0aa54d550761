"""Two jobs side by side: what they were asked for, what they held, how long they took, how they learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from api.dependencies import CallerDep, ContextDep
from api.responses import JobSummary
from api.web import job_form
from api.web.pages import NOTHING, page, plain, shown_bytes, shown_number, shown_seconds
from service import database, jobs
from service.status import TERMINAL, JobStatus

router = APIRouter(prefix="/ui", include_in_schema=False)

LISTED = 100
"""Newest jobs to choose from."""


@dataclass(frozen=True, slots=True)
class Row:
    """One thing, of both jobs."""

    label: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        return self.first != self.second


@dataclass(frozen=True, slots=True)
class Bar:
    """Bytes, and how long their bar is."""

    label: str
    kind: str
    size: str
    percent: float


@router.get("/compare")
def compare(
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    job: Annotated[list[str] | None, Query(max_length=2)] = None,
) -> Response:
    """Raises NotFoundError for a job that is not there."""
    asked = [each for each in job or [] if each]
    with database.reading(context.engine, caller.tenant) as session:
        chosen = [jobs.get(session, each) for each in asked]
        recent, _ = jobs.page(session, None, None, LISTED)
        answers = [JobSummary.of_row(each) for each in chosen]
        listed = {each.id: each.spec.get("name") for each in [*chosen, *recent]}
    values: dict[str, Any] = {"listed": listed, "chosen": asked, "answers": answers}
    if len(answers) == 2:
        first, second = answers
        values |= {
            "spec": _spec(*(each.spec for each in chosen)),
            "outcome": list(_outcome(first, second)),
            "bars": _bars(answers),
            "running": [each.id for each in answers if JobStatus(each.status) not in TERMINAL],
        }
    return page(request, "compare.html", **values)


def _spec(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Row]:
    """What was asked for, field by field, under the names of the form."""
    leaves = [dict(_leaves(each, "")) for each in (first, second)]
    order = {path: place for place, path in enumerate(job_form.LABELS)}
    paths = sorted({*leaves[0], *leaves[1]}, key=lambda path: (order.get(path, len(order)), path))
    return [Row(job_form.LABELS.get(path, path), *(_shown(path, each.get(path)) for each in leaves)) for path in paths]


def _leaves(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


def _shown(path: str, value: Any) -> str:
    if path == "memory_cap":
        return shown_bytes(value)
    if value in (None, {}):
        return NOTHING
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and path != "seed" else plain(value)


def _outcome(first: JobSummary, second: JobSummary) -> Iterator[Row]:
    def row(label: str, shown: Any) -> Row:
        return Row(label, shown(first), shown(second))

    yield row("State", lambda job: job.status)
    yield row("Steps done", lambda job: f"{job.progress.step:,} of {job.progress.total_steps:,}")
    yield row("Tokens", lambda job: shown_number(job.progress.tokens))
    yield row("Last loss", lambda job: shown_number(job.progress.loss, 5))
    yield row("Predicted time of a step", lambda job: shown_seconds(job.plan.predicted_step_seconds))
    yield row("Time of the last step", lambda job: shown_seconds(job.progress.step_seconds))
    yield row("From start to end", _duration)
    yield row("Chunk length", lambda job: f"{job.plan.chunk_length:,}")
    yield row("Chunks a sequence", lambda job: f"{job.plan.num_chunks:,}")
    yield row("Attention states", lambda job: job.plan.state_policy)
    yield row("Sequences at once", lambda job: f"{job.plan.micro_batch_size:,}")
    yield row("Cap held", _held)


def _duration(job: JobSummary) -> str:
    if job.started_at is None or job.finished_at is None:
        return NOTHING
    return shown_seconds((job.finished_at - job.started_at).total_seconds())


def _held(job: JobSummary) -> str:
    return NOTHING if job.certificate is None else "yes" if job.certificate.cap_held else "no"


def _bars(answers: list[JobSummary]) -> list[list[Bar]]:
    """Of each job; all on one scale."""
    sizes = [
        [
            ("Cap", "cap", job.memory_cap),
            ("Predicted peak", "predicted", job.predicted_peak_bytes),
            ("Measured peak", "measured", job.measured_peak_bytes),
            ("Without chunks", "whole", job.plan.unchunked_peak_bytes),
        ]
        for job in answers
    ]
    most = max(size or 0 for each in sizes for _, _, size in each)
    return [
        [Bar(label, kind, shown_bytes(size), round(100 * (size or 0) / most, 1)) for label, kind, size in each]
        for each in sizes
    ]

"""What the runs of the state machine stand on: the verbs as transactions of the service, and all rows, read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service import checkpoints, claims, jobs, runs
from service.errors import FencedError, JobStateConflictError
from tests.chaos.lifecycle_model import FENCED, FINAL, Answer, Job, Saved, World, loss_at
from tests.integration.seed import PLAN, metric
from tests.integration.stage import Stage

LEASE_SECONDS = 3_600.0

ROWS = text(
    """
    SELECT to_jsonb(j) - '{spec,train,model_config,plan}'::text[] AS row, md5(j::text) AS digest,
        ARRAY(SELECT e::text FROM job_events e WHERE e.job_id = j.id ORDER BY e.id) AS log,
        ARRAY(SELECT jsonb_build_array(e.type, e.attempt) FROM job_events e WHERE e.job_id = j.id
            ORDER BY e.id) AS events,
        ARRAY(SELECT jsonb_build_array(c.step, c.attempt, c.validation_loss) FROM checkpoints c WHERE c.job_id = j.id
            ORDER BY c.step) AS checkpoints,
        ARRAY(SELECT m.step FROM metrics m WHERE m.job_id = j.id ORDER BY m.step) AS steps,
        (SELECT md5(string_agg(m::text, ',' ORDER BY m.step)) FROM metrics m WHERE m.job_id = j.id) AS curve,
        ARRAY(SELECT o.id FROM models o WHERE o.job_id = j.id) AS models
    FROM jobs j ORDER BY j.id
    """
)
"""All jobs, with all that belongs to each."""


@dataclass(frozen=True, repr=False)
class Verb:
    """Something that one transaction does, and what must come of it."""

    name: str
    act: Callable[[Session], Answer]
    foresee: Callable[[World, str | None], tuple[World, Answer]]
    """With the id of a job that is locked by another transaction, which some verbs pass."""
    locks: str | None = None
    """The job whose row it locks."""
    writes: str | None = None
    """The job that it may change beyond what the model has."""

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def touched(self, answer: Answer) -> set[str]:
        return set() if self.writes is None or answer == FENCED else {self.writes}


def request(action: Any, job_id: str) -> Verb:
    def act(session: Session) -> Answer:
        try:
            jobs.request(session, job_id, action)
        except JobStateConflictError:
            return 409
        return 200

    return Verb(action, act, lambda world, _locked: world.request(action, job_id), locks=job_id)


def claim(device: str, *, impatient: bool = False) -> Verb:
    """Of whatever is next on the device."""

    def act(session: Session) -> Answer:
        patience = 0.0 if impatient else 600.0
        job = claims.next_job(session, device, "w", lease_seconds=LEASE_SECONDS, patience_seconds=patience)
        return None if job is None else (job.id, job.attempt)

    return Verb("claim", act, lambda world, locked: world.claim(impatient=impatient, passing=locked))


def sweep() -> Verb:
    def act(session: Session) -> Answer:
        return sorted(runs.requeue_expired(session))

    return Verb("sweep", act, lambda world, locked: world.sweep(passing=locked))


def work(verb: str, job_id: str, attempt: int, job: Job) -> Verb:
    """What the supervisor of this attempt does, which knows `job` as it is now."""

    def act(session: Session) -> Answer:
        try:
            return _worked(session, verb, job_id, attempt, job)
        except FencedError:
            return FENCED
        except ValueError as error:
            return type(error).__name__

    return Verb(verb, act, lambda world, _locked: world.work(verb, job_id, attempt), locks=job_id, writes=job_id)


def _worked(session: Session, verb: str, job_id: str, attempt: int, job: Job) -> Answer:
    """What a supervisor does; a job's status, or what it is told. Raises FencedError."""
    step, run = job.trained, (session, job_id, attempt)
    match verb:
        case "renew":
            return runs.renew(*run, LEASE_SECONDS).value
        case "metrics":
            runs.record_metrics(*run, [metric(step + 1), metric(step + 2)])
        case "evaluation":
            runs.record_evaluation(*run, step, 2.5)
        case "checkpoint" | "rated checkpoint":
            loss = loss_at(step) if verb == "rated checkpoint" else None
            checkpoints.register(*run, step, files=[], path=f"c/{step}", validation_loss=loss)
        case "succeed":
            runs.finish(*run, "succeeded")
        case "fail":
            runs.finish(*run, "failed", error={"code": "diverged", "message": "as told"})
        case "stop":
            runs.finish(*run, "cancelled" if job.desired == "cancel" else "paused")
        case "crash" | "crash after progress":
            runs.release(*run, "trainer_crashed", progressed=verb != "crash", error={"code": "c", "message": "m"})
        case "full disk":
            error = {"code": "disk_full", "message": "m"}
            runs.release(*run, "disk_full", progressed=False, error=error)
        case "replan":
            runs.release(*run, "memory_cap_exceeded", progressed=True, plan=PLAN)
    return jobs.get(session, job_id).status


@dataclass
class Ground:
    """What all runs of the machine share."""

    stage: Stage
    client: TestClient
    dataset: str
    connection: Connection
    """In autocommit, for looking."""
    pool: ThreadPoolExecutor

    def clear(self) -> None:
        for table in ("job_events", "metrics", "checkpoints", "models", "jobs", "tenant_usage"):
            self.connection.execute(text(f"DELETE FROM {table}"))
        # Announced now, as by a worker that lives: thousands of runs take longer than a device may be silent.
        afresh = "reserved_for = NULL, reserved_until = NULL, updated_at = clock_timestamp()"
        self.connection.execute(text(f"UPDATE devices SET {afresh}"))

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row.row["id"]: dict(row._mapping) for row in self.connection.execute(ROWS)}

    def waiting_for_a_lock(self) -> bool:
        return bool(self.connection.execute(text("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")).scalar())


def as_found(found: dict[str, Any], model: Job) -> Job:
    """The model's view of a row; what no column says is taken from the model."""
    row = found["row"]
    return Job(
        cap_bytes=row["memory_cap_bytes"],
        status=row["status"],
        desired=row["desired"],
        attempt=row["attempt"],
        failures=row["failures"],
        replans=row["memory_replans"],
        step=row["step"],
        blocked=row["blocked_since"] is not None,
        full=row["status"] == "paused" and row["error"] is not None,
        checkpoints=tuple(Saved(*saved) for saved in found["checkpoints"]),
        events=tuple(kind for kind, _ in found["events"]),
        expired=model.expired,
        trained=model.trained,
    )


def inconsistencies(found: dict[str, Any]) -> Iterator[str]:
    row, status = found["row"], found["row"]["status"]
    for column, states in {
        "lease_until": {"running"},
        "worker": {"running"},
        "finished_at": FINAL,
        "output_model_id": {"succeeded"},
    }.items():
        if (row[column] is not None) != (status in states):
            yield f"{status}, with {column} {row[column]}"
    if status != "paused" and (row["error"] is not None) != (status == "failed"):  # of a pause the model knows
        yield f"{status}, with error {row['error']}"
    if len(found["models"]) != (status == "succeeded"):
        yield f"{status}, with the models {found['models']}"
    wanted = {"paused": "pause", "queued": "run"}.get(status, row["desired"])
    if row["desired"] != wanted:
        yield f"{status}, though {row['desired']} is wanted"
    if [attempt for kind, attempt in found["events"] if kind == "started"] != list(range(1, row["attempt"] + 1)):
        yield f"the events do not have each of {row['attempt']} attempts start once"
    if any(step > row["step"] for step, _, _ in found["checkpoints"]):
        yield f"a checkpoint after its step {row['step']}"
    if not set(range(1, row["step"] + 1)) <= set(found["steps"]):
        yield f"a gap in its metrics: {found['steps']}"

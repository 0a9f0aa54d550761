"""What docs/reliability.md and docs/packing.md say of a job's life, written down a second time: no SQL, no clock.

A verb takes a world and gives the next one with the answer that the caller must get. Requests answer as HTTP does (200,
404, 409); what a supervisor that has lost its job is told is FENCED.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

Answer = object
FENCED = "fenced"
FINAL = frozenset({"succeeded", "failed", "cancelled"})
CRASHES, LOST_LEASES, KEPT_CHECKPOINTS = 3, 10, 2


@dataclass(frozen=True, slots=True)
class Saved:
    """A registered checkpoint."""

    step: int
    attempt: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class Job:
    """All that can be foreseen of a row of `jobs` and of what belongs to it."""

    cap_bytes: int
    status: str = "queued"
    desired: str = "run"
    attempt: int = 0
    failures: int = 0
    replans: int = 0
    step: int = 0
    blocked: bool = False
    """It was its turn, and it did not fit."""
    full: bool = False
    """It is paused because the disk is full, and says so."""
    checkpoints: tuple[Saved, ...] = ()
    events: tuple[str, ...] = ("queued", "planned")
    expired: bool = False
    """Its lease has run out; not in the row as such."""
    trained: int = 0
    """The step of its trainer; not in the row while it is the one that the trainer resumed from."""

    def then(self, event: str, **changes: object) -> Job:
        return replace(self, events=(*self.events, event), **changes)  # type: ignore[arg-type]  # as replace() has it

    def rest(self) -> str:
        """Where it goes when its trainer stops before the end."""
        return {"cancel": "cancelled", "pause": "paused"}.get(self.desired, "queued")

    def left(self, status: str, **changes: object) -> Job:
        """Out of `running`."""
        event = "requeued" if status == "queued" else status
        return self.then(event, status=status, expired=False, trained=0, **changes)

    def resumed(self) -> Job:
        return self.then("resumed", status="queued", desired="run", failures=0, full=False)

    def without_space(self) -> Job:
        if self.desired == "cancel":
            return self.left("cancelled")
        return self.left("paused", desired="pause", full=True)

    def given_back(self, failures: int, allowed: int | None) -> Job:
        status = self.rest()
        if status == "queued" and allowed is not None and failures >= allowed:
            status = "failed"
        return self.left(status, failures=failures)


@dataclass(frozen=True, slots=True)
class World:
    """Jobs by id, on one device, of one tenant."""

    device_bytes: int
    jobs: Mapping[str, Job] = field(default_factory=dict)
    reserved: str | None = None
    """For whom the device was kept free when it was last looked at."""

    def with_job(self, job_id: str, job: Job) -> World:
        return replace(self, jobs={**self.jobs, job_id: job})

    @property
    def free_bytes(self) -> int:
        return self.device_bytes - sum(job.cap_bytes for job in self.jobs.values() if job.status == "running")

    # The user

    def request(self, action: str, job_id: str) -> tuple[World, Answer]:
        job = self.jobs.get(job_id)
        if job is None:
            return self, 404
        after = _REQUESTED[action](job)
        return (self, 409) if after is None else (self.with_job(job_id, after), 200)

    def resume_under(self, job_id: str, cap_bytes: int) -> tuple[World, Answer]:
        job = self.jobs[job_id]
        if job.status != "paused":
            return self, 409
        resumed = replace(job, replans=0, cap_bytes=cap_bytes).resumed()
        return self.with_job(job_id, resumed.then("replanned")), 200

    # The device

    def claim(self, *, impatient: bool, passing: str | None = None) -> tuple[World, Answer]:
        """The oldest job that the device could hold when empty, if there is room for it now."""
        waiting = (key for key, job in self.jobs.items() if job.status == "queued" and key != passing)
        head = min((key for key in waiting if self.jobs[key].cap_bytes <= self.device_bytes), default=None)
        world = replace(self, reserved=None)
        if head is None:
            return world, None
        job = self.jobs[head]
        if job.cap_bytes <= self.free_bytes:
            began = job.checkpoints[-1].step if job.checkpoints else 0
            taken = job.then("started", status="running", attempt=job.attempt + 1, blocked=False, trained=began)
            return world.with_job(head, taken), (head, taken.attempt)
        if impatient and job.blocked:  # others have passed it for long enough
            world = replace(world, reserved=head)
        return world.with_job(head, replace(job, blocked=True)), None

    def sweep(self, *, passing: str | None = None) -> tuple[World, Answer]:
        """Take back the jobs whose lease has run out; answers which of them wait again."""
        world, requeued = self, []
        for job_id, job in self.jobs.items():
            if job.expired and job_id != passing:
                progressed = any(saved.attempt == job.attempt for saved in job.checkpoints)
                after = job.given_back(0 if progressed else job.failures + 1, LOST_LEASES)
                world = world.with_job(job_id, after)
                requeued += [job_id] if after.status == "queued" else []
        return world, sorted(requeued)

    # The supervisor of one attempt

    def held(self, job_id: str, attempt: int) -> Job | None:
        job = self.jobs[job_id]
        return job if (job.status, job.attempt) == ("running", attempt) else None

    def work(self, verb: str, job_id: str, attempt: int) -> tuple[World, Answer]:
        job = self.held(job_id, attempt)
        if job is None:
            return self, FENCED
        if verb == "succeed" and not job.checkpoints:
            return self, "ValueError"
        after = (_REPORTED | _ENDED)[verb](job)
        return self.with_job(job_id, after), job.desired if verb == "renew" else after.status


def loss_at(step: int) -> float:
    """Of a checkpoint's validation: up and down, so that the best one is not always the newest."""
    return 1.0 + step * 5 % 7


def _saved(job: Job, loss: float | None) -> tuple[Saved, ...]:
    """The newest ones and the best one, after one more at the trainer's step."""
    rows = [saved for saved in job.checkpoints if saved.step < job.trained]
    rows.append(Saved(job.trained, job.attempt, loss))
    rated = [(row.loss, row.step) for row in rows if row.loss is not None]
    best = min(rated)[1] if rated else None
    return tuple(saved for saved in rows if saved.step == best or saved in rows[-KEPT_CHECKPOINTS:])


def _cancel(job: Job) -> Job | None:
    if job.status in {"queued", "paused"}:
        return job.then("cancelled", status="cancelled", desired="cancel", blocked=False, full=False)
    if job.status == "running":
        return job if job.desired == "cancel" else job.then("cancel_requested", desired="cancel")
    return job if job.status == "cancelled" else None


def _pause(job: Job) -> Job | None:
    if job.status == "queued":
        return job.then("paused", status="paused", desired="pause", blocked=False)
    if job.status == "running" and job.desired == "run":
        return job.then("pause_requested", desired="pause")
    return job if job.status in {"paused", "running"} and job.desired == "pause" else None


def _resume(job: Job) -> Job | None:
    if job.status == "paused":
        return job.resumed()
    if job.status == "running" and job.desired == "pause":
        return job.then("resume_requested", desired="run")
    return job if job.status in {"queued", "running"} and job.desired == "run" else None


_REQUESTED = {"cancel": _cancel, "pause": _pause, "resume": _resume}
"""What a request makes of a job; None where it is refused."""


def _with_checkpoint(job: Job, loss: float | None) -> Job:
    return job.then("checkpoint", failures=0, checkpoints=_saved(job, loss))


_REPORTED: dict[str, Callable[[Job], Job]] = {
    "renew": lambda job: replace(job, expired=False),
    "metrics": lambda job: replace(job, step=job.trained + 2, trained=job.trained + 2),
    "evaluation": lambda job: job.then("evaluation"),
    "checkpoint": lambda job: _with_checkpoint(job, None),
    "rated checkpoint": lambda job: _with_checkpoint(job, loss_at(job.trained)),
}
_ENDED: dict[str, Callable[[Job], Job]] = {
    "succeed": lambda job: job.left("succeeded"),
    "fail": lambda job: job.left("failed"),
    "stop": lambda job: job.left(job.rest()),
    "crash": lambda job: job.given_back(job.failures + 1, CRASHES),
    "crash after progress": lambda job: job.given_back(0, CRASHES),
    "full disk": lambda job: job.without_space(),
    "replan": lambda job: replace(job.then("replanned"), replans=job.replans + 1).given_back(job.failures, None),
}
"""What a report of the run, or its end, makes of its job."""

REPORTS, ENDS = tuple(_REPORTED), tuple(_ENDED)

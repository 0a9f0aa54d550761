"""Errors of jobs: their state, their cap, what they leave."""

from __future__ import annotations

from service.errors.base import ServiceError


class JobStateConflictError(ServiceError):
    """The job's state does not allow the request."""

    status = 409
    code = "job_state_conflict"

    def __init__(self, job_id: str, action: str, state: str, desired: str) -> None:
        over = state in ("succeeded", "failed", "cancelled")
        state_text = state if over or desired == "run" else f"{state}, with {desired} requested"
        super().__init__(f"Cannot {action} a job that is {state_text}.", job=job_id, job_status=state)


class JobUnfinishedError(ServiceError):
    """Only a job that is over can be deleted."""

    status = 409
    code = "job_unfinished"

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(
            f"The job is {state}; only a job that has succeeded, failed or been cancelled can be deleted.",
            job=job_id,
            job_status=state,
            hint="cancel it (POST /jobs/{id}/cancel), and delete it when it is over",
        )


class IdempotencyKeyInFlightError(ServiceError):
    """A request with the same key is being worked on; what it will be answered is not known yet."""

    status = 409
    code = "idempotency_key_in_flight"
    param = "Idempotency-Key"
    retry_after_seconds = 1

    def __init__(self) -> None:
        super().__init__("A request with this Idempotency-Key is being worked on. Send the same again in a second.")


class IdempotencyKeyReusedError(ServiceError):
    """The key came with another request before."""

    status = 422
    code = "idempotency_key_reused"
    param = "Idempotency-Key"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key came with another request before. A new request needs a new key.")


class FencedError(ServiceError):
    """A run wrote about a job that it no longer holds: another attempt has begun, or the job is not running."""

    status = 409
    code = "fenced"

    def __init__(self, job_id: str, attempt: int) -> None:
        super().__init__(f"Attempt {attempt} no longer holds {job_id}.", job=job_id, attempt=attempt)


class MemoryCapExceedsDeviceError(ServiceError):
    """No device that has announced itself could hold a job with this cap, even alone."""

    status = 422
    code = "memory_cap_exceeds_device"
    param = "memory_cap"

    def __init__(self, memory_cap_bytes: int, largest_device_bytes: int) -> None:
        super().__init__(
            f"memory_cap is {memory_cap_bytes / 2**30:.2f} GiB; the largest device has "
            f"{largest_device_bytes / 2**30:.2f} GiB for jobs.",
            hint="ask for that or less; GET /devices says what there is",
            memory_cap_bytes=memory_cap_bytes,
            largest_device_bytes=largest_device_bytes,
        )


class TooManyJobsError(ServiceError):
    """The tenant has as many unfinished jobs as the key allows."""

    status = 429
    code = "too_many_jobs"

    def __init__(self, jobs: int, limit: int) -> None:
        super().__init__(
            f"{jobs} jobs are queued, running or paused; this key allows {limit}. Wait until one ends, or cancel one.",
            unfinished_jobs=jobs,
            max_jobs=limit,
        )


class CheckpointInUseError(ServiceError):
    """The checkpoint is its job's output, or what a job that is not over goes on from."""

    status = 409
    code = "checkpoint_in_use"

    def __init__(self, job_id: str, step: int, model: str | None = None) -> None:
        if model is None:
            what, hint = "what its job goes on from", "wait for a later checkpoint, or cancel the job"
        else:
            what, hint = f"the output of its job, {model}", "delete the model (DELETE /models/{id}): it goes with it"
        super().__init__(f"The checkpoint of step {step} is {what}.", job=job_id, step=step, model=model, hint=hint)


class CheckpointDamagedError(ServiceError):
    """A file is not what its row says; serving it would hand out broken weights."""

    status = 500
    code = "checkpoint_damaged"

    def __init__(self, name: str) -> None:
        super().__init__("The file on disk is not the one that was registered.", file=name)


class NoCheckpointError(ServiceError):
    """The job is over and has not left a checkpoint."""

    status = 409
    code = "no_checkpoint"

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(f"The job is {status} and has no checkpoint.", job=job_id, job_status=status)


class TooManyStreamsError(ServiceError):
    """The process, or the tenant at this process, has as many streams of events as it may."""

    status = 429
    code = "too_many_streams"
    retry_after_seconds = 5

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} streams of events are open, which is the most.", limit=limit)

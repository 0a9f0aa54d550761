"""What can go wrong between a program and the service, as exceptions that say what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from cli.client.jobs import Job

LOST = frozenset({0, 502, 503, 504})
"""No answer of the service's: none at all, or that of a proxy in front of it or a database behind it."""


class FieldProblem(TypedDict):
    """What is wrong with one field of a request."""

    field: str
    message: str


class ServiceError(RuntimeError):
    """The service refused a request or failed at it, or did not answer at all."""

    retry_after_seconds: float | None = None
    """When to ask again, where the service said so."""

    def __init__(self, message: str, *, status: int, code: str, problem: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        """Of HTTP; 0 where there was no answer."""
        self.code = code
        """Stable: what programs decide by."""
        self.problem = problem
        """The whole of what the service said (RFC 9457), if it was the service that said it."""

    @property
    def suggestions(self) -> list[str]:
        """What would help, in words."""
        found: list[str] = (self.problem or {}).get("suggestions", [])
        return found


class UnavailableError(ServiceError):
    """No answer (status 0), or 502, 503, 504: it may work later. Whether the request was heard is not known."""

    sent = True
    """False where the request did not leave: sending it again does nothing twice."""


class AuthenticationError(ServiceError):
    """401: no API key, or a wrong one."""


class PermissionDeniedError(ServiceError):
    """403: the key may not do this."""


class NotFoundError(ServiceError):
    """404: there is no such thing, or it is another tenant's."""


class ConflictError(ServiceError):
    """409: not in this state, or not yet; `retry_after_seconds` says when to ask again."""


class InvalidRequestError(ServiceError):
    """422: what was asked for cannot be, whatever the state."""

    @property
    def errors(self) -> list[FieldProblem]:
        """The fields that are wrong, each with the reason."""
        found: list[FieldProblem] = (self.problem or {}).get("errors", [])
        return found


class MemoryCapInfeasibleError(InvalidRequestError):
    """No schedule fits the cap; `suggestions` says what would."""

    @property
    def minimum_cap_bytes(self) -> int | None:
        """The smallest cap that works for this request; None if none does."""
        return (self.problem or {}).get("minimum_cap_bytes")

    @property
    def max_sequence_length(self) -> int | None:
        """The longest sequence that this cap can train, other things equal; None if there is none."""
        return (self.problem or {}).get("max_sequence_length")


class MemoryCapExceedsDeviceError(InvalidRequestError):
    """The cap is above what the largest device of the workers has."""

    @property
    def largest_device_bytes(self) -> int | None:
        return (self.problem or {}).get("largest_device_bytes")


class RateLimitedError(ServiceError):
    """429: too much at once, or too many; `retry_after_seconds` where waiting helps."""


class DamagedDownloadError(RuntimeError):
    """What arrived is not what the service registered; nothing was kept."""


class PreparationFailedError(RuntimeError):
    """An upload, a tokenizer or the tokens of a dataset could not be made ready."""

    def __init__(self, what: str, error: dict[str, Any] | None) -> None:
        found = error or {}
        super().__init__(f"{what} failed: {found.get('code')}: {found.get('message')}")
        self.code: str | None = found.get("code")
        self.hint: str | None = found.get("hint")


class WaitTimeoutError(TimeoutError):
    """What was waited for has not come in the given time; it goes on all the same."""


class JobStoppedError(RuntimeError):
    """A job that was waited for came to rest without success; `job` is how it stands."""

    def __init__(self, job: Job) -> None:
        error = job.error
        hint = f" ({error['hint']})" if error and error.get("hint") else ""
        reason = f": {error['code']}: {error['message']}{hint}" if error else ""
        super().__init__(f"{job.id} {job.status}{reason}")
        self.job = job
        self.code = None if error is None else error["code"]
        self.hint = None if error is None else error.get("hint")


class JobFailedError(JobStoppedError):
    """It failed; `code` and `hint` are those of the job's error."""


class JobCancelledError(JobStoppedError):
    """Somebody cancelled it."""


class JobPausedError(JobStoppedError):
    """It is paused, by somebody or for want of disk (`code`), and goes on with `job.resume()`."""


BY_STATUS: dict[int, type[ServiceError]] = {
    0: UnavailableError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    422: InvalidRequestError,
    429: RateLimitedError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}
BY_CODE: dict[str, type[ServiceError]] = {
    "memory_cap_infeasible": MemoryCapInfeasibleError,
    "memory_cap_exceeds_device": MemoryCapExceedsDeviceError,
}


def error_of(message: str, status: int, code: str, problem: dict[str, Any] | None = None) -> ServiceError:
    """The exception for what the service said."""
    kind = BY_CODE.get(code) or BY_STATUS.get(status, ServiceError)
    return kind(message, status=status, code=code, problem=problem)

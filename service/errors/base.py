"""What all errors have in common, and the one that all kinds of things share."""

from __future__ import annotations

from typing import Any, ClassVar


class ServiceError(Exception):
    """Base of all errors that callers of `service` should expect."""

    status: ClassVar[int] = 500
    code: str = "internal_error"
    retry_after_seconds: int | None = None
    """When the same request may be answered otherwise; None where time changes nothing."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields


MAX_PROBLEMS = 20
"""Of a file or model that an answer lists."""


def shown(text: str) -> str:
    """At most 80 characters of a client's text, safe to print and to encode."""
    return text[:80].encode("ascii", "backslashreplace").decode("ascii")


MAX_REASON = 200
"""Characters of a reason that somebody else's program gives: it may repeat what a client sent."""


def bounded(text: str) -> str:
    """At most `MAX_REASON` characters of it."""
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."


class NotFoundError(ServiceError):
    """There is no such resource: `kind` is `job`, `dataset`, `tokenizer`, `model`, `checkpoint`, `file`, `webhook`,
    `upload`, `part` or `key`."""

    status = 404

    def __init__(self, kind: str, identifier: str, hint: str | None = None) -> None:
        more = {} if hint is None else {"hint": hint}
        super().__init__(f"There is no {kind} {shown(identifier)!r}.", resource=kind, **more)
        self.code = f"{kind}_not_found"

"""The log of every process of the service: lines on stderr, as text for people or as JSON, each with what it is about.

    with logs.bound(job_id=job.id, attempt=job.attempt):
        logger.info("started")          # the line has both, and so has every line of whatever is called here

The context is that of `contextvars`: it follows a request into the thread pool of its route. A thread that is started
by hand has none, unless it runs in a copy (`contextvars.copy_context().run`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from service.jsonable import clean_json
from service.settings import LogFormat

_PASSWORD = re.compile(r"(://[^\s/:@]*:)\S+@")
"""In a URL, up to the last @, as libraries read it. Nothing of ours logs one; exceptions of libraries may."""
_DETAIL = re.compile(r"\n(DETAIL|CONTEXT): .*")
"""What PostgreSQL says of a statement that failed: values of rows."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Ends a line, moves the cursor or turns the writing round."""

_context: ContextVar[Mapping[str, Any]] = ContextVar("log_context")


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Within the block every line has these fields: `job_id`, `attempt`, `request_id`."""
    token = _context.set({**_context.get({}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def configure(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Write the log of this process to stderr, instead of what was configured before, uvicorn's loggers included."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(capture=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # the API has a line of its own for each request


class _Formatter(logging.Formatter):
    def time(self, record: logging.LogRecord) -> str:
        """RFC 3339, UTC."""
        moment = datetime.fromtimestamp(record.created, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def trace(self, record: logging.LogRecord) -> str | None:
        """The exception's text, or the stack."""
        if record.exc_info and record.exc_info[0] is not None:
            return self.formatException(record.exc_info)
        return record.stack_info


class JsonFormatter(_Formatter):
    """One object a line: `time`, `level`, `logger`, `message`, what the line is about, the `fields` that its call gave
    as `extra`, and `exception`. ASCII.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_context.get({}),
            **getattr(record, "fields", {}),
        }
        if (trace := self.trace(record)) is not None:
            line["exception"] = trace
        line = {name: _without_secrets(value) if isinstance(value, str) else value for name, value in line.items()}
        return json.dumps(clean_json(line), default=str)


class TextFormatter(_Formatter):
    """Time, level, logger, message, and in brackets what the line is about; a trace follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        about = " ".join(f"{name}={value}" for name, value in _context.get({}).items())
        about = f" [{about}]" if about else ""
        line = f"{self.time(record)} {record.levelname} {record.name}: {record.getMessage()}{about}"
        trace = _without_secrets(self.trace(record) or "").split("\n") if record.exc_info or record.stack_info else []
        # What somebody else wrote, a path or a file's name, must not look like a line of ours.
        return "\n".join([_escaped(_without_secrets(line)), *(f"  {_escaped(text)}" for text in trace)])


def _without_secrets(text: str) -> str:
    return _DETAIL.sub("", _PASSWORD.sub(r"\1***@", text))


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)

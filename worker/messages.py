"""What a trainer reports: one JSON object a line, parsed into one class a kind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.failures import HINTS

_FILE_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,127}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Of a checkpoint's folder, or of one folder in it."""
_MAX_COUNTS = 32
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ProtocolError(Exception):
    """A line that is not a message: the trainer is broken, or something else writes into its pipe."""


@dataclass(frozen=True, slots=True)
class Started:
    """Model and data are loaded; training goes on from `step`."""

    step: int


@dataclass(frozen=True, slots=True)
class Data:
    """What becomes of the documents in an epoch, by the names of slim_core's DataReport: how many are cut, left out and
    padded."""

    training: dict[str, int]
    validation: dict[str, int] | None


@dataclass(frozen=True, slots=True)
class Device:
    """Where the trainer computes, and so whose memory its cap bounds: `cpu` or `cuda`."""

    name: str


@dataclass(frozen=True, slots=True)
class Probed:
    """The peak of the planned step's first micro-batch, before anything was trained."""

    peak_bytes: int


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """The plan's gradient beside that of another chunk length."""

    chunk_length: int
    compared_with: int
    relative_error: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Metric:
    """One optimiser step; a number that was not finite is None."""

    step: int
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    step_seconds: float
    tokens: int
    peak_bytes: int

    def row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Matching:
    """Updates of the phase before the first step, `step` of `of` of them done."""

    step: int
    of: int
    relative_error: float
    """Of attention's outputs, squared, mean over the updates since the last message."""
    step_seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A validation loss after `step`, 0 for the weights that training starts from."""

    step: int
    loss: float
    seconds: float | None = None
    """That it took."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that is complete, hashed and on disk, and not yet known to the database."""

    step: int
    name: str
    files: list[dict[str, Any]]
    validation_loss: float | None
    seconds: float | None = None
    """That it took to write."""


@dataclass(frozen=True, slots=True)
class Done:
    """The end: `reason` is completed, early_stopping, or stopped (by SIGTERM)."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Failure:
    """The trainer gave up and knows why."""

    code: str
    message: str
    step: int | None
    peak_bytes: int | None


Message = (
    Device | Data | Started | Probed | Matching | Metric | Evaluation | Checkpoint | GradientCheck | Done | Failure
)


def parse(line: bytes) -> Message:
    """One line as a message. Raises ProtocolError, naming what is wrong, for anything else."""
    try:
        fields = json.loads(line, parse_constant=lambda _constant: None)
        return _PARSERS[fields["type"]](fields)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProtocolError(f"{type(error).__name__}: {error} in {line[:200]!r}") from error


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"not a count: {value!r}")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"not a finite number: {value!r}")
    return float(value)


def _optional_number(value: Any) -> float | None:
    return None if value is None else _number(value)


def _optional_integer(value: Any) -> int | None:
    return None if value is None else _integer(value)


def _counts(value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not 0 < len(value) <= _MAX_COUNTS:
        raise ValueError(f"not counts: {value!r}")
    return {str(name): _integer(count) for name, count in value.items()}


def _data(fields: dict[str, Any]) -> Data:
    validation = fields.get("validation")
    return Data(_counts(fields["training"]), None if validation is None else _counts(validation))


def _matching(fields: dict[str, Any]) -> Matching:
    return Matching(
        step=_integer(fields["step"]),
        of=_integer(fields["of"]),
        relative_error=_number(fields["relative_error"]),
        step_seconds=_number(fields["step_seconds"]),
        peak_bytes=_integer(fields["peak_bytes"]),
    )


def _metric(fields: dict[str, Any]) -> Metric:
    return Metric(
        step=_integer(fields["step"]),
        loss=_optional_number(fields["loss"]),
        learning_rate=_number(fields["learning_rate"]),
        grad_norm=_optional_number(fields.get("grad_norm")),
        step_seconds=_number(fields["step_seconds"]),
        tokens=_integer(fields["tokens"]),
        peak_bytes=_integer(fields["peak_bytes"]),
    )


def _checkpoint(fields: dict[str, Any]) -> Checkpoint:
    step = _integer(fields["step"])
    # The name becomes a path that is later deleted: only the one form that a step can have is taken.
    if fields["name"] != f"step-{step:08d}":
        raise ValueError(f"not the folder of step {step}: {fields['name']!r}")
    files = [_file(entry) for entry in fields["files"]]
    if not files:
        raise ValueError("a checkpoint without files")
    loss, seconds = _optional_number(fields.get("validation_loss")), _optional_number(fields.get("seconds"))
    return Checkpoint(step, fields["name"], files, loss, seconds)


def _file(entry: dict[str, Any]) -> dict[str, Any]:
    if not _FILE_NAME.fullmatch(entry["name"]) or not _SHA256.fullmatch(entry["sha256"]):
        raise ValueError(f"not a file entry: {entry!r}")
    return {"name": entry["name"], "bytes": _integer(entry["bytes"]), "sha256": entry["sha256"]}


def _failure(fields: dict[str, Any]) -> Failure:
    if fields["code"] not in HINTS:
        raise ValueError(f"not a code: {fields['code']!r}")
    return Failure(
        code=fields["code"],
        message=str(fields["message"])[:2000],
        step=_optional_integer(fields.get("step")),
        peak_bytes=_optional_integer(fields.get("peak_bytes")),
    )


_PARSERS: dict[str, Callable[[dict[str, Any]], Message]] = {
    "device": lambda fields: Device(str(fields["name"])),
    "data": _data,
    "started": lambda fields: Started(_integer(fields["step"])),
    "probed": lambda fields: Probed(_integer(fields["peak_bytes"])),
    "gradient_check": lambda fields: GradientCheck(
        chunk_length=_integer(fields["chunk_length"]),
        compared_with=_integer(fields["compared_with"]),
        relative_error=_number(fields["relative_error"]),
        peak_bytes=_integer(fields["peak_bytes"]),
    ),
    "matching": _matching,
    "metric": _metric,
    "evaluation": lambda fields: Evaluation(
        _integer(fields["step"]), _number(fields["loss"]), _optional_number(fields.get("seconds"))
    ),
    "checkpoint": _checkpoint,
    "done": lambda fields: Done(_integer(fields["step"]), str(fields["reason"])),
    "error": _failure,
}

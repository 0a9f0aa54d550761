"""The trainer's messages: what is taken, and that nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker.environment import trainer_environment
from worker.messages import (
    Checkpoint,
    Data,
    Done,
    Evaluation,
    Failure,
    GradientCheck,
    Matching,
    Metric,
    Probed,
    ProtocolError,
    Started,
    parse,
)

METRIC = {
    "type": "metric", "step": 3, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": 1, "step_seconds": 0.1, "tokens": 192,
    "peak_bytes": 1_000,
}  # fmt: skip
MATCHING = {"type": "matching", "step": 4, "of": 20, "relative_error": 0.3, "step_seconds": 0.1, "peak_bytes": 5}
FILE = {"name": "model.safetensors", "bytes": 4, "sha256": "0" * 64}
FAILURE = {"type": "error", "code": "diverged", "message": "m", "step": 2, "peak_bytes": None}
CHECKPOINT = {"type": "checkpoint", "step": 40, "name": "step-00000040", "files": [FILE], "validation_loss": None}


def line(message: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps(message | changes).encode()


def test_every_kind_is_read() -> None:
    assert parse(b'{"type": "started", "step": 0}') == Started(0)
    assert parse(line(MATCHING)) == Matching(4, 20, 0.3, 0.1, 5)
    assert parse(line(METRIC)) == Metric(3, 2.5, 1e-3, 1.0, 0.1, 192, 1_000)
    assert parse(b'{"type": "evaluation", "step": 3, "loss": 2}') == Evaluation(3, 2.0)
    assert parse(line(CHECKPOINT)) == Checkpoint(40, "step-00000040", [FILE], None)
    assert parse(b'{"type": "data", "training": {"windows": 3}, "validation": null}') == Data({"windows": 3}, None)
    assert parse(b'{"type": "probed", "peak_bytes": 7}') == Probed(7)
    checked = (
        b'{"type": "gradient_check", "chunk_length": 16, "compared_with": 64, "relative_error": 1e-7, "peak_bytes": 9}'
    )
    assert parse(checked) == GradientCheck(16, 64, 1e-7, 9)
    assert parse(b'{"type": "done", "step": 9, "reason": "completed"}') == Done(9, "completed")
    assert parse(line(FAILURE)) == Failure("diverged", "m", 2, None)


def test_a_loss_that_is_not_finite_is_none() -> None:
    metric = parse(line(METRIC, loss=float("nan"), grad_norm=float("inf")))
    assert isinstance(metric, Metric)
    assert (metric.loss, metric.grad_norm) == (None, None)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"type": "unheard of"}',
        b'{"type": ["metric"]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"type": "data", "training": {}, "validation": null}',
        b'{"type": "data", "training": {"windows": -1}, "validation": null}',
        b'{"type": "data", "training": {"windows": 1}, "validation": 7}',
        line(MATCHING, relative_error=None),
        line(METRIC, step=-1),
        line(METRIC, step=2**63),
        line(METRIC, step=True),
        line(METRIC, tokens="1"),
        line(METRIC, step_seconds=None),
        line(CHECKPOINT, name="../../etc"),
        line(CHECKPOINT, name="step-00000041"),
        line(CHECKPOINT, files=[]),
        line(CHECKPOINT, files=[FILE | {"name": "../model.safetensors"}]),
        line(CHECKPOINT, files=[FILE | {"name": "/etc/passwd"}]),
        line(CHECKPOINT, files=[FILE | {"name": "adapter/../model.safetensors"}]),
        line(CHECKPOINT, files=[FILE | {"name": "a/b/model.safetensors"}]),
        line(CHECKPOINT, files=[FILE | {"sha256": "short"}]),
        line(FAILURE, code="unheard_of"),
        line(FAILURE, code=["diverged"]),
        line(FAILURE, step="2"),
    ],
)
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(text)


def test_the_environment_is_an_allow_list() -> None:
    inherited = {"PATH": "/bin", "DATABASE_URL": "secret", "SLIMTUNE_ANYTHING": "secret", "HOME": "/root"}
    environment = trainer_environment(3, inherited)
    assert environment["PATH"] == "/bin"
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert not {"DATABASE_URL", "SLIMTUNE_ANYTHING", "HOME"} & environment.keys()

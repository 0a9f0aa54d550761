"""The trainer: a process of its own that trains one attempt of one job under its cap and reports on a pipe.

    python -m worker.trainer        started by the supervisor; not meant for a shell

One JSON object on stdin says what to do (`worker.attempt` writes it); stdin then stays open, and its end means that the
supervisor is gone: the trainer dies. Reports are JSON lines on the descriptor that SLIMTUNE_REPORT_FD names. SIGTERM
asks for a checkpoint and an orderly end. It has no database and no secrets.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from slim_core.calibrate import warm_up
from slim_core.config import ModelConfig, TrainConfig
from slim_core.data.dataset import BROKEN_DATASET, DatasetError, Windows, token_file, token_path
from slim_core.memory import READING_EXCESS_BYTES, MemoryMeter, is_out_of_memory, make_meter, pick_device
from slim_core.model import LanguageModel
from slim_core.planning import Plan
from slim_core.train import Checkpoint, DivergedError, Done, Evaluation, StepMetrics, TrainingRun
from slim_core.weights.checkpoint import CheckpointError, load_weights

EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, EXIT_MEMORY = 0, 1, 3, 4

_PR_SET_PDEATHSIG = 1
_MESSAGE_TYPES = {StepMetrics: "metric", Evaluation: "evaluation", Checkpoint: "checkpoint", Done: "done"}


class MemoryCapExceededError(MemoryError):
    """The process holds more than its cap, though no allocation failed."""


class Reporter:
    """Writes messages to the supervisor's pipe."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")

    def send(self, message_type: str, **fields: Any) -> None:
        """One message. A number that is not finite is written as Python does; the supervisor makes it null."""
        self._pipe.write(json.dumps({"type": message_type, **fields}) + "\n")


class Stop:
    """Whether SIGTERM has arrived."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.requested = True

    def __call__(self) -> bool:
        return self.requested


def main() -> int:
    """Train as stdin says; the exit status is part of the contract with the supervisor."""
    stop = Stop()
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call above
        return EXIT_ERROR
    spec = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_at_end_of_stdin, daemon=True).start()
    reporter = Reporter(int(os.environ["SLIMTUNE_REPORT_FD"]))
    torch.set_num_threads(spec["threads"])
    device = pick_device()
    warm_up(device)
    meter = make_meter(device)
    run: TrainingRun | None = None
    try:
        _tokenise([spec["dataset_path"], spec["validation_path"]])
        meter.enforce_cap(spec["memory_cap_bytes"])
        run = _load(spec, device, meter, stop)
        reporter.send("started", step=run.step)
        return _train(run, reporter, meter, spec)
    except Exception as error:  # noqa: BLE001  # whatever it is, the supervisor must hear of it
        traceback.print_exc()
        step = run.step if run is not None else None
        reporter.send("error", step=step, peak_bytes=meter.peak_bytes(), **_explain(error))
        return EXIT_MEMORY if is_out_of_memory(error) else EXIT_ERROR


def _tokenise(paths: list[str | None]) -> None:
    """Make the token files that are not there yet, in a process of its own: a document is parsed whole, however long it
    is, and what that takes must not count against the cap or stay in this process's heap. Raises DatasetError.
    """
    missing = [path for path in paths if path is not None and not token_path(Path(path)).exists()]
    if not missing:
        return
    command = [sys.executable, "-m", "slim_core.data.dataset", *missing]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode == BROKEN_DATASET:
        raise DatasetError(result.stderr.splitlines()[-1])
    if result.returncode:
        raise RuntimeError(f"tokenising ended with status {result.returncode}: {result.stderr[-500:]}")


def _load(spec: dict[str, Any], device: torch.device, meter: MemoryMeter, stop: Stop) -> TrainingRun:
    config = TrainConfig.from_json(spec["train"])
    data = Windows(token_file(Path(spec["dataset_path"])), config.sequence_length, config.seed)
    validation = None
    if spec["validation_path"] is not None:
        validation = Windows(token_file(Path(spec["validation_path"])), config.sequence_length, config.seed)
    model = LanguageModel(ModelConfig.from_json(spec["model"]))
    if spec["initial_weights"] is None:
        model.initialize(config.seed)
    else:
        load_weights(model, Path(spec["initial_weights"]))
    model.to(device)
    checkpoints_dir = Path(spec["checkpoints_dir"])
    run = TrainingRun(model, config, Plan.from_json(spec["plan"]), data, validation, checkpoints_dir, meter, stop)
    if spec["resume_from"] is not None:
        run.resume(Path(spec["resume_from"]))
    return run


def _train(run: TrainingRun, reporter: Reporter, meter: MemoryMeter, spec: dict[str, Any]) -> int:
    cap_bytes: int = spec["memory_cap_bytes"]

    def check_cap() -> None:
        # The limit counts reserved memory; what a library had reserved before may be touched later.
        if (peak := meter.peak_bytes()) > cap_bytes + READING_EXCESS_BYTES:
            raise MemoryCapExceededError(f"{peak} bytes held, {cap_bytes} allowed")

    peak = run.probe()
    check_cap()
    reporter.send("probed", peak_bytes=peak)
    reason = ""
    for report in run.reports():
        check_cap()
        reporter.send(_MESSAGE_TYPES[type(report)], **dataclasses.asdict(report))
        if isinstance(report, Done):
            reason = report.reason
    if reason != "stopped":
        _check_gradient(run, reporter, meter, Plan.from_json(spec["plan"]))
    return EXIT_STOPPED if reason == "stopped" else EXIT_DONE


def _check_gradient(run: TrainingRun, reporter: Reporter, meter: MemoryMeter, plan: Plan) -> None:
    """For the certificate. The job is done and has said so: nothing that goes wrong here may fail it."""
    if plan.check_chunk_length is None:
        return
    try:
        check = run.check_gradient(plan.check_chunk_length)
        peak = meter.peak_bytes()
    except Exception:  # noqa: BLE001  # refused memory, a stop: the certificate then says that there was no check
        traceback.print_exc()
    else:
        reporter.send("gradient_check", **dataclasses.asdict(check), peak_bytes=peak)


def _explain(error: Exception) -> dict[str, str]:
    """Code, message and hint of a failure, for the user."""
    text = f"{type(error).__name__}: {error}"[:500]
    if is_out_of_memory(error):
        code, hint = "memory_cap_exceeded", "raise memory_cap, or let the planner choose a shorter chunk"
    elif isinstance(error, DivergedError):
        code, hint = "diverged", "lower the learning rate, lengthen the warm-up or set gradient_clip"
    elif isinstance(error, DatasetError):
        code, hint = "dataset_invalid", "mend the dataset and upload it again"
    elif isinstance(error, CheckpointError):
        code, hint = "model_invalid", "start from another model"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        code, hint = "disk_full", "free space in the data directory; the job resumes from its last checkpoint"
    else:
        code, hint = "trainer_error", "see the job's events for the end of the trainer's log"
    return {"code": code, "message": text, "hint": hint}


def _die_at_end_of_stdin() -> None:
    # The raw descriptor: a buffered read would hold a lock that the interpreter's end wants.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

"""The trainer: a process of its own (worker/start.py) that trains one attempt of one job under its cap and reports on
a pipe. SIGTERM asks for a checkpoint and an orderly end. It has no database and no secrets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from slim_core.calibrate import warm_up
from slim_core.config import ModelConfig, TrainConfig
from slim_core.data.dataset import Windows
from slim_core.data.stream import Part
from slim_core.data.tokenizer import tokenizer_key
from slim_core.data.tokens import NO_SPACE_ERRORS, DatasetError, token_folder
from slim_core.memory import MemoryMeter, is_out_of_memory, make_meter, pick_device
from slim_core.model import LanguageModel
from slim_core.origin import Names, Origin
from slim_core.planning import Plan
from slim_core.train import Checkpoint, DivergedError, Done, Evaluation, Matching, StepMetrics, TrainingRun
from slim_core.weights.checkpoint import CheckpointError, load_weights
from slim_core.weights.folder import ModelFolderError
from slim_core.weights.source import ModelSource
from worker.memory_watch import READING_EXCESS_BYTES
from worker.report import EXIT_DONE, EXIT_ERROR, EXIT_MEMORY, EXIT_STOPPED, Reporter

_MESSAGE_TYPES = {
    Matching: "matching",
    StepMetrics: "metric",
    Evaluation: "evaluation",
    Checkpoint: "checkpoint",
    Done: "done",
}


class MemoryCapExceededError(MemoryError):
    """The process holds more than its cap, though no allocation failed."""


class Stop:
    """Whether SIGTERM has arrived."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.requested = True

    def __call__(self) -> bool:
        return self.requested


def main(spec: dict[str, Any], reporter: Reporter) -> int:
    """Train as `spec` says (`worker.attempt` writes it); returns the exit status."""
    stop = Stop()
    torch.set_num_threads(spec["threads"])
    device = pick_device()
    reporter.send("device", name=device.type)
    warm_up(device)
    meter = make_meter(device)
    run: TrainingRun | None = None
    try:
        meter.enforce_cap(spec["memory_cap_bytes"])
        run = _load(spec, device, meter, stop, reporter)
        reporter.send("started", step=run.step)
        return _train(run, reporter, meter, spec)
    except Exception as error:  # noqa: BLE001  # whatever it is, the supervisor must hear of it
        step = run.step if run is not None else None
        reporter.send("error", step=step, peak_bytes=meter.peak_bytes(), **_explain(error))
        _log(error)
        return EXIT_MEMORY if is_out_of_memory(error) else EXIT_ERROR


def _load(
    spec: dict[str, Any], device: torch.device, meter: MemoryMeter, stop: Stop, reporter: Reporter
) -> TrainingRun:
    config = TrainConfig.from_json(spec["train"])
    data, validation = _data(spec, config)
    reports = [None if windows is None else dataclasses.asdict(windows.report()) for windows in (data, validation)]
    reporter.send("data", training=reports[0], validation=reports[1])
    model = LanguageModel(ModelConfig.from_json(spec["model"]))
    if spec["initial_weights"] is None:
        model.initialize(config.seed)
    else:
        load_weights(model, Path(spec["initial_weights"]))
    model.to(device)
    checkpoints_dir = Path(spec["checkpoints_dir"])
    plan = Plan.from_json(spec["plan"])
    run = TrainingRun(model, config, plan, data, validation, checkpoints_dir, meter, stop, _origin(spec))
    if spec["resume_from"] is not None:
        run.resume(Path(spec["resume_from"]))
    meter.forget_files()  # what the data report has read of the tokens may be gigabytes
    return run


def _origin(spec: dict[str, Any]) -> Origin:
    """What checkpoints take along: the base model's files, or those of the tokenizer alone, and names for the card."""
    folder = spec["initial_weights"] or spec.get("tokenizer")
    names = spec.get("names")
    return Origin(None if folder is None else ModelSource.of(Path(folder)), None if names is None else Names(**names))


def _data(spec: dict[str, Any], config: TrainConfig) -> tuple[Windows, Windows | None]:
    """What to train on and what to measure it with: a dataset of its own, a share of the documents, or nothing."""
    key = tokenizer_key(Path(spec["tokenizer"]) if spec.get("tokenizer") else None)

    def windows(path: str, part: Part | None = None) -> Windows:
        folder = token_folder(Path(path), key)
        return Windows(folder, config.sequence_length, config.seed, config.packing, part)

    if fraction := spec.get("validation_fraction"):
        training, validation = (Part(name, fraction, config.seed) for name in ("training", "validation"))
        return windows(spec["dataset_path"], training), windows(spec["dataset_path"], validation)
    validation_path = spec["validation_path"]
    return windows(spec["dataset_path"]), None if validation_path is None else windows(validation_path)


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
    began = time.perf_counter()
    for report in run.reports():
        seconds = time.perf_counter() - began  # that what is reported took: a checkpoint, an evaluation, ...
        check_cap()
        reporter.send(_MESSAGE_TYPES[type(report)], **dataclasses.asdict(report), seconds=seconds)
        if isinstance(report, Done):
            reason = report.reason
        began = time.perf_counter()
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
    except Exception as error:  # noqa: BLE001  # refused memory, a stop: the certificate says that there was no check
        _log(error)
    else:
        reporter.send("gradient_check", **dataclasses.asdict(check), peak_bytes=peak)


def _log(error: Exception) -> None:
    with contextlib.suppress(OSError):  # the disk of the log may be the one that is full
        traceback.print_exception(error)


def _explain(error: Exception) -> dict[str, str]:
    """Code and message of a failure, for the user."""
    if is_out_of_memory(error):
        code = "memory_cap_exceeded"
    elif isinstance(error, DivergedError):
        code = "diverged"
    elif isinstance(error, DatasetError):
        code = "dataset_invalid"
    elif isinstance(error, CheckpointError | ModelFolderError):
        code = "model_invalid"
    elif isinstance(error, OSError) and error.errno in NO_SPACE_ERRORS:
        code = "disk_full"
    else:
        code = "trainer_error"
    return {"code": code, "message": f"{type(error).__name__}: {error}"[:500]}

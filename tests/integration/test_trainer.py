"""The real trainer process over its real pipes: reports, stops, dies, fails and resumes as the supervisor relies on."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from slim_core.config import ModelConfig, OptimizerConfig, TrainConfig
from slim_core.data.prepare import make_tokens
from slim_core.planning import Plan
from slim_core.weights.checkpoint import verify_checkpoint
from tests.unit.core_support import a_plan, names, write_text
from worker.environment import trainer_environment
from worker.memory_watch import MemoryWatch
from worker.messages import (
    Checkpoint,
    Data,
    Device,
    Done,
    Evaluation,
    Failure,
    GradientCheck,
    Message,
    Metric,
    Probed,
    Started,
    parse,
)
from worker.process import TrainerProcess, tail
from worker.start import NICENESS

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(num_layers=2, model_width=32, num_heads=2, mlp_width=64)
TRAIN = TrainConfig(
    sequence_length=256, batch_size=2, steps=6, evaluate_every=3, optimizer=OptimizerConfig(learning_rate=3e-3)
)
PLAN = replace(a_plan(100, "reverse", micro_batch=1), check_chunk_length=256)
ENDLESS = replace(TRAIN, steps=1_000_000, evaluate_every=None)
CAP_BYTES = 2 << 30
VALIDATION = ["assert", "assignment", "import"]
COMMAND = [sys.executable, "-m", "worker.start"]


class Trainer:
    """A started `python -m worker.start` and everything it has said."""

    def __init__(self, command: list[str], spec: dict[str, Any], log: Path) -> None:
        environment = trainer_environment(threads=1) | {"PYTHONPATH": str(ROOT)}
        self.process = TrainerProcess(command, spec, environment, log)
        self.messages: list[Message] = []
        self.log = log

    def read_until(self, enough: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not enough():
            over = time.monotonic() > deadline or self.process.drained
            assert not over, f"{self.messages}\n{tail(self.log)}"
            self.messages += [parse(line) for line in self.process.read_lines(0.05)]

    def until_step(self, step: int) -> None:
        self.read_until(lambda: any(isinstance(m, Metric) and m.step >= step for m in self.messages))

    def finish(self, seconds: float = 60) -> int:
        """Read to the end; the exit status."""
        self.read_until(lambda: self.process.drained, seconds)
        while self.process.running:  # between the end of its pipe and its own
            time.sleep(0.01)
        return self.process.close()

    def of(self, kind: type[T]) -> list[T]:
        return [message for message in self.messages if isinstance(message, kind)]

    @property
    def losses(self) -> list[float]:
        return [metric.loss for metric in self.of(Metric) if metric.loss is not None]


Start = Callable[..., Trainer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    text = write_text(tmp_path / "data")
    validation = write_text(tmp_path / "validation", VALIDATION)
    started: list[Trainer] = []

    def start_trainer(
        train: TrainConfig = TRAIN,
        plan: Plan = PLAN,
        model: ModelConfig = MODEL,
        command: list[str] = COMMAND,
        **changes: Any,
    ) -> Trainer:
        checkpoints = tmp_path / f"checkpoints-{len(started)}"
        checkpoints.mkdir()
        spec = {
            "job_id": "job",
            "attempt": 1,
            "model": model.to_json(),
            "train": train.to_json(),
            "plan": json.loads(json.dumps(plan.to_json())),
            "memory_cap_bytes": CAP_BYTES,
            "dataset_path": str(text),
            "validation_path": str(validation),
            "checkpoints_dir": str(checkpoints),
            "resume_from": None,
            "initial_weights": None,
            "threads": 1,
            **changes,
        }
        trainer = Trainer(command, spec, tmp_path / f"{len(started)}.log")
        started.append(trainer)
        return trainer

    yield start_trainer
    for trainer in started:
        trainer.process.close()


def test_a_job_runs_to_its_end_resumes_bit_for_bit_and_is_a_start_for_others(start: Start, tmp_path: Path) -> None:
    whole = start()
    assert whole.finish() == 0, tail(whole.log)
    assert whole.messages.pop(0) == Device("cpu")
    kinds = [type(message) for message in whole.messages]
    three_steps_and_an_evaluation = [Metric, Metric, Metric, Evaluation, Checkpoint]
    assert kinds == [
        Data,
        Started,
        Probed,
        Evaluation,
        *three_steps_and_an_evaluation,
        *three_steps_and_an_evaluation,
        Done,
        GradientCheck,
    ]
    assert whole.of(Started) == [Started(0)]
    assert [evaluation.step for evaluation in whole.of(Evaluation)] == [0, 3, 6]
    assert whole.of(Done) == [Done(6, "completed")]
    assert whole.losses[-1] < whole.losses[0]
    (check,) = whole.of(GradientCheck)
    assert (check.chunk_length, check.compared_with) == (100, 256)
    assert 0 < check.relative_error < 1e-5
    assert whole.of(Probed)[0].peak_bytes <= whole.of(Metric)[0].peak_bytes
    for metric in whole.of(Metric):
        assert 50_000_000 < metric.peak_bytes < CAP_BYTES
    for checkpoint in whole.of(Checkpoint):
        folder = tmp_path / "checkpoints-0" / checkpoint.name
        verify_checkpoint(folder)
        assert sorted(file["name"] for file in checkpoint.files) == names(folder)
        assert checkpoint.validation_loss is not None

    folder = tmp_path / "checkpoints-0" / "step-00000003"
    resumed = start(resume_from=str(folder))
    tuned = start(replace(TRAIN, steps=1, seed=8), initial_weights=str(folder))
    assert resumed.finish() == 0
    assert resumed.of(Started) == [Started(3)]
    assert resumed.losses == whole.losses[3:]
    losses = [[(each.step, each.loss) for each in trainer.of(Evaluation)] for trainer in (whole, resumed)]
    assert losses[1] == losses[0][2:]
    hashes = [[file["sha256"] for file in trainer.of(Checkpoint)[-1].files] for trainer in (whole, resumed)]
    assert hashes[0] == hashes[1]

    assert tuned.finish() == 0
    assert tuned.of(Started) == [Started(0)]
    assert tuned.losses[0] < whole.losses[0] - 0.05


def test_a_check_that_fails_fails_no_job(start: Start) -> None:
    """All is trained and saved, and said to be: the certificate does without."""
    trainer = start(replace(TRAIN, steps=1, evaluate_every=1), replace(PLAN, check_chunk_length=-1))
    assert trainer.finish() == 0
    assert trainer.of(Done) == [Done(1, "completed")]
    assert trainer.of(GradientCheck) == []
    assert "chunk_length: must be at least 1" in "".join(tail(trainer.log))


def test_sigterm_ends_it_with_a_checkpoint(start: Start, tmp_path: Path) -> None:
    trainer = start(ENDLESS)
    trainer.until_step(2)
    here = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, trainer.process.pid) == min(here + NICENESS, 19)
    trainer.process.terminate()
    asked = time.monotonic()
    assert trainer.finish() == 3
    assert time.monotonic() - asked < 5
    *_, metric, checkpoint, done = trainer.messages
    assert isinstance(metric, Metric)
    assert isinstance(checkpoint, Checkpoint)
    assert done == Done(metric.step, "stopped")
    assert checkpoint.step == metric.step
    verify_checkpoint(tmp_path / "checkpoints-0" / checkpoint.name)


def test_the_end_of_stdin_kills_it(start: Start) -> None:
    trainer = start(ENDLESS)
    trainer.until_step(1)
    lifeline = trainer.process._lifeline
    assert lifeline is not None
    lifeline.close()
    asked = time.monotonic()
    while trainer.process.running:
        assert time.monotonic() - asked < 2
        trainer.process.read_lines(0.01)
    assert trainer.process.close() == -9


def test_a_cap_that_is_too_small_is_reported_as_such(start: Start, tmp_path: Path) -> None:
    """For the step, though the weights fit; and for the interpreter itself, also where there is no room for its log."""
    model = replace(MODEL, model_width=256, mlp_width=1024)
    long = replace(ENDLESS, sequence_length=16_384)
    cap = 600 << 20
    too_long = start(long, a_plan(16_384), model, memory_cap_bytes=cap)
    hopeless = start(memory_cap_bytes=40 << 20)
    (tmp_path / "2.log").symlink_to("/dev/full")
    unheard = start(memory_cap_bytes=40 << 20)
    for trainer in (too_long, hopeless, unheard):
        assert trainer.finish() == 4
        (failure,) = trainer.of(Failure)
        assert failure is trainer.messages[-1]
        assert failure.code == "memory_cap_exceeded"
    assert too_long.of(Started) == [Started(0)]
    failure = too_long.of(Failure)[0]
    assert failure.step == 0
    assert failure.peak_bytes is not None
    # The meter's reading is an upper bound (test_core_memory.py).
    assert cap - (300 << 20) < failure.peak_bytes <= cap + (20 << 20)
    assert names(tmp_path / "checkpoints-0") == []


def long_document(folder: Path, megabytes: int) -> Path:
    folder.mkdir()
    source = folder / "data.jsonl"
    source.write_text(json.dumps({"text": "one long document, that is " * (megabytes * 37_037)}) + "\n")
    return source


def test_a_long_document_is_tokenised_before_the_trainer_grows(start: Start, tmp_path: Path) -> None:
    """Parsing it takes several times its size, which no plan counts: beside torch there would be no room for it."""
    source = long_document(tmp_path / "long", megabytes=36)
    cap = 300 << 20
    trainer = start(dataset_path=str(source), validation_path=None, memory_cap_bytes=cap)
    with MemoryWatch(trainer.process.pid, cap) as watch:
        assert trainer.finish() == 0, tail(trainer.log)
    assert watch.exceeded_bytes is None
    assert max(metric.peak_bytes for metric in trainer.of(Metric)) < cap


def test_a_document_that_cannot_be_parsed_under_the_cap_is_named(start: Start, tmp_path: Path) -> None:
    source = long_document(tmp_path / "longer", megabytes=60)
    trainer = start(dataset_path=str(source), validation_path=None, memory_cap_bytes=150 << 20)
    failure = one_failure(trainer)
    assert failure.code == "document_too_large"
    assert str(150 << 20) in failure.message
    assert names(source.parent) == ["data.jsonl"]


UNBOUNDED = """
import resource, runpy, sys
import slim_core.memory
resource.setrlimit = lambda which, limits: None
slim_core.memory.CpuMeter.peak_bytes = lambda self: 0
sys.argv = ["worker.start"]
runpy.run_module("worker.start", run_name="__main__")
"""
"""A trainer that neither limits nor measures itself."""


@pytest.mark.parametrize("watched", [True, False])
def test_a_trainer_that_lifts_its_own_limit_is_ended(start: Start, watched: bool) -> None:
    model = replace(MODEL, model_width=128, mlp_width=512)
    long = replace(ENDLESS, sequence_length=16_384)
    cap = 300 << 20
    command = [sys.executable, "-c", UNBOUNDED]
    trainer = start(long, a_plan(16_384), model, command, memory_cap_bytes=cap)
    if watched:
        with MemoryWatch(trainer.process.pid, cap) as watch:
            while trainer.process.running:
                time.sleep(0.05)
        assert trainer.finish() == -9
        assert watch.exceeded_bytes is not None
        assert watch.exceeded_bytes > cap
        assert not trainer.of(Metric)
    else:
        trainer.until_step(1)
        status = Path(f"/proc/{trainer.process.pid}/status").read_text()
        peak, files = (int(kib) << 10 for kib in re.findall(r"(?:VmHWM|RssFile):\s+(\d+) kB", status))
        assert peak - files > cap


def one_failure(trainer: Trainer) -> Failure:
    assert trainer.finish() == 1
    (failure,) = trainer.of(Failure)
    assert isinstance(failure, Failure)
    return failure


def test_what_the_user_can_mend_is_named(start: Start, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "source.jsonl").write_text('{"text": "good"}\n{"no": "text"}\n')
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text(json.dumps(MODEL.to_json()))
    (weights / "model.safetensors").write_bytes(b"no weights")
    explosive = replace(ENDLESS, optimizer=OptimizerConfig(learning_rate=10.0, weight_decay=9.0), gradient_clip=None)
    # Side by side: most of their time is the interpreter's start.
    trainers = {
        "dataset_invalid": start(dataset_path=str(broken / "source.jsonl")),
        "model_invalid": start(initial_weights=str(weights)),
        "diverged": start(explosive),
    }
    failures = {code: one_failure(trainer) for code, trainer in trainers.items()}
    assert {code: failure.code for code, failure in failures.items()} == {code: code for code in failures}
    assert "line 2" in failures["dataset_invalid"].message
    assert "model.safetensors" in failures["model_invalid"].message
    assert failures["diverged"].step == trainers["diverged"].of(Metric)[-1].step


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = ["worker.start"]
runpy.run_module("worker.start", run_name="__main__")
"""


def test_a_full_disk_is_named(start: Start, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: the weights are larger."""
    make_tokens(write_text(tmp_path / "data"))
    make_tokens(write_text(tmp_path / "validation", VALIDATION))
    trainer = start(replace(TRAIN, steps=1), command=[sys.executable, "-c", LIMITED])
    assert one_failure(trainer).code == "disk_full"
    assert names(tmp_path / "checkpoints-0") == []

"""A scripted trainer: a real process that speaks the protocol of `worker.start` and computes nothing.

Run as `python fake_trainer.py OPTIONS` (a JSON object, see `Options`); which is what the supervisor's `command` is for.
Its "loss" is a function of the step alone, so that a run with interruptions has the curve of one without.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any


@dataclass(frozen=True)
class Options:
    step_seconds: float = 0.02
    checkpoint_every: int = 5
    checkpoint_seconds: float = 0.0
    """How long it takes to write one."""
    crash_at: int | None = None
    """Die of SIGKILL after this step ..."""
    crash_attempts: int = 10**9
    """... in the attempts up to this one."""
    crash_half_line: bool = False
    """Leave half a message in the pipe when dying."""
    error_code: str | None = None
    """Report this error after the first step, and end."""
    memory_chunk_length: int | None = None
    """Exit as over the cap after the first step while the plan's chunk is longer than this."""
    ignore_sigterm: bool = False
    hang_at: int | None = None
    """Say nothing more after this step."""
    flood: int = 0
    """Report this many steps at once, as fast as the pipe takes them."""
    device: str = "cpu"
    hold_bytes: int = 0
    """Private memory that is held from before the first step on ..."""
    hold_in: str = "trainer"
    """... by the trainer, a child, or an orphan in a session of its own (a grandchild whose parent has ended) ..."""
    hold_seconds: float = 0.3
    hold_attempts: int = 10**9
    """... in the attempts up to this one."""
    outlive: bool = False
    """Do not end with the supervisor."""
    garbage: bool = False
    """Write something that is no message."""


def loss_at(step: int) -> float:
    return 5.0 / (1 + step)


class FakeTrainer:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.stop = False
        signal.signal(signal.SIGTERM, signal.SIG_IGN if options.ignore_sigterm else self._stop)
        self.spec: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
        if not options.outlive:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
            threading.Thread(target=self._die_at_end_of_stdin, daemon=True).start()
        self.report_fd = int(os.environ["SLIMTUNE_REPORT_FD"])
        self.checkpoints = Path(self.spec["checkpoints_dir"])
        self.step = 0
        if self.spec["resume_from"] is not None:
            self.step = json.loads((Path(self.spec["resume_from"]) / "state.json").read_text())["step"]

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stop = True

    def _die_at_end_of_stdin(self) -> None:
        # Past the buffer: what the supervisor holds open is the descriptor, and it never writes again.
        while os.read(0, 4096):
            pass
        os._exit(9)

    def say(self, kind: str, **fields: Any) -> None:
        data = json.dumps({"type": kind, **fields}).encode() + b"\n"
        with contextlib.suppress(*([BrokenPipeError] if self.options.outlive else [])):
            while data:
                data = data[os.write(self.report_fd, data) :]

    def trace(self, **fields: Any) -> None:
        """What really happened, whatever the database was told: the tests' oracle."""
        line = json.dumps({"attempt": self.spec["attempt"], "pid": os.getpid(), "time": time.monotonic(), **fields})
        with (self.checkpoints.parents[1] / "trace.jsonl").open("a") as file:
            file.write(line + "\n")

    def metric(self) -> None:
        self.say(
            "metric",
            step=self.step,
            loss=loss_at(self.step),
            learning_rate=1e-3,
            grad_norm=1.0,
            step_seconds=self.options.step_seconds,
            tokens=self.step * 64,
            peak_bytes=100_000_000 + self.step,
        )

    def checkpoint(self, validation_loss: float | None = None) -> None:
        name = f"step-{self.step:08d}"
        temporary = self.checkpoints / f"{name}.tmp"
        temporary.mkdir()
        contents = {
            "state.json": json.dumps({"step": self.step, "attempt": self.spec["attempt"]}).encode(),
            "config.json": json.dumps(self.spec["model"]).encode(),
            "model.safetensors": b"weights of step %d" % self.step,
        }
        for file, data in contents.items():
            (temporary / file).write_bytes(data)
        time.sleep(self.options.checkpoint_seconds)
        shutil.rmtree(self.checkpoints / name, ignore_errors=True)  # as save_checkpoint replaces it
        temporary.rename(self.checkpoints / name)
        files = [
            {"name": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for file, data in contents.items()
        ]
        self.say("checkpoint", step=self.step, name=name, files=files, validation_loss=validation_loss, seconds=0.3)

    def run(self) -> int:
        # Held as long as this process lives: whoever finds it taken runs beside another trainer of the job.
        running = (self.checkpoints.parents[1] / "running.lock").open("w")
        try:
            fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.trace(event="overlap")
        self.trace(event="start", step=self.step, environment=dict(os.environ), threads=self.spec["threads"])
        self.say("device", name=self.options.device)
        self.say("started", step=self.step)
        self.say("probed", peak_bytes=99_000_000)
        if self.options.garbage:
            os.write(self.report_fd, b'{"type": "no such thing"}\n')
            time.sleep(60)
        for _ in range(self.options.flood):
            self.step += 1
            self.metric()
        if self.options.hold_bytes and self.spec["attempt"] <= self.options.hold_attempts:
            self.hold()
        total = self.spec["train"]["steps"]
        while self.step < total:
            time.sleep(self.options.step_seconds)
            self.step += 1
            self.metric()
            if (status := self._scripted_end()) is not None:
                return status
            if self.stop:
                self.checkpoint()
                self.say("done", step=self.step, reason="stopped")
                return 3
            if self.step % self.options.checkpoint_every == 0 and self.step < total:
                self.say("evaluation", step=self.step, loss=loss_at(self.step) + 0.1)
                self.checkpoint(loss_at(self.step) + 0.1)
        self.checkpoint()
        self.say("done", step=self.step, reason="completed")
        check = {"chunk_length": 64, "compared_with": 32, "relative_error": 1e-7}
        self.say("gradient_check", **check, peak_bytes=100_000_500)
        return 0

    def hold(self) -> None:
        seconds = self.options.hold_seconds
        program = f"import time; memory = b'x' * {self.options.hold_bytes}; time.sleep({seconds})"
        command = [sys.executable, "-c", program]
        match self.options.hold_in:
            case "trainer":
                memory = b"x" * self.options.hold_bytes
                time.sleep(seconds)
                del memory
            case "child":
                subprocess.run(command, check=True)
            case "orphan":
                start = "subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=2)"
                between = [sys.executable, "-c", f"import subprocess, sys; print({start}.pid)", *command]
                done = subprocess.run(between, check=True, stdout=subprocess.PIPE)
                self.trace(event="orphan", orphan=int(done.stdout))
                time.sleep(seconds)
        self.trace(event="held")

    def _scripted_end(self) -> int | None:
        options = self.options
        if self.step == options.crash_at and self.spec["attempt"] <= options.crash_attempts:
            print("line of the log before the crash", file=sys.stderr, flush=True)
            if options.crash_half_line:
                os.write(self.report_fd, b'{"type": "metric", "step": 99')
            os.kill(os.getpid(), signal.SIGKILL)
        if self.step == options.hang_at:
            print("line of the log before the silence", file=sys.stderr, flush=True)
            time.sleep(600)
        if options.error_code is not None:
            self.say("error", code=options.error_code, message="as told", step=self.step, peak_bytes=None)
            return 1
        limit = options.memory_chunk_length
        if limit is not None and self.spec["plan"]["chunk_length"] > limit:
            message = "the step did not fit"
            self.say("error", code="memory_cap_exceeded", message=message, step=1, peak_bytes=987_654_321)
            return 4
        return None


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return FakeTrainer(Options(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    sys.exit(main())

"""One attempt at a job, from the claim to its end: prepare, start the trainer, watch it, conclude."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.errors import FencedError
from service.runs import ClaimedJob
from service.settings import Settings
from service.status import Desired, JobStatus
from service.storage import Storage, checkpoints_dir, stderr_path
from service.tracing import Span
from slim_core.data.tokens import NO_SPACE_ERRORS
from worker import outcome
from worker.environment import trainer_environment
from worker.lease import LeaseLostError, Watchdog
from worker.ledger import RETRY_SECONDS, Event, Ledger
from worker.memory_watch import MemoryWatch
from worker.messages import Data, Device, Done, Failure, Matching, ProtocolError, Started, parse
from worker.numbers import AttemptNumbers
from worker.outcome import MEMORY_CODE, Ending
from worker.process import TrainerProcess, tail
from worker.resume import damage, strays
from worker.spans import AttemptSpans
from worker.stop import StopRequest

POLL_SECONDS = 0.25
STOP_SECONDS = 60.0
"""How long a trainer that was told to stop may take for its checkpoint ..."""
CANCEL_SECONDS = 3.0
"""... and how long if the job is cancelled, and nobody waits for a checkpoint: with a heartbeat, within 10 s."""
EXIT_SECONDS = 10.0
"""How long a trainer may take to end after it closed its report pipe."""

logger = logging.getLogger(__name__)


class Attempt:
    """A claimed job and everything that belongs to running it once. `run` is called once."""

    def __init__(
        self,
        job: ClaimedJob,
        bind: Engine,
        settings: Settings,
        *,
        command: Sequence[str],
        slot: int,
        stop: StopRequest,
        span: Span,
    ) -> None:
        self._job = job
        self._settings = settings
        self._command = command
        self._slot = slot
        self._stop = stop
        self._storage = Storage(settings.data_dir)
        self._ledger = Ledger(bind, self._storage, job, settings)
        self._numbers = AttemptNumbers(job.plan)
        self._spans = AttemptSpans(span)
        self._log_path = self._storage.path(stderr_path(job.id, job.attempt))
        self._done: Done | None = None
        self._failure: Failure | None = None
        self._stopped: str | None = None
        self._kill_at = float("inf")

    def run(self) -> bool:
        """Run to the end of the attempt; whether the job is queued again.

        A run that lost its job or its database ends quietly: no write, nothing deleted, the trainer gone.
        """
        try:
            ending = self._train_or_say_why_not()
            try:
                return self._conclude(ending)
            except (FencedError, LeaseLostError):
                raise
            except Exception as error:
                logger.exception("the attempt's end cannot be written")
                # What waits to be written may be what the database refuses, and the end of the run must be written.
                self._ledger.discard()
                return self._conclude(self._broken(error))
        except (FencedError, LeaseLostError) as error:
            logger.warning("the attempt ends, and writes nothing more: %s", error)
            self._noted_end("lost")
            return False

    def _train_or_say_why_not(self) -> Ending:
        try:
            return self._train()
        except (FencedError, LeaseLostError):
            raise
        except Exception as error:
            logger.exception("the attempt cannot go on")
            return self._broken(error)

    def _broken(self, error: Exception) -> Ending:
        """The end of a run that this side could not go on with."""
        code = "supervisor_error"
        if isinstance(error, ProtocolError):
            code = "protocol_error"
        elif isinstance(error, OSError) and error.errno in NO_SPACE_ERRORS:
            code = "disk_full"
        return self._ending(None, Failure(code, f"{type(error).__name__}: {error}"[:500], None, None))

    def _train(self) -> Ending:
        spec = self._prepare()
        environment = trainer_environment(self._settings.trainer_threads)
        trainer = TrainerProcess(self._command, spec, environment, self._log_path, inherit=(self._slot,))
        try:
            memory = MemoryWatch(trainer.pid, self._job.memory_cap_bytes)
            with Watchdog(self._ledger.lease, trainer.kill), memory:
                self._watch(trainer, memory)
        finally:
            status = trainer.close()
        if self._ledger.lease.lost:
            raise LeaseLostError("the watchdog ended the trainer")
        if memory.exceeded_bytes is not None and self._done is None:
            self._failure = self._over_the_cap(memory.exceeded_bytes)
        return self._ending(status, self._failure)

    def _over_the_cap(self, held_bytes: int) -> Failure:
        """The failure of a trainer that did not notice, or whose children held the memory."""
        message = f"The trainer and what it started held {held_bytes} bytes; {self._job.memory_cap_bytes} are allowed."
        return Failure(MEMORY_CODE, message, None, held_bytes)

    def _ending(self, status: int | None, failure: Failure | None) -> Ending:
        return Ending(
            step=self._ledger.last_step,
            status=status,
            done=self._done,
            failure=failure,
            stopped=self._stopped,
            progressed=self._ledger.progressed,
            final_checkpoint=self._done is not None and self._done.step == self._ledger.last_checkpoint,
            log=tail(self._log_path),
        )

    def _prepare(self) -> dict[str, Any]:
        """The trainer's spec. Only after a renewal of the lease is anything deleted or made."""
        self._ledger.hold()
        rows = self._ledger.checkpoints()
        resume_from: Path | None = None
        registered = {self._storage.path(path) for _, path, _ in rows}
        for step, path, files in rows:
            reason = damage(self._storage.path(path), files, self._ledger.beat)
            if reason is None:
                resume_from = self._storage.path(path)
                self._ledger.last_checkpoint = step
                break
            logger.warning("checkpoint %d is damaged: %s", step, reason)
            self._ledger.add(Event("checkpoint_damaged", {"step": step, "reason": reason}))
            registered.discard(self._storage.path(path))  # out of the way of the step's next checkpoint
        self._ledger.hold()
        for stray in strays(self._storage.path(checkpoints_dir(self._job.id)), frozenset(registered)):
            self._storage.remove(str(stray.relative_to(self._storage.root)))
        return self._spec(self._storage.make_folder(self._job.checkpoints_dir), resume_from)

    def _spec(self, folder: Path, resume_from: Path | None) -> dict[str, Any]:
        def absolute(relative: str | None) -> str | None:
            return None if relative is None else str(self._storage.path(relative))

        return {
            "job_id": self._job.id,
            "attempt": self._job.attempt,
            "model": self._job.model_config,
            "train": self._job.train,
            "plan": self._job.plan,
            "memory_cap_bytes": self._job.memory_cap_bytes,
            "dataset_path": absolute(self._job.dataset_path),
            "validation_path": absolute(self._job.validation_path),
            "tokenizer": absolute(self._job.tokenizer_path),
            "validation_fraction": self._job.train.get("validation_fraction"),
            "names": self._job.names,
            "checkpoints_dir": str(folder),
            "resume_from": None if resume_from is None else str(resume_from),
            "initial_weights": absolute(self._job.initial_weights_path),
            "threads": self._settings.trainer_threads,
        }

    def _watch(self, trainer: TrainerProcess, memory: MemoryWatch) -> None:
        """Read, steer and write until nothing more can come. Raises FencedError, LeaseLostError."""
        while not trainer.drained:
            if self._ledger.full:  # the trainer waits in its pipe meanwhile
                time.sleep(POLL_SECONDS)
            else:
                for line in trainer.read_lines(POLL_SECONDS):
                    self._take(line, memory)
            self._steer(trainer)
            self._ledger.beat()
        deadline = time.monotonic() + EXIT_SECONDS
        while trainer.running and time.monotonic() < deadline:
            time.sleep(0.02)
            self._ledger.beat()

    def _take(self, line: bytes, memory: MemoryWatch) -> None:
        message = parse(line)
        self._numbers.note(message)
        self._spans.note(message)
        match message:
            case Device(name):
                if name != "cpu":  # the cap is one of the device's memory, and its allocator keeps it
                    memory.stop()
            case Data() as data:
                self._ledger.add(Event("data", asdict(data)))
            case Started(step):
                self._ledger.add(Event("training", {"step": step}))
            case Matching() as matching:
                self._ledger.add(Event("matching", asdict(matching)))
            case Done() as done:
                self._done = done
            case Failure() as failure:
                self._failure = failure
            case entry:
                self._ledger.add(entry)

    def _steer(self, trainer: TrainerProcess) -> None:
        """Pass on what the user, the worker or the kernel wants of this run."""
        reason = self._wanted_end()
        if reason is None and self._stopped is None:
            return
        clock = time.monotonic()
        if self._stopped is None and reason is not None:
            self._stopped = reason
            self._kill_at = clock + STOP_SECONDS
            self._ledger.add(Event("stopping", {"reason": reason}))
            trainer.terminate()
        if reason == "cancel":
            self._kill_at = min(self._kill_at, clock + CANCEL_SECONDS)
        if clock >= self._kill_at or self._stop.orphaned:
            trainer.kill()

    def _wanted_end(self) -> str | None:
        if self._ledger.desired is not Desired.RUN:
            return self._ledger.desired.value
        if self._stop.orphaned:
            return "worker_lost"
        return "worker_shutdown" if self._stop.requested else None

    def _conclude(self, ending: Ending) -> bool:
        """Write the end, trying for as long as the lease may last; whether the job is queued again."""
        status: list[str] = []

        def write(session: Session) -> None:
            status[:] = [outcome.conclude(session, self._job, self._ledger.desired, ending).status]

        while not self._ledger.write(write):
            if self._ledger.lease.age_seconds > self._settings.lease_seconds:
                raise LeaseLostError("its end could not be written")
            time.sleep(RETRY_SECONDS)
        logger.info("the attempt ends, the job is %s", status[0])
        self._noted_end(status[0])
        return status == [JobStatus.QUEUED.value]

    def _noted_end(self, status: str) -> None:
        self._numbers.end(status)
        self._spans.end(status)

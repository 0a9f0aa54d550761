"""One attempt at a job, from the claim to its end: prepare, start the trainer, watch it, conclude."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.errors import FencedError, FilesDamagedError, StorageUnavailableError
from service.patience import Patience
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
from worker.messages import Checkpoint, Data, Device, Done, Failure, Matching, ProtocolError, Started, parse
from worker.numbers import AttemptNumbers
from worker.outcome import MEMORY_CODE, Ending
from worker.process import TrainerProcess, tail
from worker.publisher import publisher_for
from worker.resume import damage
from worker.spans import AttemptSpans
from worker.stop import StopRequest

POLL_SECONDS = 0.25
PUBLISH_POLL_SECONDS = 0.05
STOP_SECONDS = 60.0
"""How long a trainer that was told to stop may take for its checkpoint ..."""
CANCEL_SECONDS = 3.0
"""... and how long if the job is cancelled, and nobody waits for a checkpoint: with a heartbeat, within 10 s."""
PUBLISH_SECONDS = 600.0
"""How long a worker that ends waits for a checkpoint on its way to an object store."""
EXIT_SECONDS = 10.0
"""How long a trainer may take to end after it closed its report pipe."""

logger = logging.getLogger(__name__)


class _UnwantedError(Exception):
    """Nobody wants the run any more that is being prepared."""


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
        storage: Storage,
    ) -> None:
        self._job = job
        self._settings = settings
        self._command = command
        self._slot = slot
        self._stop = stop
        self._storage = storage
        self._publisher = publisher_for(self._storage, settings.storage_patience_seconds)
        self._held = ExitStack()
        """What this host must keep of stored files meanwhile."""
        self._ledger = Ledger(bind, self._publisher, job, settings)
        self._numbers = AttemptNumbers(job.plan)
        self._spans = AttemptSpans(span)
        self._log_path = self._storage.path(stderr_path(job.id, job.attempt))
        self._done: Done | None = None
        self._failure: Failure | None = None
        self._stopped: str | None = None
        self._kill_at = float("inf")
        self._noted: set[str] = set()

    def run(self) -> bool:
        """Run to the end of the attempt; whether the job is queued again.

        A run that lost its job or its database ends quietly: no write, nothing deleted, the trainer gone.
        """
        with self._held, closing(self._publisher):
            return self._run()

    def _run(self) -> bool:
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
        except _UnwantedError:
            return self._ending(None, None)
        except Exception as error:
            logger.exception("the attempt cannot go on")
            return self._broken(error)

    def _broken(self, error: Exception) -> Ending:
        """The end of a run that this side could not go on with."""
        code = "supervisor_error"
        if isinstance(error, StorageUnavailableError):
            return self._ending(None, Failure(error.code, error.message, None, None))
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
        self._await_publication()
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
        registered = {path for _, path, _ in rows}
        for step, path, files in rows:
            reason = self._damage(path, files)
            if reason is None:
                resume_from = self._storage.path(path)
                self._ledger.last_checkpoint = step
                break
            logger.warning("checkpoint %d is damaged: %s", step, reason)
            self._ledger.add(Event("checkpoint_damaged", {"step": step, "reason": reason}))
            if not self._storage.remote:  # else another host may find it whole: what is damaged may be this one's disk
                registered.discard(path)  # out of the way of the step's next checkpoint
        self._ledger.hold()
        self._remove_strays(registered)
        return self._spec(self._storage.make_folder(self._job.checkpoints_dir), resume_from)

    def _damage(self, path: str, files: list[dict[str, Any]]) -> str | None:
        """What is wrong with a checkpoint, after it was brought here; None if nothing is. A copy that this host had is
        fetched anew where it is damaged."""
        for last in (not self._storage.remote, True):
            try:
                with ExitStack() as held:
                    folder = self._storage.hold(path, held, self._patience())
                    reason = damage(folder, files, self._beat_while_wanted)
                    if reason is None:
                        self._held.enter_context(held.pop_all())
            except FileNotFoundError:
                return f"{Path(path).name} is missing"
            except FilesDamagedError as error:
                return str(error)
            if reason is None or last:
                return reason
            self._storage.drop_copy(path)
        raise AssertionError

    def _patience(self) -> Patience:
        return Patience(self._settings.storage_patience_seconds, self._beat_while_wanted, self._note_trouble)

    def _beat_while_wanted(self) -> None:
        """To read or fetch what a job goes on from may take hours. Raises FencedError, LeaseLostError, and
        _UnwantedError as soon as the user or the worker wants it to end."""
        self._ledger.beat()
        if (reason := self._wanted_end()) is not None:
            self._stopped = reason
            self._ledger.add(Event("stopping", {"reason": reason}))
            raise _UnwantedError(reason)

    def _note_trouble(self, error: StorageUnavailableError) -> None:
        logger.warning("the object store: %s", error.detail)
        self._note_code(error.code)

    def _note_code(self, code: str) -> None:
        """For whoever watches the job: once for each time that the store is away."""
        if code not in self._noted:
            self._noted.add(code)
            self._ledger.add(Event("storage_waiting", {"code": code}))

    def _remove_strays(self, registered: set[str]) -> None:
        try:
            self._storage.remove_strays(checkpoints_dir(self._job.id), registered)
        except StorageUnavailableError as error:  # they harm nobody; the next attempt removes them
            logger.warning("what earlier attempts left stays: %s", error.detail)

    def _dataset(self, path: str | None) -> str | None:
        """The absolute path of a dataset's file, beside which its tokens lie, or where the trainer makes them."""
        if path is None:
            return None
        tokens = f"{Path(path).parent}/tokens-{self._job.tokenizer_key}"
        try:
            self._storage.hold(tokens, self._held, self._patience())
            return str(self._storage.path(path))
        except FileNotFoundError:
            self._storage.expect(tokens, self._held)
        return self._here(path)

    def _here(self, path: str) -> str:
        """The absolute path of what was fetched if it had to be; of what is missing the trainer knows what it means."""
        try:
            return str(self._storage.hold(path, self._held, self._patience()))
        except FileNotFoundError:
            return str(self._storage.path(path))

    def _spec(self, folder: Path, resume_from: Path | None) -> dict[str, Any]:
        def absolute(relative: str | None) -> str | None:
            return None if relative is None else self._here(relative)

        return {
            "job_id": self._job.id,
            "attempt": self._job.attempt,
            "model": self._job.model_config,
            "train": self._job.train,
            "plan": self._job.plan,
            "memory_cap_bytes": self._job.memory_cap_bytes,
            "dataset_path": self._dataset(self._job.dataset_path),
            "validation_path": self._dataset(self._job.validation_path),
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
            self._collect()
            self._steer(trainer)
            self._ledger.beat()
        deadline = time.monotonic() + EXIT_SECONDS
        while trainer.running and time.monotonic() < deadline:
            time.sleep(0.02)
            self._ledger.beat()

    def _collect(self) -> None:
        """What was published is registered next. Raises StorageUnavailableError once patience is over."""
        for checkpoint in self._publisher.published():
            self._ledger.add(checkpoint)
            self._noted.clear()
        for code in self._publisher.troubles():
            self._note_code(code)

    def _await_publication(self) -> None:
        """The trainer is gone; its last checkpoint may be on its way. Raises FencedError, LeaseLostError."""
        until = float("inf")
        while self._publisher.is_busy:
            self._collect()
            self._ledger.beat()
            reason = self._wanted_end()
            if reason == "worker_shutdown":
                until = min(until, time.monotonic() + PUBLISH_SECONDS)
            if reason in ("cancel", "worker_lost") or time.monotonic() > until:
                logger.warning("the last checkpoint is not published: %s", reason)
                self._stopped = reason
                if self._done is not None:
                    self._done = replace(self._done, reason="stopped")
                return
            time.sleep(PUBLISH_POLL_SECONDS)
        self._collect()

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
            case Checkpoint() as checkpoint:
                self._publisher.submit(checkpoint, f"{self._job.checkpoints_dir}/{checkpoint.name}")
                self._collect()
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

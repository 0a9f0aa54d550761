"""The preparer: makes datasets' tokens, looks after tokenizers and converts models, one at a time, in a thread of the
worker's main process.

The work itself is done by programs of slim_core, in a child with a memory limit of its own that dies with this
thread. What they make is complete or absent, so a preparer may be killed at any moment: its lease runs out, and
another one does the work again, or finds it done.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service import database, preparations
from service.compression import MAX_RATIO
from service.errors import PreparationFencedError, StorageUnavailableError
from service.failures import PAUSING, preparation_error
from service.patience import Patience
from service.preparations import Preparation
from service.settings import Settings
from service.storage import open_storage
from slim_core.data.tokens import BROKEN_DATASET, NO_MEMORY, NO_SPACE, NO_SPACE_ERRORS
from worker.environment import preparer_environment
from worker.lease import Lease
from worker.ledger import RETRY_SECONDS, is_outage
from worker.process import die_with_parent
from worker.start import NICENESS

IDLE_SECONDS = 1.0
"""Between two looks for work where there is none."""
POLL_SECONDS = 0.1
STOP_SECONDS = 5.0
"""How long the end of a worker waits for its preparer."""
LEAST_SECONDS = 600.0
SLOWEST_BYTES = 20_000
"""Of text, a second: work on it may take so long beyond LEAST_SECONDS. It is 70 times as long as a BPE tokenizer takes
on one core. Without it a small file whose chat template never ends would hold everybody's preparations for hours."""
_PACKED = (".gz", ".zst", ".parquet")
"""Endings of files that hold up to `MAX_RATIO` times their size."""
CHECK_SECONDS = 120.0
"""How long a tokenizer may take to be looked at."""
_LOG_BYTES = 8_192
_MESSAGE_LENGTH = 500
_TOO_LARGE = {
    "dataset_invalid": "document_too_large",
    "tokenizer_invalid": "tokenizer_too_large",
    "model_invalid": "model_too_large",
}
"""What it is called if there is too little memory, by what it is called if something else is wrong."""

logger = logging.getLogger(__name__)

Write = Callable[[Session], None]


class StoppedError(Exception):
    """The worker ends, and gives its work back."""


class FailedError(Exception):
    """The work ended without a result; `record` writes that down."""

    def __init__(self, code: str, message: str, **fields: Any) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.error = preparation_error(code, message[:_MESSAGE_LENGTH], **fields)


class Preparer:
    """Looks for work until it is stopped. `programs` are the modules that do it, for tests."""

    def __init__(
        self,
        bind: Engine,
        settings: Settings,
        worker: str,
        *,
        prepare: str = "slim_core.data.prepare",
        train: str = "slim_core.data.train_tokenizer",
        check: str = "slim_core.data.check_tokenizer",
        convert: str = "slim_core.weights.gguf_import",
        check_model: str = "slim_core.weights.check_model",
    ) -> None:
        self._bind = bind
        self._settings = settings
        self._worker = worker
        self._prepare, self._train, self._check = prepare, train, check
        self._convert, self._check_model = convert, check_model
        self._storage = open_storage(settings)
        self._held = ExitStack()
        """What this host must keep of stored files while it works on one thing."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="preparer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give back what is being worked on; returns at once (`join` waits)."""
        self._stopping.set()

    def join(self) -> None:
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                worked = self.step()
                self._storage.tidy()
            except SQLAlchemyError as error:
                worked = False
                logger.warning("cannot look for work to prepare: %s", str(error).splitlines()[0])
            except Exception:
                worked = False
                logger.exception("the preparer goes on after an error")
            if not worked:
                self._stopping.wait(IDLE_SECONDS)

    def step(self) -> bool:
        """Take one piece of work to its end; False if there was none. Raises SQLAlchemyError if it cannot look."""
        with database.transaction(self._bind) as session:
            work = preparations.claim(session, self._worker, self._settings.lease_seconds)
        if work is None:
            return False
        logger.info("preparing %s (%s, attempt %d)", work.name, work.kind, work.attempt)
        lease = Lease(self._settings.self_kill_seconds)
        try:
            with self._held:
                record = self._work(work, lease)
            self._write(lease, record)
        except PreparationFencedError as error:
            logger.warning("%s", error)
            self._remove_if_gone(work)
        return True

    def _work(self, work: Preparation, lease: Lease) -> Write:
        """Do it; returns how to record the end. Raises PreparationFencedError."""
        try:
            match work.kind:
                case "tokenization":
                    result = self._tokenise(work, lease)
                case "conversion":
                    result = self._conversion(work, lease)
                case _:
                    result = self._tokenizer(work, lease)
        except StoppedError:
            return lambda session: preparations.give_back(session, work)
        except FailedError as error:
            return _record_of(work, error)
        except (PreparationFencedError, SQLAlchemyError):
            raise
        except StorageUnavailableError as error:
            logger.warning("the object store: %s", error.detail)
            return _record_of(work, FailedError(error.code, error.message))
        except OSError as error:
            code = "disk_full" if error.errno in NO_SPACE_ERRORS else "preparation_crashed"
            return _record_of(work, FailedError(code, str(error)))
        except Exception as error:
            logger.exception("%s is not prepared", work.name)
            return _record_of(work, FailedError("preparation_crashed", f"{type(error).__name__}: {error}"))
        logger.info("%s is prepared", work.name)
        return lambda session: preparations.finish(session, work, result)

    def _tokenise(self, work: Preparation, lease: Lease) -> dict[str, Any]:
        """The counts of the token folder, which is there. Raises FailedError, StoppedError, PreparationFencedError,
        StorageUnavailableError."""
        output = self._storage.path(work.output_path)
        if not (self._storage.remote and self._is_made(work, lease)):  # the program looks by itself, and needs no copy
            tokenizer = "bytes" if work.tokenizer_path is None else self._tokenizer_folder(work, lease)
            arguments = ["--source", self._source(work, lease), "--tokenizer", tokenizer, "--out", str(output)]
            arguments += ["--most-text", str(self._settings.max_expanded_bytes)]
            self._child(work, lease, self._prepare, arguments, self._limit_seconds(work, lease))
        counts = _counts(output)
        self._storage.publish(work.output_path, self._patience(work, lease))
        return counts

    def _tokenizer(self, work: Preparation, lease: Lease) -> dict[str, Any]:
        """Key and size of a tokenizer that was trained, if it had to be, and checked. Raises as `_tokenise`."""
        folder = str(self._storage.path(work.output_path))
        if work.kind == "check":
            self._hold(work.output_path, work, lease)
        elif not self._is_made(work, lease):
            arguments = ["--source", self._source(work, lease), "--vocab-size", str(work.vocab_size), "--out", folder]
            arguments += ["--most-text", str(self._settings.max_expanded_bytes)]
            self._child(work, lease, self._train, arguments, self._limit_seconds(work, lease))
        answer = self._child(work, lease, self._check, [folder], CHECK_SECONDS, broken="tokenizer_invalid")
        result: dict[str, Any] = json.loads(answer)
        self._storage.publish(work.output_path, self._patience(work, lease))
        return result | {"bytes": _size(Path(folder))}

    def _conversion(self, work: Preparation, lease: Lease) -> dict[str, Any]:
        """What an uploaded .gguf, which is deleted then, turned out to be. Raises as `_tokenise`."""
        folder = self._storage.path(work.output_path)
        if not self._is_made(work, lease):
            arguments = [self._source(work, lease), str(folder)]
            limit = self._limit_seconds(work, lease)
            self._child(work, lease, self._convert, arguments, limit, broken="model_invalid")
        answer = self._child(work, lease, self._check_model, [str(folder)], CHECK_SECONDS, broken="model_invalid")
        result: dict[str, Any] = json.loads(answer)
        self._storage.publish(work.output_path, self._patience(work, lease))
        if work.source_path is not None and not self._storage.is_being_backed_up():  # else it goes with the model
            self._storage.remove_file(work.source_path)
        return result | {"bytes": _size(folder)}

    def _is_made(self, work: Preparation, lease: Lease) -> bool:
        """Whether an attempt that was lost has made it; it is on this host then, and stays meanwhile."""
        folder = self._storage.path(work.output_path)
        if self._storage.remote:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._hold(work.output_path, work, lease)
        return folder.exists()

    def _hold(self, relative: str, work: Preparation, lease: Lease) -> Path:
        return self._storage.hold(relative, self._held, self._patience(work, lease))

    def _patience(self, work: Preparation, lease: Lease) -> Patience:
        """None, as it is tried again later; but the lease is renewed."""
        return Patience(beat=lambda: self._beat(work, lease))

    def _tokenizer_folder(self, work: Preparation, lease: Lease) -> str:
        """Raises FailedError."""
        assert work.tokenizer_path is not None  # noqa: S101  # by who asks
        try:
            folder = self._hold(work.tokenizer_path, work, lease)
        except FileNotFoundError:
            folder = self._storage.path(work.tokenizer_path)
        if not folder.is_dir():
            raise FailedError("tokenizer_missing", "The tokenizer is not there any more.")
        return str(folder)

    def _source(self, work: Preparation, lease: Lease) -> str:
        if work.source_path is None:
            raise ValueError(f"{work.name}: has no dataset")
        return str(self._hold(work.source_path, work, lease))

    def _limit_seconds(self, work: Preparation, lease: Lease) -> float:
        return limit_seconds(Path(self._source(work, lease)), self._settings.preparer_seconds)

    def _child(
        self,
        work: Preparation,
        lease: Lease,
        module: str,
        arguments: list[str],
        limit_seconds: float,
        broken: str = "dataset_invalid",
    ) -> str:
        """Run a program to its end; returns what it printed. Raises FailedError, StoppedError,
        PreparationFencedError."""
        command = [sys.executable, "-m", module, "--memory", str(self._settings.preparer_memory_bytes), *arguments]
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
            child = subprocess.Popen(  # noqa: S603  # our own module; the files' names are ours
                command,
                env=preparer_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                start_new_session=True,
                preexec_fn=_in_child(),  # noqa: PLW1509  # system calls only, no lock that a thread could hold
            )
            try:
                self._watch(child, work, lease, time.monotonic() + limit_seconds)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            if child.returncode:
                raise _failure(child.returncode, _tail(log), broken)
            return _tail(output)

    def _watch(self, child: subprocess.Popen[bytes], work: Preparation, lease: Lease, until: float) -> None:
        """Wait for its end, renewing the lease."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_SECONDS)
                return
            self._beat(work, lease)
            if time.monotonic() > until:
                raise FailedError("preparation_timeout", "It took too long.")

    def _beat(self, work: Preparation, lease: Lease) -> None:
        """Raises StoppedError, PreparationFencedError."""
        if self._stopping.is_set():
            raise StoppedError
        if lease.age_seconds > self._settings.heartbeat_seconds:
            self._renew(work, lease)

    def _renew(self, work: Preparation, lease: Lease) -> None:
        """Try to. Raises PreparationFencedError also where the database was away for too long."""
        began = time.clock_gettime(time.CLOCK_BOOTTIME)
        try:
            with database.transaction(self._bind) as session:
                preparations.renew(session, work, self._settings.lease_seconds)
        except SQLAlchemyError as error:
            if not is_outage(error):
                raise
            if lease.lost:
                raise PreparationFencedError(work.name, work.attempt) from error
        else:
            lease.renewed(began)

    def _write(self, lease: Lease, record: Write) -> None:
        """Record the end, trying as long as the lease may last: then another preparer finds the files."""
        while True:
            try:
                with database.transaction(self._bind) as session:
                    record(session)
            except SQLAlchemyError as error:
                if not is_outage(error) or lease.age_seconds > self._settings.lease_seconds:
                    raise
                time.sleep(RETRY_SECONDS)
            else:
                return

    def _remove_if_gone(self, work: Preparation) -> None:
        """What was deleted while it was worked on may have got files after its folder went."""
        with database.transaction(self._bind) as session:
            gone = preparations.gone(session, work)
        if gone:
            self._storage.remove(
                str(Path(work.output_path).parent if work.kind in ("tokenization", "conversion") else work.output_path)
            )


def _size(folder: Path) -> int:
    """Bytes of the files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def limit_seconds(source: Path, most_seconds: float) -> float:
    """How long work on this file may take, by how much text it may hold."""
    size = source.stat().st_size * (MAX_RATIO if source.suffix in _PACKED else 1)
    return min(most_seconds, LEAST_SECONDS + size / SLOWEST_BYTES)


def _record_of(work: Preparation, failure: FailedError) -> Write:
    logger.warning("%s is not prepared: %s", work.name, failure)
    records = {"preparation_crashed": preparations.crashed, **dict.fromkeys(PAUSING, preparations.put_off)}
    record = records.get(failure.code, preparations.fail)
    return lambda session: record(session, work, failure.error)


def _in_child() -> Callable[[], None]:
    die = die_with_parent()

    def in_child() -> None:
        die()
        os.nice(NICENESS)

    return in_child


def _counts(folder: Path) -> dict[str, Any]:
    """What the folder's meta.json says. Raises FailedError where it is not there though the program ended well."""
    try:
        counts: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise FailedError("preparation_crashed", f"The token folder cannot be read: {error}") from error
    return counts


def _failure(status: int, log: str, broken: str) -> FailedError:
    """Why a program ended, by its exit status and the last lines of its log."""
    lines = log.splitlines() or [""]
    if status == BROKEN_DATASET:
        details: Any = None
        with contextlib.suppress(ValueError, IndexError):
            details = json.loads(lines[-2])
        return FailedError(broken, lines[-1], **(details if isinstance(details, dict) else {}))
    # Rust code does not return from an allocation that fails.
    if status == NO_MEMORY or (status == -signal.SIGABRT and "memory allocation" in log):
        code = _TOO_LARGE[broken]
        return FailedError(code, "It takes more memory than SLIMTUNE_PREPARER_MEMORY_BYTES allows.")
    if status == -signal.SIGXCPU:
        return FailedError("preparation_timeout", "It took too long.")
    if status == NO_SPACE:
        return FailedError("disk_full", "There is no space left for what is made.")
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return FailedError("preparation_crashed", f"It ended {how}: {lines[-1]}", log=lines[-20:])


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _LOG_BYTES))
    return file.read().decode("utf-8", "replace")

"""A checkpoint's way from this host's disk to where all hosts find it.

In a data folder that is shared it is there already. To an object store it is sent by a thread: meanwhile the supervisor
renews its lease and reads what the trainer says, and the trainer trains on. A checkpoint is registered, by
worker/ledger.py, when it was published.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from service.errors import StorageUnavailableError
from service.patience import Patience
from service.storage import Storage
from worker.messages import Checkpoint

MAX_WAITING = 4
"""Checkpoints that wait for the store. Beyond that the oldest goes that is not the best: they fill the disk."""

logger = logging.getLogger(__name__)


class AbandonedError(Exception):
    """Nobody waits for the publication any more."""


class Publisher(Protocol):
    """What an attempt does with checkpoints that its trainer has made."""

    def submit(self, checkpoint: Checkpoint, folder: str) -> None:
        """It is complete in this folder, relative to the data folder, on this host."""

    def published(self) -> list[Checkpoint]:
        """That can be registered now, each once, in their order. Raises what kept one from being published."""

    def troubles(self) -> list[str]:
        """What is wrong with the store, since the last call."""

    @property
    def is_busy(self) -> bool:
        """Whether more is to come from `published`."""

    def remove(self, folder: str) -> None:
        """Of a checkpoint that no row knows any more. Raises OSError."""

    def close(self) -> None:
        """What is not published is not going to be."""


class LocalPublisher:
    """Where all hosts have the data folder."""

    is_busy = False

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._made: list[Checkpoint] = []

    def submit(self, checkpoint: Checkpoint, _folder: str) -> None:
        self._made.append(checkpoint)

    def published(self) -> list[Checkpoint]:
        made, self._made = self._made, []
        return made

    def troubles(self) -> list[str]:
        return []

    def remove(self, folder: str) -> None:
        self._storage.retire(folder)

    def close(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _Work:
    folder: str
    checkpoint: Checkpoint | None
    """To publish; None to remove."""


class RemotePublisher:
    """Sends to an object store, in a thread, in the order in which it is asked to."""

    def __init__(self, storage: Storage, patience_seconds: float) -> None:
        self._storage = storage
        self._patience = Patience(patience_seconds, self._beat, self._note)
        self._changed = threading.Condition()
        self._work: deque[_Work] = deque()
        self._current: _Work | None = None
        self._published: list[Checkpoint] = []
        self._troubles: list[str] = []
        self._error: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Checkpoint, folder: str) -> None:
        with self._changed:
            self._work.append(_Work(folder, checkpoint))
            self._drop_surplus()
            self._changed.notify()

    def remove(self, folder: str) -> None:
        with self._changed:
            self._work.append(_Work(folder, None))
            self._changed.notify()

    def published(self) -> list[Checkpoint]:
        with self._changed:
            made, self._published = self._published, []
            if not made and self._error is not None:
                raise self._error
        return made

    def troubles(self) -> list[str]:
        with self._changed:
            troubles, self._troubles = self._troubles, []
        return troubles

    @property
    def is_busy(self) -> bool:
        with self._changed:
            if self._published or self._error is not None:
                return True
            waiting = [*self._work, *filter(None, [self._current])]
        return any(work.checkpoint is not None for work in waiting)

    def close(self) -> None:
        """What is to be removed still is, as long as the store lets it."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _drop_surplus(self) -> None:
        waiting = [work for work in self._work if work.checkpoint is not None]
        if len(waiting) <= MAX_WAITING:
            return
        losses = {
            work.folder: work.checkpoint.validation_loss
            for work in waiting
            if work.checkpoint is not None and work.checkpoint.validation_loss is not None
        }
        best = min(losses, key=losses.__getitem__) if losses else None
        surplus = next(work for work in waiting if work.folder != best)
        logger.warning("%s waited for the object store, and makes room for newer ones", surplus.folder)
        self._work.remove(surplus)
        self._storage.drop_copy(surplus.folder)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                self._do(work)
            except AbandonedError:
                logger.warning("%s is not published: nobody waits for it", work.folder)
            except Exception as error:  # noqa: BLE001  # whatever it is, the supervisor must hear of it
                logger.warning("%s: %s: %s", work.folder, type(error).__name__, getattr(error, "detail", error))
                if work.checkpoint is not None:
                    self._fail(error)

    def _next(self) -> _Work | None:
        with self._changed:
            self._current = None
            while not self._work and not self._closed:
                self._changed.wait()
            if self._closed:
                self._work = deque(work for work in self._work if work.checkpoint is None)
            self._current = self._work.popleft() if self._work else None
            return self._current

    def _do(self, work: _Work) -> None:
        checkpoint = work.checkpoint
        if checkpoint is None:
            # In doubt first: what a store that goes away keeps is removed by service.uploads.settle, in the end.
            self._patience.run(lambda: self._storage.doubt(work.folder))
            self._patience.run(lambda: self._storage.remove(work.folder))
            return
        self._patience.run(lambda: self._storage.doubt(work.folder))
        self._storage.publish(work.folder, self._patience, checkpoint.files)
        with self._changed:
            self._published.append(checkpoint)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._work = deque(work for work in self._work if work.checkpoint is None)

    def _beat(self) -> None:
        if self._closed and self._current is not None and self._current.checkpoint is not None:
            raise AbandonedError

    def _note(self, error: StorageUnavailableError) -> None:
        logger.warning("the object store: %s", error.detail)
        with self._changed:
            if error.code not in self._troubles:
                self._troubles.append(error.code)


def publisher_for(storage: Storage, patience_seconds: float) -> Publisher:
    return RemotePublisher(storage, patience_seconds) if storage.remote else LocalPublisher(storage)

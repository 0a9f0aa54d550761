"""Uploaded files and their row: neither stays without the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, Select, exists, literal, or_, select
from sqlalchemy.orm import Session

from service import database, quotas
from service.errors import StorageFullError, StorageUnavailableError
from service.limits import UNLIMITED, Limits
from service.models import Checkpoint, Dataset, Job, Model, Tokenizer
from service.status import JobStatus
from service.storage import Storage

DOUBT_SECONDS = 3_600.0
"""Age of a doubt below which the request that it belongs to may still be at work."""

logger = logging.getLogger(__name__)


class FilesGoneError(Exception):
    """The files of a row that was about to come are not there any more."""


@contextmanager
def recorded(
    bind: Engine,
    files: Storage,
    folder: str,
    commit: Callable[[], None],
    size: int | None,
    tenant: str,
    limits: Limits = UNLIMITED,
) -> Iterator[Session]:
    """Have `commit` put the files into `folder`, relative to the data folder; then the transaction, the tenant's, that
    adds their row. Both are there in the end, or neither.

    `size` is what they hold, in bytes; None if it is among the tenant's bytes in use already. Where this process or
    the database dies meanwhile, which of them is there is in doubt until `settle` looks. Raises StorageFullError,
    StorageQuotaExceededError, and FilesGoneError where this process stood still for so long that `settle` has looked.
    """
    files.doubt(folder)
    committing = False
    try:
        commit()
        with database.transaction(bind, tenant, limits) as session:
            if size is None:
                quotas.lock(session)
            else:
                quotas.admit_bytes(session, size)
            yield session
            session.flush()
            _check_there(files, folder)
            committing = True
    except BaseException:
        if not committing:  # else it may be committed without our having heard of it
            _undo(files, folder)
        raise
    files.trust(folder)


def _undo(files: Storage, folder: str) -> None:
    try:
        files.remove(folder)
        files.trust(folder)
    except StorageUnavailableError as error:  # why there is no row says more to who waits; `settle` removes the files
        logger.warning("%s stays for now: %s", folder, error.detail)


def remove_left(files: Storage, folder: str) -> None:
    """After the transaction: the files whose row is gone, as `leave` has noted. Where the object store is away they go
    with `settle`."""
    try:
        files.retire(folder)
    except StorageUnavailableError as error:
        logger.warning("%s stays for now: %s", folder, error.detail)


def _check_there(files: Storage, folder: str) -> None:
    if not files.exists(folder):
        raise FilesGoneError(folder)


def leave(files: Storage, folder: str) -> None:
    """Before a transaction that deletes the row of a folder, which is to be removed after it. A full disk, which this
    may be to make room on, keeps nobody from that: only what a crash leaves then stays."""
    try:
        files.doubt(folder)
    except StorageFullError:
        logger.warning("%s: no space to note that its row goes", folder)


def settle(bind: Engine, files: Storage, older_than_seconds: float = DOUBT_SECONDS) -> list[str]:
    """Remove the folders that are in doubt for so long and have no row, unless a backup is under way; returns
    them. Raises
    SQLAlchemyError."""
    removed: list[str] = []
    if files.is_being_backed_up():
        return removed
    for folder in files.doubtful(older_than_seconds):
        with database.transaction(bind) as session:
            has_row, is_coming = session.scalar(_has_row(folder)), session.scalar(_is_coming(folder))
        if is_coming and not has_row:
            continue
        if not has_row:
            existed = files.exists(folder)
            files.remove(folder)  # also what does not exist yet: files that came before their manifest
            if existed:
                logger.warning("%s has no row: removed", folder)
                removed.append(folder)
        files.trust(folder)
    return removed


def _is_coming(folder: str) -> Select[tuple[bool]]:
    """Whether it is a checkpoint of a job that runs: a large one may be on its way to the store for hours."""
    running = exists().where(Job.status == JobStatus.RUNNING.value, literal(folder).startswith("jobs/" + Job.id + "/"))
    return select(running)


def _has_row(folder: str) -> Select[tuple[bool]]:
    name = Path(folder).name
    by_name = [exists().where(table.id == name) for table in (Dataset, Tokenizer, Model, Job)]
    return select(or_(*by_name, exists().where(Model.path == folder), exists().where(Checkpoint.path == folder)))

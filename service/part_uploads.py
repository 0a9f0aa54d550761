"""Files that come in parts, in any order and side by side, and become a dataset when they are put together
(part_completions.py).

An upload is open for an hour. Its parts are files until then; what is left of them afterwards goes with the sweeper
(`settle`), whatever died when. Every function of a session works in the caller's transaction and commits nothing.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import timedelta
from types import TracebackType
from typing import Self

from sqlalchemy import Engine, delete, func, select
from sqlalchemy.orm import Session

from service import database, quotas
from service.errors import (
    NotFoundError,
    StorageUnavailableError,
    UploadBusyError,
    UploadMismatchError,
    UploadsOpenError,
    UploadStateError,
    UploadTooLargeError,
)
from service.filenames import clean_filename
from service.ids import is_id, new_id
from service.incoming_files import Upload
from service.limits import UNLIMITED, Limits
from service.models import PartUpload, UploadPart
from service.storage import PARTS, Storage, parts_dir
from service.upload_states import CANCELLED, EXPIRED, PENDING, is_claimed, is_open, keeps_parts

MAX_PART_BYTES = 64 * 1024**2
MAX_PARTS = 10_000
MAX_OPEN = 16
"""Uploads of a tenant at once."""
LIFETIME = timedelta(hours=1)
FORGET_AFTER = timedelta(days=1)
"""From the end of its hour."""
SENT_TWICE = 2
"""Times the announced bytes that parts may hold: one whose answer was lost is sent again, and has another id."""

logger = logging.getLogger(__name__)


def create(
    session: Session, filename: str, size_bytes: int, limit_bytes: int, file_expires_seconds: int | None = None
) -> PartUpload:
    """A new upload of so many bytes, which are the tenant's from now on.

    Raises UploadTooLargeError, UploadsOpenError, StorageQuotaExceededError.
    """
    if size_bytes > limit_bytes:
        raise UploadTooLargeError(limit_bytes)
    tenant = database.tenant_of(session)
    database.lock(session, _lock_of(tenant))  # or two requests count the same uploads
    if session.scalars(select(func.count()).select_from(PartUpload).where(is_open())).one() >= MAX_OPEN:
        raise UploadsOpenError(MAX_OPEN)
    quotas.admit_bytes(session, size_bytes)
    upload = PartUpload(
        id=new_id("upload"),
        tenant=tenant,
        filename=clean_filename(filename),
        bytes=size_bytes,
        status=PENDING,
        expires_at=func.now() + LIFETIME,
        file_expires_seconds=file_expires_seconds,
    )
    session.add(upload)
    session.flush()
    session.refresh(upload)
    return upload


def get(session: Session, upload_id: str, lock: bool = False) -> tuple[PartUpload, str]:
    """The upload and its state now; with `lock`, until the transaction ends. Raises NotFoundError."""
    query = select(PartUpload, is_open()).where(PartUpload.id == upload_id)
    if lock:
        query = query.with_for_update()
    found = session.execute(query).one_or_none() if is_id("upload", upload_id) else None
    if found is None:
        raise NotFoundError("upload", upload_id)
    upload, still_open = found
    return upload, EXPIRED if upload.status == PENDING and not still_open else upload.status


def _open(session: Session, upload_id: str, action: str, lock: bool = True) -> PartUpload:
    """An upload that takes parts. Raises NotFoundError, UploadStateError."""
    upload, state = get(session, upload_id, lock)
    if state != PENDING:
        raise UploadStateError(upload_id, action, state)
    return upload


def cancel(session: Session, upload_id: str) -> tuple[PartUpload, str]:
    """Cancel an upload, once or again; its parts are to be removed after the commit (`remove_parts`). Raises
    NotFoundError, UploadStateError for one that is completed or has expired, UploadBusyError."""
    upload, state = get(session, upload_id, lock=True)
    if state == PENDING:
        if is_being_completed(session, upload):
            raise UploadBusyError(upload.id)
        upload.status = CANCELLED
    elif state != CANCELLED:
        raise UploadStateError(upload_id, "cancel", state)
    return upload, CANCELLED


def is_being_completed(session: Session, upload: PartUpload) -> bool:
    """A request is at it, or has died lately."""
    return session.scalars(select(is_claimed()).where(PartUpload.id == upload.id)).one()


def remove_parts(files: Storage, upload_id: str) -> None:
    """The files of an upload that is closed. What an object store that is away keeps goes with `settle`."""
    try:
        files.remove(parts_dir(upload_id))
    except StorageUnavailableError as error:
        logger.warning("the parts of %s stay for now: %s", upload_id, error.detail)


class PartSink:
    """One part from its first byte to its row, as a context manager: before its block nothing is stored, and a block
    that ends without `store` leaves nothing behind."""

    _file: Upload

    def __init__(self, bind: Engine, files: Storage, upload_id: str, tenant: str, limits: Limits = UNLIMITED) -> None:
        """Raises NotFoundError, UploadStateError."""
        self._bind, self._files, self._upload_id, self._tenant = bind, files, upload_id, tenant
        self._limits = limits
        with database.transaction(bind, tenant) as session:
            upload = _open(session, upload_id, "add a part to", lock=False)
            self._max_bytes = min(MAX_PART_BYTES, upload.bytes)

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises UploadTooLargeError, StorageFullError."""
        self._file.write(data)

    def store(self) -> UploadPart:
        """Make file and row durable. Raises UploadMismatchError for an empty part, or one too many,
        UploadTooLargeError, StorageQuotaExceededError for what is beyond the announced bytes, and what the constructor
        raises."""
        if not self._file.bytes:
            raise UploadMismatchError("The part is empty.")
        self._file.seal()
        part_id = new_id("part")
        path = f"{parts_dir(self._upload_id)}/{part_id}"
        if self._files.remote:  # it may take long, with nothing locked; without a row it goes with the upload
            self._file.commit(path)
        with database.transaction(self._bind, self._tenant, self._limits) as session:
            quotas.lock(session)  # before the upload's own lock, as where one is completed
            # Locked: no cancellation comes between the check and the file's way into the folder that it removes.
            upload = _open(session, self._upload_id, "add a part to")
            mine = select(func.count(), func.coalesce(func.sum(UploadPart.bytes), 0)).where(
                UploadPart.upload_id == upload.id
            )
            count, size = session.execute(mine).one()
            if count >= MAX_PARTS:
                raise UploadMismatchError(f"The upload has {count} parts, which is the most.", max_parts=MAX_PARTS)
            if size + self._file.bytes > SENT_TWICE * upload.bytes:
                raise UploadTooLargeError(SENT_TWICE * upload.bytes)
            if beyond := max(size + self._file.bytes, upload.bytes) - max(size, upload.bytes):
                quotas.check_bytes(session, int(beyond))
            part = UploadPart(id=part_id, tenant=self._tenant, upload_id=upload.id, bytes=self._file.bytes)
            if not self._files.remote:
                self._file.commit(path)
            session.add(part)
            session.flush()
            session.refresh(part)
        return part

    def __enter__(self) -> Self:
        """Raises StorageFullError."""
        self._file = self._files.upload(self._max_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)


def settle(bind: Engine, files: Storage) -> list[str]:
    """Remove the parts of uploads that take no more (of those that have expired, a minute later), and forget those of
    a day ago; returns whose parts were removed. Raises SQLAlchemyError."""
    lying = files.names_in(PARTS)
    with database.transaction(bind) as session:
        needed = set(session.scalars(select(PartUpload.id).where(keeps_parts())))
        session.execute(delete(PartUpload).where(PartUpload.expires_at <= func.now() - FORGET_AFTER))
    removed = [upload_id for upload_id in lying if upload_id not in needed]
    for upload_id in removed:
        remove_parts(files, upload_id)
    return removed


def _lock_of(tenant: str) -> int:
    """A key of 64 bits for an advisory lock."""
    return int.from_bytes(hashlib.sha256(f"uploads of {tenant}".encode()).digest()[:8], signed=True)

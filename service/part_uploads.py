"""Files that come in parts, in any order and side by side, and become a dataset when they are put together.

An upload is open for an hour. Its parts are files until then; what is left of them afterwards goes with the sweeper
(`settle`), whatever died when. Every function of a session works in the caller's transaction and commits nothing.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Engine, delete, func, select, update
from sqlalchemy.orm import Session

from service import database, quotas
from service.datasets import DatasetUpload
from service.errors import (
    NotFoundError,
    UploadBusyError,
    UploadMismatchError,
    UploadsOpenError,
    UploadStateError,
    UploadTooLargeError,
)
from service.filenames import clean_filename
from service.ids import is_id, new_id
from service.limits import UNLIMITED, Limits
from service.models import Dataset, PartUpload, UploadPart
from service.settings import Settings
from service.storage import PARTS, Storage, Upload, parts_dir
from service.upload_states import CANCELLED, COMPLETED, EXPIRED, PENDING, is_open, keeps_parts

MAX_PART_BYTES = 64 * 1024**2
MAX_PARTS = 10_000
MAX_OPEN = 16
"""Uploads of a tenant at once."""
LIFETIME = timedelta(hours=1)
CLAIM_LIFETIME = timedelta(minutes=10)
"""Far longer than it takes to put the largest file together."""
FORGET_AFTER = timedelta(days=1)
"""From the end of its hour."""
SENT_TWICE = 2
"""Times the announced bytes that parts may hold: one whose answer was lost is sent again, and has another id."""
_BLOCK_BYTES = 1024**2

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


def get(session: Session, upload_id: str) -> tuple[PartUpload, str]:
    """The upload and its state now. Raises NotFoundError."""
    return _get(session, upload_id, lock=False)


def _get(session: Session, upload_id: str, lock: bool) -> tuple[PartUpload, str]:
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
    upload, state = _get(session, upload_id, lock)
    if state != PENDING:
        raise UploadStateError(upload_id, action, state)
    return upload


def cancel(session: Session, upload_id: str) -> tuple[PartUpload, str]:
    """Cancel an upload, once or again; its parts are to be removed after the commit (`remove_parts`). Raises
    NotFoundError, UploadStateError for one that is completed or has expired, UploadBusyError."""
    upload, state = _get(session, upload_id, lock=True)
    if state == PENDING:
        if _is_claimed(session, upload):
            raise UploadBusyError(upload.id)
        upload.status = CANCELLED
    elif state != CANCELLED:
        raise UploadStateError(upload_id, "cancel", state)
    return upload, CANCELLED


def remove_parts(files: Storage, upload_id: str) -> None:
    """The files of an upload that is closed."""
    files.remove(parts_dir(upload_id))


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
            part = UploadPart(id=new_id("part"), tenant=self._tenant, upload_id=upload.id, bytes=self._file.bytes)
            self._file.commit(self._files.path(f"{parts_dir(upload.id)}/{part.id}"))
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


def complete(
    bind: Engine,
    files: Storage,
    settings: Settings,
    upload_id: str,
    part_ids: Sequence[str],
    md5: str | None,
    tenant: str,
    limits: Limits = UNLIMITED,
) -> tuple[PartUpload, Dataset | None]:
    """Put the parts together, in this order, and make a dataset of them; a second time, what came of the first (no
    dataset where it was deleted).

    Raises NotFoundError, UploadStateError, UploadBusyError while another request does it, UploadMismatchError, and
    what DatasetUpload raises. The upload then stays open, and nothing else is stored.
    """
    claim = secrets.token_hex(8)
    with database.transaction(bind, tenant) as session:
        upload, state = _get(session, upload_id, lock=True)
        if state == COMPLETED:
            return upload, session.get(Dataset, upload.dataset_id)
        _take(session, upload, state, claim)
        _check_parts(session, upload, part_ids)
    try:
        dataset = _assemble(bind, files, settings, upload, part_ids, md5, claim, limits)
    except BaseException:
        _release(bind, upload_id, claim)
        raise
    remove_parts(files, upload_id)
    with database.transaction(bind, tenant) as session:
        return get(session, upload_id)[0], dataset


def _take(session: Session, upload: PartUpload, state: str, claim: str) -> None:
    if state != PENDING:
        raise UploadStateError(upload.id, "complete", state)
    if _is_claimed(session, upload):
        raise UploadBusyError(upload.id)
    upload.claim, upload.claimed_until = claim, _now(session) + CLAIM_LIFETIME


def _is_claimed(session: Session, upload: PartUpload) -> bool:
    return upload.claimed_until is not None and upload.claimed_until > _now(session)


def _now(session: Session) -> datetime:
    now: datetime = session.scalars(select(func.clock_timestamp())).one()
    return now


def _release(bind: Engine, upload_id: str, claim: str) -> None:
    mine = update(PartUpload).where(PartUpload.id == upload_id, PartUpload.claim == claim)
    with database.transaction(bind) as session:
        session.execute(mine.values(claim=None, claimed_until=None))


def _check_parts(session: Session, upload: PartUpload, part_ids: Sequence[str]) -> None:
    query = select(UploadPart.id, UploadPart.bytes).where(UploadPart.upload_id == upload.id)
    known = dict(session.execute(query).all())
    for part_id in part_ids:
        if part_id not in known:
            raise NotFoundError("part", part_id)
    if len(set(part_ids)) < len(part_ids):
        raise UploadMismatchError("A part is named twice.")
    size = sum(known[part_id] for part_id in part_ids)
    if size != upload.bytes:
        raise UploadMismatchError(
            f"The parts hold {size} bytes; {upload.bytes} were announced.",
            announced_bytes=upload.bytes,
            received_bytes=size,
        )


def _assemble(
    bind: Engine,
    files: Storage,
    settings: Settings,
    upload: PartUpload,
    part_ids: Sequence[str],
    md5: str | None,
    claim: str,
    limits: Limits,
) -> Dataset:
    def conclude(session: Session, dataset: Dataset) -> None:
        # Open: else its bytes are not held any more, and another may have got their room.
        ours = update(PartUpload).where(PartUpload.id == upload.id, is_open(), PartUpload.claim == claim)
        values: dict[str, Any] = {
            "status": COMPLETED,
            "completed_at": func.now(),
            "dataset_id": dataset.id,
            "claim": None,
            "claimed_until": None,
        }
        if session.execute(ours.values(values).returning(PartUpload.id)).one_or_none() is None:
            raise UploadStateError(upload.id, "complete", get(session, upload.id)[1])

    digest = hashlib.md5(usedforsecurity=False)
    with DatasetUpload(files, upload.filename, settings.max_upload_bytes, settings.max_expanded_bytes) as sink:
        for block in _blocks(files, upload.id, part_ids):
            digest.update(block)
            sink.write(block)
        if md5 is not None and digest.hexdigest() != md5.lower():
            raise UploadMismatchError(
                "The MD5 of the parts in this order is another one.", expected=md5.lower(), found=digest.hexdigest()
            )
        seconds = upload.file_expires_seconds
        return sink.store(
            bind, tenant=upload.tenant, limits=limits, expires_seconds=seconds, also=conclude, reserved=True
        )


def _blocks(files: Storage, upload_id: str, part_ids: Sequence[str]) -> Iterator[bytes]:
    for part_id in part_ids:
        with files.path(f"{parts_dir(upload_id)}/{part_id}").open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block


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

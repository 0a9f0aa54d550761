"""An upload in parts becomes a dataset: by one request at a time, which renews its claim while it reads.

Reading may take as long as SLIMTUNE_READ_SECONDS of a processor. Meanwhile the claim keeps the parts, whatever the hour
of the upload; of a request that has died it lapses within two minutes, and another may begin.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Any

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from service import database, part_uploads
from service.datasets import DatasetUpload
from service.errors import (
    NotFoundError,
    UploadBusyError,
    UploadInterruptedError,
    UploadMismatchError,
    UploadPartsGoneError,
    UploadStateError,
)
from service.limits import UNLIMITED, Limits
from service.models import Dataset, PartUpload, UploadPart
from service.settings import Settings
from service.storage import Storage, parts_dir
from service.upload_states import COMPLETED, PENDING, is_open

CLAIM_LIFETIME = timedelta(minutes=2)
RENEWAL_SECONDS = 10.0
"""From one renewal of a claim to the next. A block is read in less."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for."""

    upload_id: str
    part_ids: Sequence[str]
    md5: str | None
    """Of the whole file, in hex, if it is to be checked."""


class Claim:
    """The right of one request to complete an upload."""

    def __init__(self, bind: Engine, upload_id: str) -> None:
        self._bind = bind
        self._upload_id = upload_id
        self._token = secrets.token_hex(8)
        self._renewed = monotonic()

    def take(self, session: Session, upload: PartUpload, state: str) -> None:
        """In the transaction that has locked the upload. Raises UploadStateError, UploadBusyError."""
        if state != PENDING:
            raise UploadStateError(upload.id, "complete", state)
        if part_uploads.is_being_completed(session, upload):
            raise UploadBusyError(upload.id)
        upload.claim = self._token
        upload.claimed_until = func.clock_timestamp() + CLAIM_LIFETIME

    def renew(self) -> None:
        """Raises NotFoundError, UploadStateError, UploadBusyError if it is not this request's any more."""
        with database.transaction(self._bind) as session:
            self.update(session, claimed_until=func.clock_timestamp() + CLAIM_LIFETIME)
        self._renewed = monotonic()

    def renew_in_time(self) -> None:
        """To be called often. Raises what `renew` does."""
        if monotonic() - self._renewed >= RENEWAL_SECONDS:
            self.renew()

    def update(self, session: Session, **values: Any) -> None:
        """Change the upload, while the claim is this request's. Raises what `renew` does."""
        # Open: else its bytes are not held any more, and another may have got their room.
        if session.scalar(self._ours().where(is_open()).values(**values).returning(PartUpload.id)) is None:
            _, state = part_uploads.get(session, self._upload_id)
            if state == PENDING:
                raise UploadBusyError(self._upload_id)
            raise UploadStateError(self._upload_id, "complete", state)

    def release(self) -> None:
        """The next request need not wait for its end."""
        with database.transaction(self._bind) as session:
            session.execute(self._ours().values(claim=None, claimed_until=None))

    def _ours(self) -> Any:
        return update(PartUpload).where(PartUpload.id == self._upload_id, PartUpload.claim == self._token)


def complete(
    bind: Engine,
    files: Storage,
    settings: Settings,
    wanted: Wanted,
    tenant: str,
    limits: Limits = UNLIMITED,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[PartUpload, Dataset | None]:
    """Put the parts together, in this order, and make a dataset of them; a second time, what came of the first (no
    dataset where it was deleted).

    Raises NotFoundError, UploadStateError, UploadBusyError while another request does it, UploadMismatchError,
    UploadPartsGoneError, UploadInterruptedError as soon as `stopping` says so, and what DatasetUpload raises. The
    upload then stays open, and nothing else is stored.
    """
    claim = Claim(bind, wanted.upload_id)
    with database.transaction(bind, tenant) as session:
        upload, state = part_uploads.get(session, wanted.upload_id, lock=True)
        if state == COMPLETED:
            return upload, session.get(Dataset, upload.dataset_id)
        claim.take(session, upload, state)
        _check_parts(session, upload, wanted.part_ids)

    def between_blocks() -> None:
        if stopping():
            raise UploadInterruptedError(upload.id)
        claim.renew_in_time()

    def conclude(session: Session, dataset: Dataset) -> None:
        claim.update(
            session, status=COMPLETED, completed_at=func.now(), dataset_id=dataset.id, claim=None, claimed_until=None
        )

    try:
        with DatasetUpload.within(settings, files, upload.filename, between_blocks) as sink:
            _assemble(files, wanted, sink, claim)
            claim.renew()  # to write the file to the disk may take a while, too
            dataset = sink.store(
                bind,
                tenant=tenant,
                limits=limits,
                expires_seconds=upload.file_expires_seconds,
                also=conclude,
                reserved=True,
            )
    except BaseException:
        claim.release()
        raise
    part_uploads.remove_parts(files, upload.id)
    with database.transaction(bind, tenant) as session:
        return part_uploads.get(session, upload.id)[0], dataset


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


def _assemble(files: Storage, wanted: Wanted, sink: DatasetUpload, claim: Claim) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        for block in _blocks(files, wanted.upload_id, wanted.part_ids):
            digest.update(block)
            sink.write(block)
    except FileNotFoundError as error:
        claim.renew()  # whoever has taken the upload over has removed them
        raise UploadPartsGoneError(wanted.upload_id) from error
    if wanted.md5 is not None and digest.hexdigest() != wanted.md5.lower():
        raise UploadMismatchError(
            "The MD5 of the parts in this order is another one.",
            expected=wanted.md5.lower(),
            found=digest.hexdigest(),
        )


def _blocks(files: Storage, upload_id: str, part_ids: Sequence[str]) -> Iterator[bytes]:
    for part_id in part_ids:
        yield from files.blocks(f"{parts_dir(upload_id)}/{part_id}")

"""What a tenant may have at once, by the limits of the key that asks (limits.py): unfinished jobs, and bytes.

Exact where several requests come at once: from the look until the end of the transaction that adds to it, a lock of the
tenant's is held. Requests without a limit neither look nor wait.
"""

from __future__ import annotations

import hashlib

from sqlalchemy import BigInteger, column, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from service import database
from service.errors import StorageQuotaExceededError, TooManyJobsError
from service.models import Checkpoint, Dataset, Job, Model, PartUpload, Tokenizer, UploadPart
from service.status import TERMINAL
from service.upload_states import keeps_parts


def admit_job(session: Session) -> None:
    """Whether the session's tenant may have one unfinished job more, and bytes for what it writes.

    Raises TooManyJobsError, StorageQuotaExceededError.
    """
    limit = database.limits_of(session).max_jobs
    if limit is not None:
        _take_lock(session)
        unfinished = select(func.count()).select_from(Job).where(Job.status.not_in([s.value for s in TERMINAL]))
        jobs = session.scalars(unfinished).one()
        if jobs >= limit:
            raise TooManyJobsError(jobs, limit)
    admit_bytes(session, 0)


def admit_bytes(session: Session, added: int) -> None:
    """Whether the session's tenant may store `added` bytes more. Raises StorageQuotaExceededError."""
    lock(session)
    check_bytes(session, added)


def lock(session: Session) -> None:
    """Of what the tenant's bytes are counted under, if they are limited: until the transaction ends, nobody else
    adds to them."""
    if database.limits_of(session).max_bytes is not None:
        _take_lock(session)


def check_bytes(session: Session, added: int) -> None:
    """As `admit_bytes`, without the lock: a look ahead, before anything has come. Of what adds nothing of its own, as
    far as is known, it asks for room for one byte."""
    limit = database.limits_of(session).max_bytes
    if limit is None:
        return
    in_use = bytes_in_use(session)
    if in_use + max(added, 1) > limit:
        raise StorageQuotaExceededError(in_use, added, limit)


def bytes_in_use(session: Session) -> int:
    """What the tenant's datasets, tokenizers, uploaded models and checkpoints hold, and uploads in parts that are open:
    as much as was announced, or as their parts hold if that is more. An output model is one of its job's checkpoints.
    """
    files = func.jsonb_array_elements(Checkpoint.files)
    file = files.table_valued(column("value", JSONB), joins_implicitly=True).c.value
    in_checkpoints = select(func.sum(file["bytes"].astext.cast(BigInteger))).select_from(Checkpoint)
    uploaded = (select(func.sum(table.bytes)) for table in (Dataset, Tokenizer, Model))
    parts = select(func.coalesce(func.sum(UploadPart.bytes), 0)).where(UploadPart.upload_id == PartUpload.id)
    held = func.greatest(PartUpload.bytes, parts.correlate(PartUpload).scalar_subquery())
    in_parts = select(func.sum(held)).where(keeps_parts())
    return sum(int(session.scalar(query) or 0) for query in (*uploaded, in_checkpoints, in_parts))


def _take_lock(session: Session) -> None:
    name = hashlib.sha256(f"quota of {database.tenant_of(session)}".encode()).digest()
    session.execute(select(func.pg_advisory_xact_lock(int.from_bytes(name[:8], signed=True))))

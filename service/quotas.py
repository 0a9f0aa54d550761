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
from service.models import Checkpoint, Dataset, Job, Model, Tokenizer
from service.status import TERMINAL


def admit_job(session: Session) -> None:
    """Whether the session's tenant may have one unfinished job more, and bytes for what it writes.

    Raises TooManyJobsError, StorageQuotaExceededError.
    """
    limit = database.limits_of(session).max_jobs
    if limit is not None:
        _lock(session)
        unfinished = select(func.count()).select_from(Job).where(Job.status.not_in([s.value for s in TERMINAL]))
        jobs = session.scalars(unfinished).one()
        if jobs >= limit:
            raise TooManyJobsError(jobs, limit)
    admit_bytes(session, 0)


def admit_bytes(session: Session, added: int) -> None:
    """Whether the session's tenant may store `added` bytes more. Raises StorageQuotaExceededError."""
    if database.limits_of(session).max_bytes is not None:
        _lock(session)
        check_bytes(session, added)


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
    """What the tenant's datasets, tokenizers, uploaded models and checkpoints hold. An output model is one of its job's
    checkpoints."""
    files = func.jsonb_array_elements(Checkpoint.files)
    file = files.table_valued(column("value", JSONB), joins_implicitly=True).c.value
    in_checkpoints = select(func.sum(file["bytes"].astext.cast(BigInteger))).select_from(Checkpoint)
    uploaded = (select(func.sum(table.bytes)) for table in (Dataset, Tokenizer, Model))
    return sum(int(session.scalar(query) or 0) for query in (*uploaded, in_checkpoints))


def _lock(session: Session) -> None:
    name = hashlib.sha256(f"quota of {database.tenant_of(session)}".encode()).digest()
    session.execute(select(func.pg_advisory_xact_lock(int.from_bytes(name[:8], signed=True))))

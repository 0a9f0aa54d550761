"""Uploaded datasets: the way in, the rows, what is made of them, the way out."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Engine, Select, func, or_, select
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from service import database, storage, tokenizations, tokenizers, uploads
from service.dataset_files import format_of, reader
from service.errors import DatasetInUseError, NotFoundError
from service.filenames import clean_filename, clean_name
from service.ids import is_id, new_id
from service.limits import UNLIMITED, Limits
from service.models import Dataset, Job, Tokenization, Tokenizer
from service.pages import newest_first, oldest_first
from service.settings import Settings
from service.status import TERMINAL, UNFINISHED
from service.storage import Storage, dataset_dir
from service.tokenizers import BYTES


class DatasetUpload:
    """One upload from its first byte to its row. A block that ends without `store` leaves nothing behind."""

    def __init__(
        self,
        files: Storage,
        filename: str,
        limit_bytes: int,
        expanded_limit_bytes: int | None = None,
        read_seconds: float = math.inf,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """A compressed file may expand to `expanded_limit_bytes`, or `limit_bytes`; reading it may take a processor
        `read_seconds`, and calls `meanwhile` now and then. Raises DatasetFormatError, by the name's endings."""
        self.filename = clean_filename(filename)
        self.format, self.compression = format_of(self.filename)
        self._files = files
        self._reader = reader(
            self.format, self.compression, expanded_limit_bytes or limit_bytes, read_seconds, meanwhile
        )
        self._upload = files.upload(limit_bytes)

    @classmethod
    def within(
        cls, settings: Settings, files: Storage, filename: str, meanwhile: Callable[[], None] = lambda: None
    ) -> Self:
        """With the limits that the operator has set. Raises DatasetFormatError."""
        limits = settings.max_upload_bytes, settings.max_expanded_bytes, settings.read_seconds
        return cls(files, filename, *limits, meanwhile)

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises UploadTooLargeError, UploadExpandsTooFarError, UploadTakesTooLongError,
        StorageFullError, DatasetInvalidError for what cannot be decompressed, and what `meanwhile` raises."""
        self._upload.write(data)
        self._reader.feed(data)

    def store(
        self,
        bind: Engine,
        name: str | None = None,
        tokenizer: str | None = None,
        *,
        tenant: str,
        limits: Limits = UNLIMITED,
        expires_seconds: int | None = None,
        also: Callable[[Session, Dataset], None] | None = None,
        reserved: bool = False,
    ) -> Dataset:
        """Make file and row durable, and have its tokens made: as bytes, and by `tokenizer`. After `expires_seconds` it
        is deleted, once no job reads it. `also` is done in the same transaction. `reserved` bytes are among those in
        use already.

        Raises what `also` and tokenizers.resolve raise, DatasetInvalidError, StorageFullError; nothing is stored then.
        """
        counts = self._reader.finish()
        dataset = Dataset(
            id=new_id("ds"),
            tenant=tenant,
            name=clean_name(name or self.filename),
            filename=self.filename,
            format=self.format,
            compression=self.compression,
            kind=counts.kind,
            bytes=self._upload.bytes,
            documents=counts.documents,
            tokens=counts.tokens,
            longest_document_tokens=counts.longest_document_tokens,
            sha256=self._upload.sha256,
            problems=[],
        )
        path = storage.dataset_path(dataset.id, self.format, self.compression)
        folder = dataset_dir(dataset.id)
        commit, size = lambda: self._upload.commit(path), None if reserved else self._upload.bytes
        recorded = uploads.recorded(bind, self._files, folder, commit, size, tenant, limits)
        with recorded as session:
            wanted = [BYTES] if tokenizer is None else [BYTES, tokenizers.resolve(session, tokenizer)]
            session.add(dataset)
            session.flush()
            for reference in wanted:
                tokenizations.request(session, dataset.id, reference)
            if expires_seconds is not None:
                dataset.expires_at = dataset.created_at + timedelta(seconds=expires_seconds)
            if also is not None:
                also(session, dataset)
            session.flush()
            session.refresh(dataset)
        return dataset

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._upload.__exit__(kind, error, trace)


def get(session: Session, dataset_id: str, keep: bool = False) -> Dataset:
    """The dataset; with `keep`, locked against deletion until the transaction ends. Raises NotFoundError."""
    query = select(Dataset).where(Dataset.id == dataset_id)
    if keep:
        query = query.with_for_update(read=True, key_share=True)
    dataset = session.scalars(query).one_or_none() if is_id("ds", dataset_id) else None
    if dataset is None:
        raise NotFoundError("dataset", dataset_id)
    return dataset


def keep(session: Session, dataset_id: str) -> None:
    """`get` with `keep`, without reading anything. Raises NotFoundError."""
    query = select(Dataset.id).where(Dataset.id == dataset_id).with_for_update(read=True, key_share=True)
    if not is_id("ds", dataset_id) or session.scalar(query) is None:
        raise NotFoundError("dataset", dataset_id)


def tokenize(session: Session, dataset_id: str, tokenizer: str) -> Tokenization:
    """Have the dataset's tokens made by a tokenizer, unless they are there. Raises NotFoundError and what
    tokenizers.resolve raises."""
    dataset = get(session, dataset_id, keep=True)
    return tokenizations.request(session, dataset.id, tokenizers.resolve(session, tokenizer))


def page(
    session: Session, after: str | None = None, limit: int = 20, ascending: bool = False
) -> tuple[list[Dataset], bool]:
    """Up to `limit` datasets older than the dataset `after`, newest first, and whether there are more; with
    `ascending`, newer than it and oldest first."""
    order = oldest_first if ascending else newest_first
    return order(session, select(Dataset), Dataset.id, after, limit)


def delete(session: Session, dataset_id: str) -> str:
    """Delete the row; returns the folder (relative to the data folder) to remove after the commit.

    Its tokenizations go with it. Raises NotFoundError, and DatasetInUseError while an unfinished job reads it or a
    tokenizer is trained on it.
    """
    query = select(Dataset).where(Dataset.id == dataset_id).with_for_update()
    dataset = session.scalars(query).one_or_none() if is_id("ds", dataset_id) else None
    if dataset is None:
        raise NotFoundError("dataset", dataset_id)
    readers, training = _readers(dataset_id), _training(dataset_id)
    jobs = list(session.scalars(readers.order_by(Job.id).limit(20)))
    trained = list(session.scalars(training.order_by(Tokenizer.id).limit(20)))
    if jobs or trained:
        raise DatasetInUseError(dataset_id, jobs, trained)
    session.execute(sql_delete(Dataset).where(Dataset.id == dataset_id))
    return dataset_dir(dataset_id)


def _readers(dataset_id: Any) -> Select[str]:
    """Unfinished jobs that read it."""
    return select(Job.id).where(
        or_(Job.dataset_id == dataset_id, Job.validation_dataset_id == dataset_id),
        Job.status.not_in([status.value for status in TERMINAL]),
    )


def _training(dataset_id: Any) -> Select[str]:
    """Tokenizers that are being trained on it."""
    return select(Tokenizer.id).where(Tokenizer.dataset_id == dataset_id, Tokenizer.status.in_(UNFINISHED))


def remove_expired(bind: Engine, files: Storage, at_once: int = 100) -> list[str]:
    """Delete the datasets whose time is over and that nothing uses, the oldest first; returns them.

    Raises SQLAlchemyError.
    """
    unused = ~_readers(Dataset.id).exists() & ~_training(Dataset.id).exists()
    over = select(Dataset.id).where(Dataset.expires_at <= func.now(), unused)
    with database.transaction(bind) as session:
        expired = list(session.scalars(over.order_by(Dataset.expires_at).limit(at_once)))
    for dataset_id in expired:
        uploads.leave(files, dataset_dir(dataset_id))
        try:
            with database.transaction(bind) as session:
                folder = delete(session, dataset_id)
        except (NotFoundError, DatasetInUseError):  # since the look
            continue
        uploads.remove_left(files, folder)
    return expired

"""Uploaded datasets: the way in, the rows, the way out."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from sqlalchemy import Engine, or_, select
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from service import database, storage
from service.dataset_files import DatasetFormat, reader
from service.errors import DatasetFormatError, DatasetInUseError, NotFoundError
from service.ids import is_id, new_id
from service.jsonable import clean_text
from service.models import Dataset, Job
from service.pages import newest_first
from service.status import TERMINAL
from service.storage import Storage

MAX_NAME_LENGTH = 200


class DatasetUpload:
    """One upload from its first byte to its row. A block that ends without `store` leaves nothing behind."""

    def __init__(self, files: Storage, filename: str, limit_bytes: int) -> None:
        """Raises DatasetFormatError unless the name ends in .txt or .jsonl."""
        self.filename = clean_filename(filename)
        self.format = _format_of(self.filename)
        self._files = files
        self._reader = reader(self.format)
        self._upload = files.upload(limit_bytes)

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises UploadTooLargeError, StorageFullError."""
        self._upload.write(data)
        self._reader.feed(data)

    def store(self, bind: Engine, name: str | None = None) -> Dataset:
        """Make file and row durable. Raises DatasetInvalidError (nothing is stored), StorageFullError."""
        counts = self._reader.finish()
        dataset = Dataset(
            id=new_id("ds"),
            name=clean_text(name or self.filename)[:MAX_NAME_LENGTH],
            filename=self.filename,
            format=self.format,
            bytes=self._upload.bytes,
            documents=counts.documents,
            tokens=counts.tokens,
            longest_document_tokens=counts.longest_document_tokens,
            sha256=self._upload.sha256,
            problems=[],
        )
        relative = storage.dataset_path(dataset.id, self.format)
        self._upload.commit(self._files.path(relative))
        try:
            with database.transaction(bind) as session:
                session.add(dataset)
                session.flush()
                session.refresh(dataset)
        except BaseException:
            self._files.remove(f"datasets/{dataset.id}")
            raise
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


def page(session: Session, after: str | None = None, limit: int = 20) -> tuple[list[Dataset], bool]:
    """Up to `limit` datasets older than the dataset `after`, newest first, and whether there are more."""
    return newest_first(session, select(Dataset), Dataset.id, after, limit)


def delete(session: Session, dataset_id: str) -> str:
    """Delete the row; returns the folder (relative to the data folder) to remove after the commit.

    Raises NotFoundError, and DatasetInUseError while an unfinished job reads it.
    """
    query = select(Dataset).where(Dataset.id == dataset_id).with_for_update()
    dataset = session.scalars(query).one_or_none() if is_id("ds", dataset_id) else None
    if dataset is None:
        raise NotFoundError("dataset", dataset_id)
    readers = select(Job.id).where(
        or_(Job.dataset_id == dataset_id, Job.validation_dataset_id == dataset_id),
        Job.status.not_in([status.value for status in TERMINAL]),
    )
    if jobs := list(session.scalars(readers.order_by(Job.id).limit(20))):
        raise DatasetInUseError(dataset_id, jobs)
    session.execute(sql_delete(Dataset).where(Dataset.id == dataset_id))
    return f"datasets/{dataset_id}"


def clean_filename(filename: str) -> str:
    """A client's file name as harmless metadata: its last part, printable, at most 200 characters."""
    last = clean_text(filename).replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(character for character in last if character.isprintable()).strip()
    if len(printable) > MAX_NAME_LENGTH:
        stem, dot, ending = printable.rpartition(".")
        kept = MAX_NAME_LENGTH - len(dot + ending)
        printable = stem[:kept] + dot + ending if kept > 0 and stem else printable[:MAX_NAME_LENGTH]
    return printable or "unnamed"


def _format_of(filename: str) -> DatasetFormat:
    lowered = filename.lower()
    if lowered.endswith(".txt"):
        return "txt"
    if lowered.endswith(".jsonl"):
        return "jsonl"
    raise DatasetFormatError

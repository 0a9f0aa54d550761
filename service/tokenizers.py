"""Tokenizers: uploaded or trained, and which one a name means. Those of models come with the model."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sqlalchemy import Engine, or_, select
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from service import base_models, quotas, storage, uploads
from service.errors import (
    NotFoundError,
    TokenizerFailedError,
    TokenizerInUseError,
    TokenizerInvalidError,
    TokenizerNotReadyError,
)
from service.filenames import clean_filename, clean_name
from service.ids import is_id, new_id
from service.limits import UNLIMITED, Limits
from service.models import Dataset, Job, Model, Tokenization, Tokenizer
from service.pages import newest_first
from service.status import FAILED, PENDING, READY, TERMINAL, UNFINISHED
from service.storage import Storage
from service.tokenizer_files import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, problem_of, problem_of_config

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
FILES = {FILE: MAX_TOKENIZER_BYTES, CONFIG_FILE: MAX_CONFIG_BYTES, TEMPLATE_FILE: MAX_CONFIG_BYTES}
"""What an upload may have, with the most bytes of each."""


@dataclass(frozen=True, slots=True)
class TokenizerRef:
    """A tokenizer that can be used now."""

    name: str
    """`bytes`, or the id of a tokenizer or model."""
    key: str
    """What it is by its content (Tokenization.key)."""
    path: str | None = None
    """Folder, relative to the data folder; None for bytes."""
    vocab_size: int | None = None
    """None where the model says it."""


BYTES = TokenizerRef("bytes", "bytes")


def resolve(session: Session, name: str) -> TokenizerRef:
    """What a request means by a tokenizer: `bytes`, the id of a tokenizer, or that of a model for the model's own.

    Its row stays locked against deletion until the transaction ends. Raises NotFoundError, TokenizerNotReadyError,
    TokenizerFailedError.
    """
    if name == BYTES.name:
        return BYTES
    if is_id("model", name):
        return of_model(base_models.ready(session, name, keep=True))
    row = get(session, name, keep=True)
    if row.status == FAILED and row.error is not None:
        raise TokenizerFailedError(row.id, row.error)
    if row.status != READY or row.key is None:
        raise TokenizerNotReadyError(row.id)
    return TokenizerRef(row.id, row.key, row.path, row.vocab_size)


def of_model(model: Model) -> TokenizerRef:
    """The tokenizer whose files the model's folder has; bytes where it has none."""
    if model.tokenizer_key is None:
        return BYTES
    return TokenizerRef(model.id, model.tokenizer_key, model.tokenizer_path)


class TokenizerUpload:
    """An uploaded tokenizer.json, and what may lie beside it, from the first byte to the row. A block without `store`
    leaves nothing behind."""

    def __init__(self, files: Storage) -> None:
        self._files = files
        self._upload = files.folder_upload(sum(FILES.values()))

    def begin(self, filename: str) -> None:
        """What is written from now on belongs to this file. Raises TokenizerInvalidError for a file of another name,
        StorageFullError."""
        name = clean_filename(filename)
        if name not in FILES or any(file["name"] == name for file in self._upload.files):
            raise TokenizerInvalidError(
                f"must be one {FILE}, beside which one {CONFIG_FILE} and one {TEMPLATE_FILE} may come"
            )
        self._upload.begin(name, FILES[name])

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises UploadTooLargeError, StorageFullError."""
        self._upload.write(data)

    def store(self, bind: Engine, name: str | None = None, *, tenant: str, limits: Limits = UNLIMITED) -> Tokenizer:
        """Make files and row durable, to be checked by the preparer.

        Raises TokenizerInvalidError, StorageFullError; nothing is stored then.
        """
        self._upload.seal()
        names = {file["name"] for file in self._upload.files}
        reason = problem_of(self._upload.folder / FILE) if FILE in names else f"is missing: send {FILE}"
        if reason is None and CONFIG_FILE in names:
            reason = problem_of_config(self._upload.folder / CONFIG_FILE)
        if reason is not None:
            raise TokenizerInvalidError(reason)
        row = _new(tenant, name or FILE, "upload")
        row.bytes = self._upload.bytes
        path = row.path
        commit, size = lambda: self._upload.commit(path), self._upload.bytes
        recorded = uploads.recorded(bind, self._files, row.path, commit, size, tenant, limits)
        with recorded as session:
            session.add(row)
            session.flush()
            session.refresh(row)
        return row

    def __enter__(self) -> Self:
        self._upload.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._upload.__exit__(kind, error, trace)


def train(session: Session, dataset: Dataset, vocab_size: int, name: str | None = None) -> Tokenizer:
    """A tokenizer to be trained by the preparer on a dataset, whose row the caller holds. Raises
    StorageQuotaExceededError."""
    quotas.admit_bytes(session, 0)
    row = _new(dataset.tenant, name or f"BPE of {dataset.name}", "trained")
    row.dataset_id = dataset.id
    row.wanted_vocab_size = vocab_size
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def get(session: Session, tokenizer_id: str, keep: bool = False) -> Tokenizer:
    """The tokenizer; with `keep`, locked against deletion until the transaction ends. Raises NotFoundError."""
    query = select(Tokenizer).where(Tokenizer.id == tokenizer_id)
    if keep:
        query = query.with_for_update(read=True, key_share=True)
    row = session.scalars(query).one_or_none() if is_id("tok", tokenizer_id) else None
    if row is None:
        raise NotFoundError("tokenizer", tokenizer_id)
    return row


def page(session: Session, after: str | None = None, limit: int = 20) -> tuple[list[Tokenizer], bool]:
    """Up to `limit` tokenizers older than `after`, newest first, and whether there are more."""
    return newest_first(session, select(Tokenizer), Tokenizer.id, after, limit)


def delete(session: Session, tokenizer_id: str) -> str:
    """Delete the row; returns the folder (relative to the data folder) to remove after the commit.

    Raises NotFoundError, and TokenizerInUseError while an unfinished job or preparation needs its files. Tokens that
    were made with it stay.
    """
    query = select(Tokenizer).where(Tokenizer.id == tokenizer_id).with_for_update()
    row = session.scalars(query).one_or_none() if is_id("tok", tokenizer_id) else None
    if row is None:
        raise NotFoundError("tokenizer", tokenizer_id)
    users = select(Job.id).where(
        or_(Job.tokenizer_id == row.id, Job.tokenizer_path == row.path),
        Job.status.not_in([status.value for status in TERMINAL]),
    )
    jobs = list(session.scalars(users.order_by(Job.id).limit(20)))
    preparing = select(Tokenization.dataset_id).where(
        Tokenization.tokenizer_path == row.path, Tokenization.status.in_(UNFINISHED)
    )
    being_prepared = list(session.scalars(preparing.order_by(Tokenization.dataset_id).limit(20)))
    if jobs or being_prepared:
        raise TokenizerInUseError(row.id, jobs, being_prepared)
    session.execute(sql_delete(Tokenizer).where(Tokenizer.id == row.id))
    return row.path


def _new(tenant: str, name: str, source: str) -> Tokenizer:
    identifier = new_id("tok")
    path = storage.tokenizer_dir(identifier)
    return Tokenizer(id=identifier, tenant=tenant, name=clean_name(name), source=source, status=PENDING, path=path)

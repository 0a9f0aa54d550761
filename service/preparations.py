"""What the preparer does in the background: the queue of tokenizations, tokenizers and models, claims, leases, results.

A row is pending, running, ready or failed. A claim takes a pending row, or a running one whose lease ran out, adds 1 to
`attempt` and sets a lease; every later write holds only under that attempt, else PreparationFencedError. Every function
works in the caller's transaction and commits nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, assert_never

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.orm import Session

from service import base_models, storage
from service.errors import PreparationFencedError
from service.failures import preparation_error
from service.jsonable import clean_json
from service.models import Dataset, Model, Tokenization, Tokenizer
from service.status import FAILED, PENDING, READY, RUNNING, UNFINISHED

MAX_FAILURES = 3
"""Attempts that end without saying why (crashes, lost workers) after which it is given up."""
FIRST_RETRY_SECONDS = 30.0
LAST_RETRY_SECONDS = 600.0
"""Pauses between tries on a full disk, each twice the one before."""

Kind = Literal["tokenization", "check", "training", "conversion"]
Row = Tokenizer | Tokenization | Model


@dataclass(frozen=True, slots=True)
class Preparation:
    """A claimed piece of work. Paths are relative to the data folder."""

    kind: Kind
    id: str
    """Of the dataset, of the tokenizer that is checked or trained, of the model that is converted."""
    key: str
    """Of the tokenizer of a tokenization; else empty."""
    attempt: int
    source_path: str | None
    """The dataset's file, the model's; None for a check."""
    tokenizer_path: str | None
    """None for bytes."""
    output_path: str
    """Folder to make; of a check, the folder to look at."""
    vocab_size: int | None = None
    """To train."""

    @property
    def name(self) -> str:
        return f"{self.id}/{self.key}" if self.key else self.id


def claim(session: Session, worker: str, lease_seconds: float) -> Preparation | None:
    """Take the oldest piece of work, tokenizers and models first (datasets wait for them); None if there is none.

    One that was lost too often is failed on the way.
    """
    for table in (Tokenizer, Model, Tokenization):
        while (row := _next(session, table)) is not None:
            if row.status == RUNNING:
                row.failures += 1
            if row.failures >= MAX_FAILURES:
                _rest(row, FAILED, row.error or preparation_error("worker_lost", "Its worker vanished, repeatedly."))
                session.flush()
                continue
            row.status = RUNNING
            row.attempt += 1
            row.worker = worker
            row.lease_until = _after(lease_seconds)
            session.flush()
            return _preparation(session, row)
    return None


def renew(session: Session, work: Preparation, lease_seconds: float) -> None:
    """Extend the lease. Raises PreparationFencedError."""
    _held(session, work).lease_until = _after(lease_seconds)


def finish(session: Session, work: Preparation, result: dict[str, Any]) -> None:
    """Record what was made: a tokenization's counts; of a tokenizer, `key`, `vocab_size` and `bytes`; of a model,
    `bytes` and what `base_models.CheckedModel` has.

    Raises PreparationFencedError.
    """
    row = _held(session, work)
    _rest(row, READY, None)
    match row:
        case Tokenizer():
            row.key, row.vocab_size, row.bytes = result["key"], result["vocab_size"], result["bytes"]
        case Model():
            row.bytes = result["bytes"]
            found = {name: value for name, value in result.items() if name != "bytes"}
            base_models.describe(row, base_models.CheckedModel(**found))
        case Tokenization():
            row.counts = clean_json(result)
            _complete_dataset(session, row.dataset_id, row.counts)


def fail(session: Session, work: Preparation, error: dict[str, Any]) -> None:
    """Record that another try would end in the same way. Raises PreparationFencedError."""
    _rest(_held(session, work), FAILED, clean_json(error))


def put_off(session: Session, work: Preparation, error: dict[str, Any]) -> None:
    """Try again later, for as long as it takes: nothing is wrong with the data. Raises PreparationFencedError."""
    row = _held(session, work)
    tries = (row.error or {}).get("tries", 0) + 1
    _rest(row, PENDING, clean_json({**error, "tries": tries}))
    pause = min(FIRST_RETRY_SECONDS * 2 ** (min(tries, 20) - 1), LAST_RETRY_SECONDS)
    row.retry_at = _after(pause)


def crashed(session: Session, work: Preparation, error: dict[str, Any]) -> None:
    """Try again, at most `MAX_FAILURES` times in all. Raises PreparationFencedError."""
    row = _held(session, work)
    row.failures += 1
    given_up = row.failures >= MAX_FAILURES
    _rest(row, FAILED if given_up else PENDING, clean_json(error))
    if not given_up:
        row.retry_at = _after(FIRST_RETRY_SECONDS)


def give_back(session: Session, work: Preparation) -> None:
    """The worker stops: another one may take it at once. Raises PreparationFencedError."""
    row = _held(session, work)
    _rest(row, PENDING, row.error)


def gone(session: Session, work: Preparation) -> bool:
    """Whether what it was for has been deleted, so that its files are nobody's."""
    table = _TABLES[work.kind]
    return session.scalar(select(table.id).where(table.id == work.id)) is None


_TABLES: dict[Kind, type[Dataset | Tokenizer | Model]] = {
    "tokenization": Dataset,
    "check": Tokenizer,
    "training": Tokenizer,
    "conversion": Model,
}
"""Whose id a piece of work has."""


def _next(session: Session, table: type[Row]) -> Row | None:
    now = func.clock_timestamp()
    due = or_(
        and_(table.status == PENDING, or_(table.retry_at.is_(None), table.retry_at <= now)),
        and_(table.status == RUNNING, table.lease_until < now),
    )
    query = select(table).where(table.status.in_(UNFINISHED), due).order_by(table.created_at).limit(1)
    query = query.with_for_update(skip_locked=True)
    row: Any = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    return row  # type: ignore[no-any-return]  # one of the three; mypy joins them to their base


def _held(session: Session, work: Preparation) -> Row:
    """The fence: the row, locked until the transaction ends."""
    row: Row | None
    if work.kind == "tokenization":
        row = session.get(Tokenization, (work.id, work.key), populate_existing=True, with_for_update=True)
    elif work.kind == "conversion":
        row = session.get(Model, work.id, populate_existing=True, with_for_update=True)
    else:
        row = session.get(Tokenizer, work.id, populate_existing=True, with_for_update=True)
    if row is None or row.attempt != work.attempt or row.status != RUNNING:
        raise PreparationFencedError(work.name, work.attempt)
    return row


def _rest(row: Row, status: str, error: dict[str, Any] | None) -> None:
    """The one way out of `running`."""
    row.status = status
    row.lease_until = row.retry_at = row.worker = None
    row.error = error
    row.finished_at = None if status == PENDING else func.clock_timestamp()


def _after(seconds: float) -> Any:
    return func.clock_timestamp() + timedelta(seconds=seconds)


def _preparation(session: Session, row: Row) -> Preparation:
    match row:
        case Tokenization():
            return Preparation(
                kind="tokenization",
                id=row.dataset_id,
                key=row.key,
                attempt=row.attempt,
                source_path=source_path(session, row.dataset_id),
                tokenizer_path=row.tokenizer_path,
                output_path=storage.tokens_dir(row.dataset_id, row.key),
            )
        case Tokenizer():
            trained = row.source == "trained"
            return Preparation(
                kind="training" if trained else "check",
                id=row.id,
                key="",
                attempt=row.attempt,
                source_path=source_path(session, row.dataset_id) if trained and row.dataset_id else None,
                tokenizer_path=row.path,
                output_path=row.path,
                vocab_size=row.wanted_vocab_size,
            )
        case Model():
            return Preparation(
                kind="conversion",
                id=row.id,
                key="",
                attempt=row.attempt,
                source_path=f"{storage.model_path(row.id)}/{base_models.GGUF_FILE}",
                tokenizer_path=None,
                output_path=row.path,
            )
        case _:
            assert_never(row)


def source_path(session: Session, dataset_id: str) -> str:
    """Relative path of a dataset's file."""
    file = session.execute(select(Dataset.format, Dataset.compression).where(Dataset.id == dataset_id)).one()
    return storage.dataset_path(dataset_id, file.format, file.compression)


def _complete_dataset(session: Session, dataset_id: str, counts: dict[str, Any]) -> None:
    """What only the preparer could see of a .parquet."""
    kind = "prompt_completion" if counts["kind"] == "completion" else counts["kind"]
    unknown = update(Dataset).where(Dataset.id == dataset_id, Dataset.documents.is_(None))
    session.execute(unknown.values(kind=kind, documents=counts["documents"]))

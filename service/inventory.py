"""Whether what the database knows of is there, and whether the database knows of what is there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, Select, inspect, select, tuple_
from sqlalchemy.orm import Session

from service import base_models, database, storage
from service.models import Base, Checkpoint, Dataset, Job, Model, Tokenization, Tokenizer
from service.status import READY, JobStatus
from service.storage import Storage

ROWS_AT_ONCE = 500
FOLDERS: dict[str, type[Dataset | Tokenizer | Model | Job]] = {
    "datasets": Dataset,
    "tokenizers": Tokenizer,
    "models": Model,
    "jobs": Job,
}
"""Of the data folder, and whose ids the names in them are."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A file that a row stands for."""

    path: str
    """Relative to the data folder."""
    bytes: int | None = None
    """None: not in the database."""
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that is not what its row says."""

    path: str
    what: str
    owner: str
    """The row: its table and key."""


def faults(
    bind: Engine, files: Storage, *, hashes: bool = False, on_file: Callable[[], None] = lambda: None
) -> list[Fault]:
    """Files that are missing, have another size, or with `hashes` another content; in an object store also what has no
    manifest, so that no host could fetch it. Of rows that go meanwhile nothing.

    Raises SQLAlchemyError, OSError, StorageUnavailableError.
    """
    found = []
    for row in _rows(bind):
        wrong = []
        listed = list(_expected(row))
        for expected in listed:
            on_file()
            if (what := _look(files, expected, hashes)) is not None:
                wrong.append(Fault(expected.path, what, _name(row)))
        if listed and not wrong and not files.exists(stored := _stored_as(row)):
            wrong.append(Fault(stored, "has no manifest", _name(row)))
        if wrong and _is_there(bind, row):
            found += wrong
    return found


def unowned(bind: Engine, files: Storage) -> list[str]:
    """Folders that no row knows, and that are not noted as such (`Storage.doubt`); none of running jobs.

    Raises SQLAlchemyError, OSError.
    """
    noted = set(files.doubtful(older_than_seconds=-1.0))
    found = []
    for folder, table in FOLDERS.items():
        names = files.names_in(folder)
        with database.transaction(bind) as session:
            known = _known(session, table, names)
        found += [f"{folder}/{name}" for name in names if name not in known]
        if table is Job:
            found += [path for job_id in names if job_id in known for path in _unregistered(bind, files, job_id)]
    return [path for path in found if path not in noted]


def knows_anything(bind: Engine) -> bool:
    """Whether the database has a row of anything that has files."""
    with database.transaction(bind) as session:
        return any(session.scalar(select(table.id).limit(1)) is not None for table in FOLDERS.values())


def _look(files: Storage, expected: Expected, hashes: bool) -> str | None:
    try:
        size = files.stat(expected.path).st_size
        if expected.bytes is not None and size != expected.bytes:
            return f"has {size} bytes instead of {expected.bytes}"
        if hashes and expected.sha256 is not None and _sha256(files.blocks(expected.path)) != expected.sha256:
            return "does not have the SHA-256 that it was registered with"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    return None


def _sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


# Rows


def _rows(bind: Engine) -> Iterator[Any]:
    """Everything that has files, in pages of transactions of their own: to hash a page may take hours."""
    tables: tuple[type[Base], ...] = (Dataset, Tokenization, Tokenizer, Model, Checkpoint)
    for table in tables:
        key = inspect(table).primary_key
        last: tuple[Any, ...] | None = None
        while True:
            query: Select[Any] = select(table).order_by(*key).limit(ROWS_AT_ONCE)
            if last is not None:
                query = query.where(tuple_(*key) > last)
            with database.transaction(bind) as session:
                page = list(session.scalars(query))
            yield from page
            if len(page) < ROWS_AT_ONCE:
                break
            last = _key(page[-1])


def _key(row: Base) -> tuple[Any, ...]:
    return tuple(inspect(row).identity or ())


def _name(row: Base) -> str:
    return f"{row.__tablename__} {' '.join(map(str, _key(row)))}"


def _is_there(bind: Engine, row: Base) -> bool:
    with database.transaction(bind) as session:
        return session.get(type(row), _key(row)) is not None


def _expected(row: Any) -> Iterator[Expected]:
    match row:
        case Dataset():
            path = storage.dataset_path(row.id, row.format, row.compression)
            yield Expected(path, row.bytes, row.sha256)
        case Tokenization(status="ready"):
            yield Expected(f"{storage.tokens_dir(row.dataset_id, row.key)}/meta.json")
        case Tokenizer() if row.status == READY or row.source == "upload":
            yield Expected(f"{row.path}/tokenizer.json")
        case Model(kind="upload") if row.path == storage.model_path(row.id):
            yield from _of_folder(row.path, row.files or [])
        case Model(kind="upload") if row.status == READY:
            yield Expected(f"{row.path}/config.json")
        case Model(kind="upload"):
            yield Expected(f"{storage.model_path(row.id)}/{base_models.GGUF_FILE}")
        case Model():
            yield Expected(f"{row.path}/config.json")
        case Checkpoint():
            yield from _of_folder(row.path, row.files)


def _stored_as(row: Any) -> str:
    """The file or folder that was stored as a whole."""
    match row:
        case Dataset():
            return storage.dataset_path(row.id, row.format, row.compression)
        case Tokenization():
            return storage.tokens_dir(row.dataset_id, row.key)
        case Model(kind="upload") if row.status != READY:
            return storage.model_path(row.id)
        case _:
            return str(row.path)


def _of_folder(path: str, records: list[dict[str, Any]]) -> Iterator[Expected]:
    for record in records:
        yield Expected(f"{path}/{record['name']}", record["bytes"], record["sha256"])


# Folders


def _known(session: Session, table: type[Dataset | Tokenizer | Model | Job], names: list[str]) -> set[str]:
    known: set[str] = set()
    for begin in range(0, len(names), ROWS_AT_ONCE):
        known |= set(session.scalars(select(table.id).where(table.id.in_(names[begin : begin + ROWS_AT_ONCE]))))
    return known


def _unregistered(bind: Engine, files: Storage, job_id: str) -> Iterator[str]:
    """Checkpoints of a job that does not run which it does not know."""
    below = storage.checkpoints_dir(job_id)
    lying = [
        (f"{below}/{attempt}", f"{below}/{attempt}/{step}")
        for attempt in files.names_in(below)
        for step in files.names_in(f"{below}/{attempt}")
    ]
    if not lying:
        return
    with database.transaction(bind) as session:
        status = session.scalar(select(Job.status).where(Job.id == job_id))
        registered = set(session.scalars(select(Checkpoint.path).where(Checkpoint.job_id == job_id)))
        outputs = set(session.scalars(select(Model.path).where(Model.job_id == job_id)))
    if status != JobStatus.RUNNING:
        known = registered | outputs  # of older versions a step may lie where attempts do (`storage.strays`)
        yield from (path for folder, path in lying if folder not in known and path not in known)

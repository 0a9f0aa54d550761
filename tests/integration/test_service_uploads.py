"""Uploaded files and their row, where the process or the database dies between them."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from service import database, uploads
from service.datasets import DatasetUpload
from service.errors import NotFoundError
from service.ids import new_id
from service.models import Checkpoint, Dataset, Job, Model, Tokenizer
from service.storage import Storage, attempt_dir, tokenizer_dir
from service.uploads import FilesGoneError

HOUR = 3_600


def send(bind: Engine, storage: Storage, tokenizer: str | None = None) -> str:
    with DatasetUpload(storage, "a.txt", 100) as upload:
        upload.write(b"text")
        return upload.store(bind, tokenizer=tokenizer, tenant="default").id


def folders(storage: Storage) -> list[str]:
    return sorted(path.name for path in storage.path("datasets").iterdir())


def rows(bind: Engine) -> list[str]:
    with database.transaction(bind) as session:
        return sorted(session.scalars(select(Dataset.id)))


def doubts(storage: Storage) -> list[str]:
    return storage.doubtful(older_than_seconds=-1)


def age(storage: Storage, seconds: float) -> None:
    for path in storage.path("doubtful").iterdir():
        os.utime(path, times=(time.time() - seconds,) * 2)


def lose_the_answer(monkeypatch: pytest.MonkeyPatch, *, committed: bool) -> None:
    commit = psycopg.Connection.commit

    def lost(connection: psycopg.Connection) -> None:
        if committed:
            commit(connection)
        connection.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(psycopg.Connection, "commit", lost)


def test_what_is_stored_or_refused_is_in_no_doubt(bind: Engine, storage: Storage) -> None:
    dataset = send(bind, storage)
    with pytest.raises(NotFoundError):
        send(bind, storage, tokenizer=new_id("tok"))
    assert folders(storage) == rows(bind) == [dataset]
    assert doubts(storage) == []


@pytest.mark.parametrize("committed", [True, False])
def test_a_lost_answer_to_commit_loses_no_file(
    bind: Engine, storage: Storage, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    with monkeypatch.context() as patch:
        lose_the_answer(patch, committed=committed)
        with pytest.raises(OperationalError):
            send(bind, storage)
    stored = rows(bind)
    assert len(stored) == committed
    assert len(folders(storage)) == len(doubts(storage)) == 1
    assert uploads.settle(bind, storage) == []  # the request may be at it still
    age(storage, HOUR + 60)
    removed = uploads.settle(bind, storage)
    assert len(removed) == 1 - committed
    assert folders(storage) == stored
    assert doubts(storage) == []


def test_where_no_commit_was_begun_nothing_is_kept(bind: Engine, storage: Storage) -> None:
    away = create_engine(bind.url.set(host="127.0.0.1", port=1, query={}))
    with pytest.raises(OperationalError):
        send(away, storage)
    assert folders(storage) == doubts(storage) == []


def begin(bind: Engine, storage: Storage, dataset: str) -> AbstractContextManager[Session]:
    """What has put the file in its place and waits before its row."""
    path = f"datasets/{dataset}/data.txt"
    with storage.upload(100) as upload:
        recording = uploads.recorded(bind, storage, f"datasets/{dataset}", lambda: upload.commit(path), 1, "default")
        recording.__enter__()
    return recording


def test_files_whose_process_died_before_their_row_go(bind: Engine, storage: Storage) -> None:
    dataset = new_id("ds")
    died = begin(bind, storage, dataset)
    assert folders(storage) == [dataset]
    age(storage, HOUR + 60)
    assert uploads.settle(bind, storage) == [f"datasets/{dataset}"]
    assert folders(storage) == []
    with pytest.raises(FilesGoneError):  # it did not die, but stood still: then no row comes
        died.__exit__(None, None, None)


def test_what_has_a_row_is_kept(bind: Engine, storage: Storage, job: Job) -> None:
    upload, converted, output, tokenizer = new_id("model"), new_id("model"), new_id("model"), new_id("tok")
    outputs, checkpoint = (f"{attempt_dir(job.id, 1)}/step-{step:08d}" for step in (2, 1))
    described: dict[str, Any] = {"name": "a", "status": "ready", "config": {}, "layout": "slimtune"}
    with database.transaction(bind) as session:
        session.add(Model(id=upload, kind="upload", path=f"models/{upload}", **described))
        session.add(Model(id=converted, kind="upload", path=f"models/{converted}/converted", **described))
        session.add(Model(id=output, kind="output", job_id=job.id, step=2, path=outputs, **described))
        session.add(Checkpoint(job_id=job.id, step=1, attempt=1, files=[], path=checkpoint))
        session.add(Tokenizer(id=tokenizer, name="a", source="upload", status="pending", path=tokenizer_dir(tokenizer)))
    kept = [f"models/{upload}", f"models/{converted}", outputs, checkpoint, f"tokenizers/{tokenizer}"]
    for folder in [*kept, "models/model_of_nobody"]:
        storage.make_folder(folder)
        storage.doubt(folder)
    age(storage, HOUR + 60)
    assert uploads.settle(bind, storage) == ["models/model_of_nobody"]
    assert [storage.path(folder).is_dir() for folder in kept] == [True] * len(kept)
    assert doubts(storage) == []


@pytest.mark.parametrize("kind", ["models", "tokenizers"])
def test_what_is_deleted_when_the_process_dies_goes_later(
    client: TestClient, bind: Engine, storage: Storage, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    row: Model | Tokenizer
    if kind == "models":
        name = new_id("model")
        row = Model(id=name, name="a", kind="upload", status="ready", config={}, layout="a", path=f"models/{name}")
    else:
        name = new_id("tok")
        row = Tokenizer(id=name, name="a", source="upload", status="pending", path=tokenizer_dir(name))
    with database.transaction(bind) as session:
        session.add(row)
    folder = storage.make_folder(f"{kind}/{name}")
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", lambda *_: None)  # the process died
        assert client.delete(f"/{kind}/{name}").status_code == 204
    assert folder.is_dir()
    age(storage, HOUR + 60)
    assert uploads.settle(bind, storage) == [f"{kind}/{name}"]
    assert not folder.exists()


def test_what_is_being_deleted_is_in_doubt_until_it_is_gone(
    client: TestClient, bind: Engine, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, other = send(bind, storage), send(bind, storage)
    assert client.delete(f"/datasets/{other}").status_code == 204
    assert folders(storage) == [dataset]
    assert doubts(storage) == []
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", lambda *_: None)  # the process died
        assert client.delete(f"/datasets/{dataset}").status_code == 204
    assert folders(storage) == [dataset]
    age(storage, HOUR + 60)
    assert uploads.settle(bind, storage) == [f"datasets/{dataset}"]
    assert folders(storage) == []

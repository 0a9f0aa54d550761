"""Uploaded files and their row, where the process or the database dies between them."""

from __future__ import annotations

import os
import time

import psycopg
import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from service import database, uploads
from service.datasets import DatasetUpload
from service.errors import NotFoundError
from service.ids import new_id
from service.models import Dataset
from service.storage import Storage

HOUR = 3_600


def send(bind: Engine, storage: Storage, tokenizer: str | None = None) -> str:
    with DatasetUpload(storage, "a.txt", 100) as upload:
        upload.write(b"text")
        return upload.store(bind, tokenizer=tokenizer).id


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


def test_files_whose_process_died_before_their_row_go(bind: Engine, storage: Storage) -> None:
    dataset = new_id("ds")
    path = storage.path(f"datasets/{dataset}/data.txt")
    with storage.upload(100) as upload:
        recording = uploads.recorded(bind, storage, f"datasets/{dataset}", lambda: upload.commit(path))
        recording.__enter__()  # and nobody leaves that block
    assert folders(storage) == [dataset]
    age(storage, HOUR + 60)
    assert uploads.settle(bind, storage) == [f"datasets/{dataset}"]
    assert folders(storage) == []


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

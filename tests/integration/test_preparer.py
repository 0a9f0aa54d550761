"""The preparer on a real database: what it makes, and what is left of it whenever it is killed."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from sqlalchemy import Engine, func, select, update

from service import database, datasets, preparations, tokenizations, tokenizers
from service.datasets import DatasetUpload
from service.models import Dataset, Tokenization, Tokenizer
from service.settings import Settings
from service.storage import Storage, tokens_dir
from service.tokenizers import TokenizerUpload
from slim_core.data.tokens import NO_SPACE
from tests.integration.stage import gone_within, open_stage, wait_for
from worker.preparer import Preparer, limit_seconds

FAKE = "tests.integration.fake_prepare"
LINES = [{"text": "one document"}, {"text": "another, longer document"}]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"heartbeat_seconds": 0.1, "self_kill_seconds": 20.0, "lease_seconds": 30.0})


def upload(bind: Engine, storage: Storage, filename: str, content: bytes) -> Dataset:
    with DatasetUpload(storage, filename, 2**30) as sink:
        sink.write(content)
        return sink.store(bind, tenant="default")


def jsonl(*lines: dict[str, Any]) -> bytes:
    return "\n".join(map(json.dumps, lines)).encode()


@pytest.fixture
def dataset(bind: Engine, storage: Storage) -> Dataset:
    return upload(bind, storage, "a.jsonl", jsonl(*LINES))


def row_of(bind: Engine, dataset_id: str, key: str = "bytes") -> Tokenization:
    with database.transaction(bind) as session:
        row = tokenizations.get(session, dataset_id, key)
    assert row is not None
    return row


def behave(storage: Storage, dataset: Dataset, behaviour: str | int) -> Path:
    folder = storage.path(f"datasets/{dataset.id}")
    (folder / "behaviour").write_text(str(behaviour))
    return folder


def due_now(bind: Engine) -> None:
    """As if the pause before the next try were over."""
    with database.transaction(bind) as session:
        session.execute(update(Tokenization).values(retry_at=None))


class Hanging:
    """A preparer in a thread, in the middle of its work."""

    def __init__(self, bind: Engine, settings: Settings, folder: Path) -> None:
        self.preparer = Preparer(bind, settings, "a worker", prepare=FAKE)
        self._thread = threading.Thread(target=self.preparer.step)
        self._thread.start()
        found = folder / "pid"
        self.pid = wait_for("the program", lambda: int(found.read_text()) if found.exists() else None)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def hanging(bind: Engine, settings: Settings, storage: Storage, dataset: Dataset) -> Iterator[Hanging]:
    hanging = Hanging(bind, settings, behave(storage, dataset, "hang"))
    yield hanging
    hanging.preparer.stop()
    hanging.join()


def test_tokens_are_made_and_counted(bind: Engine, settings: Settings, storage: Storage, dataset: Dataset) -> None:
    preparer = Preparer(bind, settings, "a worker")
    assert preparer.step()
    row = row_of(bind, dataset.id)
    assert (row.status, row.attempt, row.lease_until, row.error) == ("ready", 1, None, None)
    assert row.counts is not None
    assert (row.counts["documents"], row.counts["tokens"]) == (dataset.documents, dataset.tokens)
    assert row.counts["longest"] == dataset.longest_document_tokens
    assert storage.path(f"{tokens_dir(dataset.id, 'bytes')}/tokens.bin").stat().st_size == 2 * row.counts["tokens"]
    assert not preparer.step()


def test_a_parquet_is_known_once_it_was_read(bind: Engine, settings: Settings, storage: Storage) -> None:
    file = io.BytesIO()
    rows = [{"prompt": "a", "completion": "bc"}] * 3
    parquet.write_table(pa.Table.from_pylist(rows), file)
    good = upload(bind, storage, "a.parquet", file.getvalue())
    assert (good.documents, good.kind) == (None, None)
    broken = upload(bind, storage, "b.parquet.gz", gzip.compress(b"PAR1" + b"x" * 100 + b"PAR1"))
    preparer = Preparer(bind, settings, "a worker")
    assert preparer.step()
    assert preparer.step()
    with database.transaction(bind) as session:
        found = datasets.get(session, good.id)
    assert (found.documents, found.kind, found.tokenizations[0].status) == (3, "prompt_completion", "ready")
    row = row_of(bind, broken.id)
    assert (row.status, row.error and row.error["code"]) == ("failed", "dataset_invalid")


def test_broken_rows_come_back_with_their_numbers(bind: Engine, settings: Settings, storage: Storage) -> None:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([{"text": "fine"}, {"text": None}, {"text": "fine"}]), file)
    dataset = upload(bind, storage, "a.parquet", file.getvalue())
    Preparer(bind, settings, "a worker").step()
    error = row_of(bind, dataset.id).error
    assert error is not None
    assert ([problem["line"] for problem in error["problems"]], error["total_problems"]) == ([2], 1)
    assert error["hint"]


def test_a_killed_program_is_tried_again_and_given_up_in_the_end(
    bind: Engine, settings: Settings, storage: Storage, dataset: Dataset
) -> None:
    folder = behave(storage, dataset, "hang")
    for failures in range(1, preparations.MAX_FAILURES + 1):
        hanging = Hanging(bind, settings, folder)
        os.kill(hanging.pid, signal.SIGKILL)
        hanging.join()
        (folder / "pid").unlink()
        row = row_of(bind, dataset.id)
        assert (row.failures, row.error and row.error["code"]) == (failures, "preparation_crashed")
        assert (row.status == "pending") == (failures < preparations.MAX_FAILURES) == (row.retry_at is not None)
        due_now(bind)
    assert row.status == "failed"
    assert not Preparer(bind, settings, "a worker").step()
    with database.transaction(bind) as session:
        assert datasets.tokenize(session, dataset.id, "bytes").status == "pending"  # on request
    assert Preparer(bind, settings, "a worker").step()
    assert row_of(bind, dataset.id).status == "ready"


def test_the_time_allowed_follows_the_text(tmp_path: Path) -> None:
    def allowed(name: str, size: int) -> float:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
        return limit_seconds(tmp_path / name, most_seconds=6 * 3_600)

    assert allowed("small.jsonl", 100) == pytest.approx(600, abs=1)
    assert allowed("large.jsonl", 20_000_000) == 600 + 1_000
    assert allowed("packed.jsonl.zst", 78_125) == allowed("packed.parquet", 78_125) == 600 + 1_000
    assert allowed("huge.txt", 1 << 33) == 6 * 3_600


def test_what_takes_too_long_has_failed(
    bind: Engine, settings: Settings, storage: Storage, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(storage, dataset, "hang")
    monkeypatch.setattr("worker.preparer.LEAST_SECONDS", 0.5)
    assert Preparer(bind, settings, "a worker", prepare=FAKE).step()
    row = row_of(bind, dataset.id)
    assert (row.status, row.error and row.error["code"]) == ("failed", "preparation_timeout")


def test_what_computes_past_its_own_limit_has_failed(
    bind: Engine, settings: Settings, storage: Storage, dataset: Dataset
) -> None:
    hanging = Hanging(bind, settings, behave(storage, dataset, "hang"))
    os.kill(hanging.pid, signal.SIGXCPU)
    hanging.join()
    row = row_of(bind, dataset.id)
    assert (row.status, row.error and row.error["code"]) == ("failed", "preparation_timeout")


def test_a_preparer_that_lost_its_lease_ends_quietly(
    bind: Engine, settings: Settings, dataset: Dataset, hanging: Hanging
) -> None:
    with database.transaction(bind) as session:
        session.execute(update(Tokenization).values(lease_until=row_of(bind, dataset.id).created_at))
        # Its renewals would bring the lease back: it is stopped, as a suspended machine is, until another one has it.
        other = preparations.claim(session, "another worker", settings.lease_seconds)
    assert other is not None
    hanging.join()
    assert gone_within(hanging.pid, 2)
    row = row_of(bind, dataset.id)
    assert (row.status, row.attempt, row.worker) == ("running", 2, "another worker")


def test_an_expired_lease_is_taken_over(bind: Engine, settings: Settings, dataset: Dataset) -> None:
    with database.transaction(bind) as session:
        assert preparations.claim(session, "a worker that is gone", 0.0) is not None
    assert Preparer(bind, settings, "another worker").step()
    row = row_of(bind, dataset.id)
    assert (row.status, row.attempt, row.failures) == ("ready", 2, 1)


def test_what_kills_its_workers_is_given_up(bind: Engine, dataset: Dataset) -> None:
    with database.transaction(bind) as session:
        for _ in range(preparations.MAX_FAILURES):
            assert preparations.claim(session, "a worker that is gone", 0.0) is not None
        assert preparations.claim(session, "another worker", 0.0) is None
    row = row_of(bind, dataset.id)
    assert (row.status, row.error and row.error["code"]) == ("failed", "worker_lost")


def test_a_full_disk_is_waited_out(bind: Engine, settings: Settings, storage: Storage, dataset: Dataset) -> None:
    behave(storage, dataset, NO_SPACE)
    pauses = []
    for _ in range(3):
        assert Preparer(bind, settings, "a worker", prepare=FAKE).step()
        row = row_of(bind, dataset.id)
        assert (row.status, row.failures, row.error and row.error["code"]) == ("pending", 0, "disk_full")
        with database.transaction(bind) as session:
            left: Any = session.scalar(select(func.extract("epoch", Tokenization.retry_at - func.clock_timestamp())))
        pauses.append(round(float(left), -1))
        assert not Preparer(bind, settings, "a worker").step()
        due_now(bind)
    assert pauses == [30, 60, 120]
    assert Preparer(bind, settings, "a worker").step()
    assert (row_of(bind, dataset.id).status, row_of(bind, dataset.id).error) == ("ready", None)


def test_a_worker_that_stops_gives_its_work_back(bind: Engine, dataset: Dataset, hanging: Hanging) -> None:
    hanging.preparer.stop()
    hanging.join()
    assert gone_within(hanging.pid, 2)
    row = row_of(bind, dataset.id)
    assert (row.status, row.failures, row.retry_at) == ("pending", 0, None)


def test_a_deleted_dataset_takes_its_preparation_with_it(
    bind: Engine, storage: Storage, dataset: Dataset, hanging: Hanging
) -> None:
    with database.transaction(bind) as session:
        folder = datasets.delete(session, dataset.id)
    storage.remove(folder)
    hanging.join()
    assert gone_within(hanging.pid, 2)
    assert not storage.path(folder).exists()


def test_several_preparers_never_do_the_same_work(bind: Engine, settings: Settings, storage: Storage) -> None:
    ids = [upload(bind, storage, "a.txt", b"text").id for _ in range(6)]
    threads = [threading.Thread(target=_until_idle, args=(bind, settings)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [(row_of(bind, i).status, row_of(bind, i).attempt) for i in ids] == [("ready", 1)] * 6


def test_a_tokenizer_is_trained_checked_and_used(bind: Engine, settings: Settings, storage: Storage) -> None:
    dataset = upload(bind, storage, "a.jsonl", jsonl(*[{"text": f"the word number {n}"} for n in range(50)]))
    preparer = Preparer(bind, settings, "a worker")
    with database.transaction(bind) as session:
        trained = tokenizers.train(session, datasets.get(session, dataset.id, keep=True), 300)
    assert preparer.step()  # before the dataset's own tokens
    with database.transaction(bind) as session:
        row = tokenizers.get(session, trained.id)
        assert (row.status, row.vocab_size, len(row.key or "")) == ("ready", 300, 16)
        assert row.bytes == sum(path.stat().st_size for path in storage.path(row.path).iterdir())
    with TokenizerUpload(storage) as sink:
        for name in tokenizers.FILES:
            if (path := storage.path(f"{row.path}/{name}")).exists():
                sink.begin(name)
                sink.write(path.read_bytes())
        uploaded = sink.store(bind, tenant="default")
    _until_idle(bind, settings)
    with database.transaction(bind) as session:
        reference = tokenizers.resolve(session, uploaded.id)
        assert reference.key == row.key  # the same tokenizer
        datasets.tokenize(session, dataset.id, uploaded.id)
    assert preparer.step()
    counts = row_of(bind, dataset.id, reference.key).counts
    assert counts is not None
    assert counts["tokens"] < (dataset.tokens or 0) / 2
    assert counts["vocab_size"] == 300


def test_a_tokenizer_that_the_library_refuses_has_failed(bind: Engine, settings: Settings, storage: Storage) -> None:
    with TokenizerUpload(storage) as sink:
        sink.begin("tokenizer.json")
        sink.write(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a x"]}}).encode())
        row = sink.store(bind, tenant="default")
    assert Preparer(bind, settings, "a worker").step()
    with database.transaction(bind) as session:
        found = session.get_one(Tokenizer, row.id)
    assert (found.status, found.error and found.error["code"]) == ("failed", "tokenizer_invalid")


def test_a_database_that_is_away_ends_no_preparation(bind: Engine, settings: Settings, dataset: Dataset) -> None:
    """The end is recorded when it is back: the first write fails as a restart makes it fail."""
    preparer = Preparer(bind, settings, "a worker")

    def interrupted(*arguments: Any) -> dict[str, Any]:
        result = Preparer._tokenise(preparer, *arguments)
        with bind.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        return result

    preparer._tokenise = interrupted  # type: ignore[assignment,method-assign]
    assert preparer.step()
    assert row_of(bind, dataset.id).status == "ready"


def test_a_worker_prepares_beside_its_jobs_and_lets_go_when_it_ends(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        storage = Storage(stage.settings.data_dir)
        first = upload(stage.bind, storage, "a.jsonl", jsonl(*LINES))
        worker = stage.worker()
        wait_for("its tokens", lambda: row_of(stage.bind, first.id).status == "ready", 60)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        assert row_of(stage.bind, first.id).attempt == 1


def _until_idle(bind: Engine, settings: Settings) -> None:
    preparer = Preparer(bind, settings, "a worker")
    while preparer.step():
        pass

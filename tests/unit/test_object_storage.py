"""Files in an object store, on obstore's own backends: what exists when, what a host keeps, what a failure leaves."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore import exceptions
from obstore.store import LocalStore

from service import object_storage, object_store, patience
from service.errors import FilesDamagedError, StorageDeniedError, StorageUnavailableError
from service.object_storage import ObjectStorage
from service.object_store import ObjectStore
from service.patience import Patience
from service.storage_cache import Cache
from worker.messages import Checkpoint
from worker.publisher import RemotePublisher

STEP = "jobs/job_1/checkpoints/attempt-0001/step-00000001"
FILES = {"model.safetensors": b"weights" * 1000, "adapter/config.json": b"{}"}


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def host(tmp_path: Path, bucket: Path) -> Callable[..., ObjectStorage]:
    def make(name: str, cache_bytes: int = 1 << 30) -> ObjectStorage:
        return ObjectStorage(tmp_path / name, ObjectStore(LocalStore(bucket, mkdir=True)), cache_bytes)

    return make


def write(storage: ObjectStorage, relative: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = storage.path(f"{relative}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def upload(storage: ObjectStorage, relative: str, data: bytes) -> None:
    with storage.upload(len(data)) as sink:
        sink.write(data)
        sink.commit(relative)


def hold(storage: ObjectStorage, relative: str) -> Path:
    with ExitStack() as held:
        return storage.hold(relative, held)


def test_what_one_host_stores_another_reads(host: Callable[..., ObjectStorage]) -> None:
    a, b = host("a"), host("b")
    upload(a, "datasets/ds_1/data.txt", b"text")
    with a.folder_upload(100) as sink:
        sink.begin("model.gguf", 100)
        sink.write(b"GGUF")
        sink.commit("models/model_1")
    write(a, STEP, FILES)
    a.publish(STEP)
    assert read(a.root).keys() == {f"{STEP}/{name}" for name in FILES} | {f"cache/{STEP.replace('/', '%2F')}"}
    assert hold(b, "datasets/ds_1/data.txt").read_bytes() == b"text"
    assert hold(b, "models/model_1/model.gguf").read_bytes() == b"GGUF"  # one file of a folder
    assert read(hold(b, STEP)) == FILES
    assert b.stat(f"{STEP}/model.safetensors").st_size == 7000
    assert b"".join(b.blocks(f"{STEP}/adapter/config.json")) == b"{}"
    assert [b.exists(path) for path in ("datasets/ds_1", STEP, "datasets/ds_2")] == [True, True, False]
    assert b.names_in("datasets") == ["ds_1"]
    for missing in ("datasets/ds_2", f"{STEP}/other"):
        with pytest.raises(FileNotFoundError):
            hold(b, missing)
    assert b.names_in("nothing") == []


def test_a_stream_begins_anywhere(host: Callable[..., ObjectStorage]) -> None:
    storage = host("a")
    upload(storage, "datasets/ds_1/data.txt", b"0123456789")

    async def tail() -> bytes:
        return b"".join([block async for block in storage.stream("datasets/ds_1/data.txt")(7)])

    assert asyncio.run(tail()) == b"789"


def test_a_stream_that_breaks_off_goes_on(host: Callable[..., ObjectStorage], monkeypatch: pytest.MonkeyPatch) -> None:
    storage = host("a")
    upload(storage, "datasets/ds_1/data.txt", b"0123456789")
    opened: list[int] = []

    class Broken:
        async def stream(self, **_: int) -> AsyncIterator[bytes]:
            yield b"01234567"[opened[-1] : opened[-1] + 3]
            raise exceptions.GenericError("broken off")

    async def get(_backend: Any, _key: str, options: dict[str, Any]) -> Broken:
        opened.append(options["range"]["offset"])
        return Broken()

    monkeypatch.setattr(obstore, "get_async", get)

    async def first(count: int) -> bytes:
        blocks = storage.stream("datasets/ds_1/data.txt")(0)
        return b"".join([await anext(blocks) for _ in range(count)])

    assert asyncio.run(first(2)) == b"012345"
    assert opened == [0, 3]


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, method: str, when: Callable[..., bool], error: Exception
) -> Iterator[None]:
    real = getattr(ObjectStore, method)

    def broken(self: ObjectStore, *arguments: Any) -> Any:
        if when(*arguments):
            raise error
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, method, broken)
        yield


def test_half_a_publication_does_not_exist_and_can_be_finished(
    host: Callable[..., ObjectStorage], bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host("a"), host("b")
    write(a, STEP, FILES)
    away = StorageUnavailableError("away")
    with (
        failing(monkeypatch, "put_file", lambda key, *_: key.endswith("safetensors"), away),
        pytest.raises(StorageUnavailableError),
    ):
        a.publish(STEP)
    assert not b.exists(STEP)
    assert (bucket / STEP / "adapter/config.json").exists()
    with pytest.raises(FileNotFoundError):
        hold(b, STEP)
    a.publish(STEP)
    assert read(hold(b, STEP)) == FILES


def test_what_is_not_there_is_not_published_as_empty(host: Callable[..., ObjectStorage]) -> None:
    a = host("a")
    with pytest.raises(FileNotFoundError):
        a.publish(STEP)
    assert not a.exists(STEP)


def test_a_removal_that_stops_halfway_leaves_nothing_that_exists(
    host: Callable[..., ObjectStorage], bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = host("a")
    write(storage, STEP, FILES)
    storage.publish(STEP)
    away = StorageUnavailableError("away")
    with (
        failing(monkeypatch, "delete", lambda keys: STEP in keys[0] and "manifests" not in keys[0], away),
        pytest.raises(StorageUnavailableError),
    ):
        storage.remove(STEP)
    assert not storage.exists(STEP)
    storage.remove(STEP)
    assert read(bucket) == read(storage.root) == {}


def test_bytes_that_are_not_those_of_the_manifest_are_refused(host: Callable[..., ObjectStorage], bucket: Path) -> None:
    storage = host("a")
    upload(storage, "datasets/ds_1/data.txt", b"text")
    (bucket / "datasets/ds_1/data.txt").write_bytes(b"tExt")
    with pytest.raises(FilesDamagedError, match="SHA-256"):
        hold(storage, "datasets/ds_1/data.txt")
    assert read(storage.root) == {}
    (bucket / "datasets/ds_1/data.txt").unlink()
    with pytest.raises(FilesDamagedError, match="missing"):
        hold(storage, "datasets/ds_1/data.txt")


def test_two_who_want_the_same_fetch_it_once(
    host: Callable[..., ObjectStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host("b"), host("b")  # two processes of one host
    upload(host("a"), "datasets/ds_1/data.txt", b"text")
    fetched: list[str] = []
    second_waits, real = threading.Event(), ObjectStore.blocks

    def counted(self: ObjectStore, key: str) -> Iterator[bytes]:
        fetched.append(key)
        assert second_waits.wait(10)
        return real(self, key)

    monkeypatch.setattr(ObjectStore, "blocks", counted)
    first = threading.Thread(target=hold, args=(a, "datasets/ds_1/data.txt"))
    first.start()
    beats = iter([None, None])

    def beat() -> None:
        if next(beats, second_waits) is second_waits:
            second_waits.set()

    while not fetched:
        assert first.is_alive()
    with ExitStack() as held:
        assert b.hold("datasets/ds_1/data.txt", held, Patience(beat=beat)).read_bytes() == b"text"
    first.join()
    assert fetched == ["datasets/ds_1/data.txt"]


def test_two_who_find_nothing_at_the_same_moment_fetch_it_once(
    host: Callable[..., ObjectStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(host("a"), "datasets/ds_1/data.txt", b"text")
    fetched: list[str] = []
    real_blocks, real_lock, both = ObjectStore.blocks, Cache._lock, threading.Barrier(2, timeout=10)
    looked = threading.local()

    def blocks(self: ObjectStore, key: str) -> Iterator[bytes]:
        fetched.append(key)
        return real_blocks(self, key)

    def lock(self: Cache, *arguments: Any) -> Any:
        found = real_lock(self, *arguments)
        if not getattr(looked, "once", False):
            looked.once = True
            both.wait()
        return found

    monkeypatch.setattr(ObjectStore, "blocks", blocks)
    monkeypatch.setattr(Cache, "_lock", lock)
    with ThreadPoolExecutor(2) as threads:
        for path in threads.map(lambda _: hold(host("b"), "datasets/ds_1/data.txt"), range(2)):
            assert path.read_bytes() == b"text"
    assert fetched == ["datasets/ds_1/data.txt"]


def test_the_least_recently_used_goes_unless_somebody_reads_it(host: Callable[..., ObjectStorage]) -> None:
    a, b = host("a"), host("b", cache_bytes=250)
    names = [f"datasets/ds_{number}/data.txt" for number in range(4)]
    for name in names:
        upload(a, name, b"x" * 100)
    with ExitStack() as held:
        b.hold(names[0], held)
        hold(b, names[1])
        hold(b, names[2])
        assert [b.path(name).exists() for name in names] == [True, False, True, False]
    hold(b, names[3])
    assert [b.path(name).exists() for name in names] == [False, False, True, True]


def test_what_was_not_published_is_no_copy_and_stays(host: Callable[..., ObjectStorage]) -> None:
    storage = host("a", cache_bytes=0)
    write(storage, STEP, FILES)
    later = STEP[:-1] + "2"
    write(storage, later, FILES)
    storage.publish(later)
    assert [storage.path(path).exists() for path in (STEP, later)] == [True, False]


def test_copies_of_what_was_removed_elsewhere_go(
    host: Callable[..., ObjectStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host("a"), host("b")
    for name in ("datasets/ds_1/data.txt", "datasets/ds_2/data.txt"):
        upload(a, name, b"text")
        hold(b, name)
    a.remove("datasets/ds_1")
    monkeypatch.setattr(object_storage, "TIDY_SECONDS", 0.0)
    b.tidy()
    assert [b.path(f"datasets/ds_{n}/data.txt").exists() for n in (1, 2)] == [False, True]


def test_logs_of_trainers_go_in_the_end(host: Callable[..., ObjectStorage]) -> None:
    a = host("a")
    logs = [a.path(f"jobs/job_{index}/attempt-1.stderr") for index in range(2)]
    for log in logs:
        log.parent.mkdir(parents=True)
        log.write_text("Traceback")
    old = time.time() - object_storage.LOG_SECONDS - 60
    os.utime(logs[0], (old, old))
    a.tidy()
    assert [log.exists() for log in logs] == [False, True], "no deletion of the job reaches this host"
    assert not logs[0].parent.exists()


def test_strays_go_on_this_host_and_in_the_store(host: Callable[..., ObjectStorage], bucket: Path) -> None:
    a, b = host("a"), host("b")
    stray, other = STEP[:-1] + "2", STEP.replace("0001/", "0002/")
    for path in (STEP, stray, other):
        write(a, path, FILES)
        a.publish(path)
    hold(b, stray)
    (bucket / f"manifests/{other}.json").unlink()  # as a crash leaves it
    b.remove_strays("jobs/job_1/checkpoints", {STEP})
    assert not b.path(stray).exists()
    assert {path.split("/step")[0] + "/step" + path.split("/step")[1][:9] for path in read(bucket)} == {
        STEP,
        f"manifests/{STEP}",
    }


def test_doubts_are_everybodys(host: Callable[..., ObjectStorage]) -> None:
    a, b = host("a"), host("b")
    a.doubt("datasets/ds_1")
    assert (b.doubtful(-60), b.doubtful(60)) == (["datasets/ds_1"], [])
    b.remove("datasets/ds_1")  # nothing is there yet, and may come
    assert b.doubtful(-60) == ["datasets/ds_1"]
    b.trust("datasets/ds_1")
    assert a.doubtful(-60) == []


def test_one_file_of_a_folder_goes_with_the_folder_s_manifest(host: Callable[..., ObjectStorage]) -> None:
    storage = host("a")
    write(storage, "models/model_1", {"model.gguf": b"GGUF"})
    storage.publish("models/model_1")
    write(storage, "models/model_1/converted", {"config.json": b"{}"})
    storage.publish("models/model_1/converted")
    storage.remove_file("models/model_1/model.gguf")
    other = host("b")
    with pytest.raises(FileNotFoundError):
        hold(other, "models/model_1/model.gguf")
    assert read(hold(other, "models/model_1/converted")) == {"config.json": b"{}"}


def test_a_large_file_goes_in_parts_and_beats(
    host: Callable[..., ObjectStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 6 << 20)
    storage, data = host("a"), bytes(13 << 20)
    write(storage, STEP, {"model.safetensors": data})
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    records = [{"name": "model.safetensors", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
    storage.publish(STEP, Patience(beat=beat), records)
    assert beats >= 6  # each of three requests, and each of three parts
    assert hold(host("b"), STEP).joinpath("model.safetensors").read_bytes() == data


def test_patience_tries_again_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    failures = [StorageUnavailableError("a"), StorageDeniedError("b")]
    told: list[str] = []

    def call() -> str:
        if failures:
            raise failures.pop(0)
        return "done"

    patient = Patience(60.0, trouble=lambda error: told.append(error.code))
    assert patient.run(call) == "done"
    assert told == ["storage_unavailable", "storage_denied"]
    failures.append(StorageUnavailableError("c"))
    with pytest.raises(StorageUnavailableError):
        Patience(0.0).run(call)


def test_a_full_disk_gives_up_what_nobody_reads(
    host: Callable[..., ObjectStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host("a"), host("b")
    names = [f"datasets/ds_{number}/data.txt" for number in range(3)]
    for name in names:
        upload(a, name, b"text")
    real = ObjectStore.blocks

    def blocks(self: ObjectStore, key: str) -> Iterator[bytes]:
        if b.path(names[1]).exists():
            raise OSError(errno.ENOSPC, "full")
        return real(self, key)

    with ExitStack() as held:
        b.hold(names[0], held)
        hold(b, names[1])
        monkeypatch.setattr(ObjectStore, "blocks", blocks)
        hold(b, names[2])
        assert [b.path(name).exists() for name in names] == [True, False, True]


def checkpoint(step: int, validation_loss: float) -> Checkpoint:
    return Checkpoint(step, f"step-{step:08d}", [{"name": "a", "bytes": 1, "sha256": "0" * 64}], validation_loss)


def test_checkpoints_that_wait_do_not_fill_the_disk(
    host: Callable[..., ObjectStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, away = host("a"), threading.Event()
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    real = ObjectStore.put_file

    def put_file(self: ObjectStore, key: str, *arguments: Any) -> None:
        if not away.is_set():
            raise StorageUnavailableError("away")
        real(self, key, *arguments)

    monkeypatch.setattr(ObjectStore, "put_file", put_file)
    publisher = RemotePublisher(storage, 60.0)
    losses = {1: 5.0, 2: 1.0, 3: 5.0, 4: 5.0, 5: 5.0, 6: 5.0, 7: 5.0}
    for step, loss in losses.items():
        write(storage, f"{STEP[:-1]}{step}", {"a": b"x"})
        publisher.submit(checkpoint(step, loss), f"{STEP[:-1]}{step}")
        while step == 1 and not publisher.troubles():  # it is being sent
            assert publisher.is_busy
    assert [storage.path(f"{STEP[:-1]}{step}").exists() for step in losses] == [
        step in (1, 2, 5, 6, 7) for step in losses
    ]
    away.set()
    published: list[int] = []
    while publisher.is_busy:
        published += [each.step for each in publisher.published()]
    publisher.close()
    assert published == [1, 2, 5, 6, 7]

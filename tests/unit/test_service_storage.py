from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from service.errors import StorageFullError, UploadTooLargeError
from service.filenames import clean_filename
from service.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def files_below(storage: Storage) -> list[str]:
    return sorted(str(path.relative_to(storage.root)) for path in storage.root.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", ["../x", "datasets/../../x", "/etc/passwd", "", ".", "datasets/.."])
def test_a_path_that_leads_out_is_refused(storage: Storage, path: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        storage.path(path)


def test_a_committed_upload_is_whole_and_hashed(storage: Storage) -> None:
    with storage.upload(100) as upload:
        upload.write(b"one ")
        upload.write(b"two")
        assert upload.sha256 == hashlib.sha256(b"one two").hexdigest()
        upload.commit("datasets/a/data.txt")
    assert files_below(storage) == ["datasets/a/data.txt"]
    assert storage.path("datasets/a/data.txt").read_bytes() == b"one two"


def test_a_commit_syncs_the_bytes_before_the_name_and_then_the_name(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = storage.path("datasets/a/data.txt")
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name[:6], destination.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with storage.upload(100) as upload:
        upload.write(b"text")
        upload.commit("datasets/a/data.txt")
    assert synced == [("upload", False), ("a", True), ("datase", True)]


def test_an_upload_that_fails_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(UploadTooLargeError) as caught, storage.upload(10) as upload:
        upload.write(b"0123456789")
        assert files_below(storage)  # it is being written
        upload.write(b"!")
    assert caught.value.fields == {"max_upload_bytes": 10}
    assert files_below(storage) == []


@pytest.mark.parametrize("size", [100, 2**20])  # found out by the flush of the commit, or while writing
def test_a_full_disk_has_its_own_error_and_leaves_nothing(storage: Storage, size: int) -> None:
    with pytest.raises(StorageFullError), storage.upload(2**30) as upload:
        upload._file.close()
        upload._file = Path("/dev/full").open("wb")  # the kernel's ENOSPC
        upload.write(b"x" * size)
        upload.commit("datasets/a/data.txt")
    assert files_below(storage) == []


def test_removing_takes_the_folder_and_missing_is_fine(storage: Storage) -> None:
    storage.path("jobs/j/checkpoints/step-1").mkdir(parents=True)
    storage.path("jobs/j/checkpoints/step-1/model").write_text("x")
    storage.remove("jobs/j/checkpoints/step-1")
    storage.remove("jobs/j/checkpoints/step-1")
    assert not storage.path("jobs/j/checkpoints/step-1").exists()
    assert storage.path("jobs/j/checkpoints").exists()
    assert list(storage.path("tmp").iterdir()) == []


def test_what_is_written_into_a_folder_while_it_is_removed_is_left_to_the_sweeper(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a trainer that outlives its attempt, say: the next attempt must start all the same."""
    storage.path("jobs/j/checkpoints/attempt-0001").mkdir(parents=True)
    rmdir = os.rmdir

    def write_and_rmdir(path: str, *, dir_fd: int | None = None) -> None:
        for folder in storage.path("tmp").iterdir():
            (folder / "late").touch()
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", write_and_rmdir)
    storage.remove("jobs/j/checkpoints/attempt-0001")
    assert [Path(name).name for name in files_below(storage)] == ["late"]
    assert not storage.path("jobs/j/checkpoints/attempt-0001").exists()


def test_only_old_temporaries_are_cleaned(storage: Storage) -> None:
    assert storage.clean_temporary() == 0
    temporary = storage.path("tmp")
    (temporary / "removed-old").mkdir(parents=True)
    (temporary / "removed-old" / "model").write_text("x")
    for name in ("upload-old", "upload-new"):
        (temporary / name).write_text("x")
    for name in ("removed-old", "upload-old"):
        os.utime(temporary / name, (1, 1))
    assert storage.clean_temporary(3_600) == 2
    assert files_below(storage) == ["tmp/upload-new"]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("notes.txt", "notes.txt"),
        ("../../etc/passwd.txt", "passwd.txt"),
        ("C:\\docs\\notes.txt", "notes.txt"),
        ("a\r\nSet-Cookie: x=1.txt", "aSet-Cookie: x=1.txt"),
        ("nul\0byte.txt", "nul\ufffdbyte.txt"),
        ("half \ud800 pair.jsonl", "half \ufffd\ufffd\ufffd pair.jsonl"),
        ("x" * 4096 + ".jsonl", "x" * 194 + ".jsonl"),
        ("y." + "x" * 4096, "y." + "x" * 198),
        ("", "unnamed"),
        ("/", "unnamed"),
    ],
)
def test_a_clients_file_name_becomes_harmless(sent: str, kept: str) -> None:
    assert clean_filename(sent) == kept


def test_a_folder_appears_with_all_its_files_or_not_at_all(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UploadTooLargeError) as caught, storage.folder_upload(10) as upload:
        upload.begin("a", 5)
        upload.write(b"12345")
        upload.begin("b", 100)
        upload.write(b"123456")
    assert caught.value.fields["max_upload_bytes"] == 10
    with pytest.raises(UploadTooLargeError) as caught, storage.folder_upload(10) as upload:
        upload.begin("a", 5)
        upload.write(b"123456")
    assert caught.value.fields["max_upload_bytes"] == 5
    assert files_below(storage) == []
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        assert not storage.path("models/m").exists() or set(synced) >= {"a", "b"}
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name[:6])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with storage.folder_upload(100) as upload:
        for name in ("a", "b"):
            upload.begin(name, 50)
            upload.write(name.encode() * 3)
        assert [file["bytes"] for file in upload.files] == [3, 3]
        upload.commit("models/m")
    assert synced == ["a", "b", "upload", "models", storage.root.name[:6]]
    assert files_below(storage) == ["models/m/a", "models/m/b"]
    assert upload.files[1]["sha256"] == hashlib.sha256(b"bbb").hexdigest()
    assert list(storage.path("tmp").iterdir()) == []

"""Files below the data folder: uploads, checkpoints, and how both come and go without leaving halves behind.

    datasets/<dataset_id>/data.<txt|jsonl|parquet>[.gz|.zst]
    datasets/<dataset_id>/tokens-<tokenizer key>/...
    tokenizers/<tokenizer_id>/tokenizer.json, tokenizer_config.json
    models/<model_id>/...                       uploaded; of a .gguf, the folder converted/ is the model
    jobs/<job_id>/checkpoints/attempt-0002/step-00000040/...
    jobs/<job_id>/attempt-<n>.stderr
    jobs/<job_id>/results/metrics-<sha256>.csv  of a job that is over, once it was asked for
    parts/<upload_id>/<part_id>                 of files that come in parts, until they are put together
    tmp/                                        uploads on their way, folders being deleted
    doubtful/<path, quoted>                     an empty file for each folder whose row comes or goes just now
    hold                                        an empty file, made by an operator, while a backup copies all this

Names come from the server only. A path in the database is relative, so that the folder can move.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote

from service.errors import StorageFullError, UploadTooLargeError

HOLD_SECONDS = 86_400.0
"""Age from which a hold is taken for one that was forgotten."""
_COMPRESSION_SUFFIXES = {None: "", "gzip": ".gz", "zstd": ".zst"}


def dataset_dir(dataset_id: str) -> str:
    """Relative path of the folder of a dataset's file and of what is made of it."""
    return f"datasets/{dataset_id}"


def dataset_path(dataset_id: str, file_format: str, compression: str | None = None) -> str:
    """Relative path of a dataset's file."""
    return f"{dataset_dir(dataset_id)}/data.{file_format}{_COMPRESSION_SUFFIXES[compression]}"


def tokens_dir(dataset_id: str, tokenizer_key: str) -> str:
    """Relative path of the folder with a dataset's tokens under one tokenizer."""
    return f"{dataset_dir(dataset_id)}/tokens-{tokenizer_key}"


def tokenizer_dir(tokenizer_id: str) -> str:
    """Relative path of an uploaded or trained tokenizer's folder."""
    return f"tokenizers/{tokenizer_id}"


def job_dir(job_id: str) -> str:
    """Relative path of the folder of all that a job leaves: checkpoints, logs, results."""
    return f"jobs/{job_id}"


def checkpoints_dir(job_id: str) -> str:
    """Relative path of the folder below which all checkpoints of a job lie."""
    return f"jobs/{job_id}/checkpoints"


def attempt_dir(job_id: str, attempt: int) -> str:
    """Relative path of the folder that one attempt writes its checkpoints to. One for each: a trainer that outlives
    its attempt, which nothing can tell it on a machine that is cut off, must not touch those of the next.
    """
    return f"{checkpoints_dir(job_id)}/attempt-{attempt:04d}"


def stderr_path(job_id: str, attempt: int) -> str:
    """Relative path of the log of one attempt's trainer."""
    return f"jobs/{job_id}/attempt-{attempt}.stderr"


def model_path(model_id: str) -> str:
    """Relative path of the folder of an uploaded model's files, as they came."""
    return f"models/{model_id}"


def converted_path(model_id: str) -> str:
    """Relative path of the folder that an uploaded .gguf is converted into."""
    return f"{model_path(model_id)}/converted"


def results_dir(job_id: str) -> str:
    """Relative path of the folder of what is made of a finished job's rows."""
    return f"jobs/{job_id}/results"


PARTS = "parts"


def parts_dir(upload_id: str) -> str:
    """Relative path of the folder of an upload's parts."""
    return f"{PARTS}/{upload_id}"


class Storage:
    """The data folder. Creates what it needs; refuses any path that leads out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._tmp = self.root / "tmp"
        self._doubts = self.root / "doubtful"
        self._hold = self.root / "hold"

    def path(self, relative: str) -> Path:
        """The absolute path. Raises ValueError if it would lie outside the data folder."""
        absolute = Path(os.path.normpath(self.root / relative))
        if self.root not in absolute.parents:
            raise ValueError(f"path: {relative!r} leads out of the data folder")
        return absolute

    def upload(self, limit_bytes: int) -> Upload:
        """A file to write an upload into; use it as a context manager. Raises StorageFullError."""
        try:
            self._tmp.mkdir(parents=True, exist_ok=True)
            return Upload(self._tmp / f"upload-{secrets.token_hex(8)}", limit_bytes)
        except OSError as error:
            raise _translated(error) from error

    def folder_upload(self, limit_bytes: int) -> FolderUpload:
        """A folder to write an upload of several files into; use it as a context manager. Raises StorageFullError."""
        try:
            self._tmp.mkdir(parents=True, exist_ok=True)
            return FolderUpload(self._tmp / f"upload-{secrets.token_hex(8)}", limit_bytes)
        except OSError as error:
            raise _translated(error) from error

    def make_folder(self, relative: str) -> Path:
        """A folder whose name, and those of the folders above it, no power cut takes back."""
        folder = self.path(relative)
        folder.mkdir(parents=True, exist_ok=True)
        for parent in folder.parents:
            sync_folder(parent)
            if parent == self.root:
                break
        return folder

    def remove(self, relative: str) -> None:
        """Delete a file's or checkpoint's folder with all it holds. It disappears at once; missing is fine.

        What another process still writes into it meanwhile stays in tmp/, for `clean_temporary`.
        """
        self._tmp.mkdir(parents=True, exist_ok=True)
        doomed = self._tmp / f"removed-{secrets.token_hex(8)}"
        try:
            self.path(relative).rename(doomed)
        except FileNotFoundError:
            return  # what is in doubt stays so: its files may come yet, from a process that has not heard
        self.trust(relative)
        shutil.rmtree(doomed, ignore_errors=True)

    def is_held(self) -> bool:
        """Whether a backup is under way that needs the files of rows which are deleted meanwhile."""
        try:
            return self._hold.stat().st_mtime > time.time() - HOLD_SECONDS
        except FileNotFoundError:
            return False

    def retire(self, relative: str) -> None:
        """`remove` what had a row until now. While files are held it stays, in doubt, and goes with `uploads.settle`.

        Raises StorageFullError.
        """
        if self.is_held():
            self.doubt(relative)
        else:
            self.remove(relative)

    def doubt(self, relative: str) -> None:
        """Whether the folder has a row is in doubt (service/uploads.py) until `trust`, or `remove` has removed it.

        No power cut takes that back. Raises StorageFullError.
        """
        try:
            folder = self.make_folder(self._doubts.name)
            self._doubt(relative).touch()
            sync_folder(folder)
        except OSError as error:
            raise _translated(error) from error

    def names_in(self, relative: str) -> list[str]:
        """What lies in a folder; nothing where there is none."""
        folder = self.path(relative)
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    def trust(self, relative: str) -> None:
        """The folder has a row, or is gone."""
        self._doubt(relative).unlink(missing_ok=True)

    def doubtful(self, older_than_seconds: float) -> list[str]:
        """The folders in doubt for so long."""
        if not self._doubts.is_dir():
            return []
        horizon = time.time() - older_than_seconds
        return [unquote(entry.name) for entry in self._doubts.iterdir() if _is_older(entry, horizon)]

    def _doubt(self, relative: str) -> Path:
        return self._doubts / quote(relative, safe="")

    def clean_temporary(self, older_than_seconds: float = 86_400) -> int:
        """Delete what crashed processes left in tmp/; returns how many entries. What others still write stays."""
        if not self._tmp.is_dir():
            return 0
        horizon = time.time() - older_than_seconds
        stale = [entry for entry in self._tmp.iterdir() if _is_older(entry, horizon)]
        for entry in stale:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)  # another process may be deleting it as well
            else:
                entry.unlink(missing_ok=True)
        return len(stale)


class Upload:
    """One file being written: temporary until `commit`, gone if the block ends without one."""

    def __init__(self, temporary: Path, limit_bytes: int) -> None:
        self._temporary = temporary
        self._limit_bytes = limit_bytes
        self._file = temporary.open("xb")
        self._hash = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        """Of the bytes so far, in hex."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append. Raises UploadTooLargeError past the limit, StorageFullError on a full disk."""
        self.bytes += len(data)
        if self.bytes > self._limit_bytes:
            raise UploadTooLargeError(self._limit_bytes)
        self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise _translated(error) from error

    def seal(self) -> None:
        """No more bytes: those that came are on disk. Raises StorageFullError."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise _translated(error) from error

    def commit(self, destination: Path) -> None:
        """Make the file durable at `destination`: synced, renamed, the folders synced. Raises StorageFullError."""
        self.seal()
        _move(self._temporary, destination)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._temporary.unlink(missing_ok=True)
        try:
            self._file.close()
        except OSError:  # the buffer did not fit on a full disk; the file is unlinked already
            if kind is None:
                raise


class FolderUpload:
    """Files being written into one folder: temporary until `commit`, gone if the block ends without one."""

    def __init__(self, temporary: Path, limit_bytes: int) -> None:
        """`limit_bytes` for all files together."""
        self.folder = temporary
        self._limit_bytes = limit_bytes
        self._files: dict[str, Upload] = {}
        self.bytes = 0
        temporary.mkdir()

    @property
    def files(self) -> list[dict[str, Any]]:
        """{name, bytes, sha256} of each file that has begun, in that order."""
        return [{"name": name, "bytes": file.bytes, "sha256": file.sha256} for name, file in self._files.items()]

    def begin(self, name: str, limit_bytes: int) -> None:
        """A file of this name follows, of at most `limit_bytes`; it must not have begun before.

        Raises StorageFullError.
        """
        self.seal()
        try:
            self._files[name] = Upload(self.folder / name, limit_bytes)
        except OSError as error:
            raise _translated(error) from error

    def write(self, data: bytes) -> None:
        """Append to the file that began last. Raises UploadTooLargeError, StorageFullError."""
        self.bytes += len(data)
        if self.bytes > self._limit_bytes:
            raise UploadTooLargeError(self._limit_bytes)
        self._last.write(data)
        os.utime(self.folder)  # for clean_temporary: it is not one that a crash has left

    def seal(self) -> None:
        """The file that began last is whole and on disk. Raises StorageFullError."""
        if self._files:
            self._last.seal()

    def commit(self, destination: Path) -> None:
        """Make the folder with all its files durable at `destination`. Raises StorageFullError."""
        self.seal()
        try:
            sync_folder(self.folder)
        except OSError as error:
            raise _translated(error) from error
        _move(self.folder, destination)

    @property
    def _last(self) -> Upload:
        return next(reversed(self._files.values()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._files:
            self._last.__exit__(kind, error, trace)
        shutil.rmtree(self.folder, ignore_errors=True)


def _move(temporary: Path, destination: Path) -> None:
    """Give a file or folder its name, which no power cut takes back. Raises StorageFullError."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(destination)
        for folder in (destination.parent, destination.parent.parent):
            sync_folder(folder)
    except OSError as error:
        raise _translated(error) from error


def _is_older(entry: Path, horizon: float) -> bool:
    """By its last change; False where another process has removed it meanwhile."""
    try:
        return entry.lstat().st_mtime < horizon
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _translated(error: OSError) -> Exception:
    return StorageFullError() if error.errno in (errno.ENOSPC, errno.EDQUOT) else error

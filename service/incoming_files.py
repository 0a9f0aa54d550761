"""Files that are being written: temporary until they are whole, and then in their place, durably."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from service.errors import StorageFullError, UploadTooLargeError

FileRecord = dict[str, Any]
"""{name, bytes, sha256 in hex} of a file of a folder; `name` is relative to that."""


class Upload:
    """One file being written: temporary until `commit`, gone if the block ends without one."""

    def __init__(
        self, temporary: Path, limit_bytes: int, place: Callable[[Path, str, FileRecord], None] | None = None
    ) -> None:
        """`place` is what `commit` does with the file, one of a folder has none."""
        self._temporary = temporary
        self._place = place
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
            raise translated(error) from error

    def seal(self) -> None:
        """No more bytes: those that came are on disk. Raises StorageFullError."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise translated(error) from error

    def commit(self, relative: str) -> None:
        """Make the file durable under this path: synced, renamed, the folders synced; or stored.

        Raises StorageFullError, StorageUnavailableError.
        """
        self.seal()
        if self._place is None:
            raise ValueError("commit: the file is one of a folder")
        record = {"name": Path(relative).name, "bytes": self.bytes, "sha256": self.sha256}
        self._place(self._temporary, relative, record)

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

    def __init__(
        self, temporary: Path, limit_bytes: int, place: Callable[[Path, str, Sequence[FileRecord]], None]
    ) -> None:
        """`limit_bytes` for all files together; `place` is what `commit` does with them."""
        self.folder = temporary
        self._place = place
        self._limit_bytes = limit_bytes
        self._files: dict[str, Upload] = {}
        self.bytes = 0
        temporary.mkdir()

    @property
    def files(self) -> list[FileRecord]:
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
            raise translated(error) from error

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

    def commit(self, relative: str) -> None:
        """Make the folder with all its files durable under this path.

        Raises StorageFullError, StorageUnavailableError.
        """
        self.seal()
        try:
            sync_folder(self.folder)
        except OSError as error:
            raise translated(error) from error
        self._place(self.folder, relative, self.files)

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


def move(temporary: Path, destination: Path) -> None:
    """Give a file or folder its name, which no power cut takes back. Raises StorageFullError."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(destination)
        for folder in (destination.parent, destination.parent.parent):
            sync_folder(folder)
    except OSError as error:
        raise translated(error) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def translated(error: OSError) -> Exception:
    return StorageFullError() if error.errno in (errno.ENOSPC, errno.EDQUOT) else error

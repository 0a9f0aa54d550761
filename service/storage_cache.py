"""What this host has of files that lie in an object store, under their relative paths in the data folder.

Each has a file in cache/, named for its path: locked by whoever reads it (shared) or brings or removes it (exclusive),
its time that of the last use, its text the bytes. What nobody reads goes, the least recently used first, where all
together are too large.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from service.patience import Patience

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Used:
    at: float
    relative: str
    bytes: int


class _Lock:
    """An entry's file, locked until `close`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def close(self) -> None:
        os.close(self.descriptor)


class Cache:
    """The entries of one data folder, which several processes share."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._folder = root / "cache"
        self._tmp = root / "tmp"
        self._limit_bytes = limit_bytes

    def adopt(self, roots: Sequence[str]) -> bool:
        """Begin to keep copies in the data folder, unless one of these folders is there that is not ours."""
        if not self._folder.exists() and any((self._root / name).exists() for name in roots):
            return False
        self._folder.mkdir(parents=True, exist_ok=True)
        return True

    def hold(self, relative: str, held: ExitStack, bring: Callable[[Path], int], patience: Patience) -> Path:
        """The path of what `bring` puts at a temporary one, unless it is here; returns its bytes. Who comes second
        waits. It stays until `held` is closed. Raises what `bring` raises."""
        path = self._root / relative
        while True:
            lock = self._lock(relative, fcntl.LOCK_SH, patience)
            if path.exists():
                os.utime(lock.descriptor)
                held.callback(lock.close)
                return path
            lock.close()
            with closing(self._lock(relative, fcntl.LOCK_EX, patience)) as lock:
                if not path.exists():
                    try:
                        self._bring(path, bring, lock)
                    except BaseException:
                        self._file(relative).unlink(missing_ok=True)
                        raise

    def expect(self, relative: str, held: ExitStack) -> None:
        """As `hold`, of what somebody makes at the path meanwhile."""
        held.callback(self._lock(relative, fcntl.LOCK_SH, Patience()).close)

    def record(self, relative: str, size: int) -> None:
        """What lies at the path can be had again from now on: it may go when it is its turn."""
        with closing(self._lock(relative, fcntl.LOCK_SH, Patience())) as lock:
            _write(lock, size)

    def has(self, relative: str) -> bool:
        return self._file(relative).exists()

    def remove(self, relative: str) -> None:
        """It, and what lies below it, whoever reads it."""
        below = quote(f"{relative}/", safe="")
        for file in self._files():
            if file.name == quote(relative, safe="") or file.name.startswith(below):
                file.unlink(missing_ok=True)
        self._discard(self._root / relative)

    def make_room(self, limit_bytes: int | None = None) -> int:
        """Remove what is beyond the limit and nobody reads; returns the bytes that are left."""
        limit = self._limit_bytes if limit_bytes is None else limit_bytes
        entries = sorted(self._entries(), key=lambda entry: entry.at)
        total = sum(entry.bytes for entry in entries)
        for entry in entries:
            if total <= limit:
                break
            if self._remove_unread(entry.relative):
                total -= entry.bytes
        return total

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """Remove what nobody reads and is not in the store any more."""
        for entry in list(self._entries()):
            if is_gone(entry.relative):
                self._remove_unread(entry.relative)

    def _bring(self, path: Path, bring: Callable[[Path], int], lock: _Lock) -> None:
        self.make_room()
        self._tmp.mkdir(parents=True, exist_ok=True)
        temporary = self._tmp / f"fetched-{secrets.token_hex(8)}"
        try:
            try:
                size = bring(temporary)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                _delete(temporary)
                self.make_room(0)
                size = bring(temporary)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(path)
            _write(lock, size)
        finally:
            _delete(temporary)
        self.make_room()

    def _remove_unread(self, relative: str) -> bool:
        lock = self._try_lock(relative, fcntl.LOCK_EX, create=False)
        if lock is None:
            return False
        with closing(lock):
            self._discard(self._root / relative)
            self._file(relative).unlink(missing_ok=True)
        return True

    def _discard(self, path: Path) -> None:
        self._tmp.mkdir(parents=True, exist_ok=True)
        doomed = self._tmp / f"removed-{secrets.token_hex(8)}"
        try:
            path.rename(doomed)
        except (FileNotFoundError, NotADirectoryError):
            return
        _delete(doomed)

    def _lock(self, relative: str, kind: int, patience: Patience) -> _Lock:
        while True:
            patience.beat()
            lock = self._try_lock(relative, kind, create=True)
            if lock is not None:
                return lock
            time.sleep(_POLL_SECONDS)

    def _try_lock(self, relative: str, kind: int, create: bool) -> _Lock | None:
        file = self._file(relative)
        if create:
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if create else 0) | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return None
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # else it was removed before we had the lock
                return _Lock(descriptor)
        os.close(descriptor)
        return None

    def _entries(self) -> Iterator[_Used]:
        for file in self._files():
            relative = unquote(file.name)
            try:
                used, text = file.stat().st_mtime, file.read_text()
            except FileNotFoundError:
                continue
            size = int(json.loads(text)) if text else _size(self._root / relative)
            yield _Used(used, relative, size)

    def _files(self) -> list[Path]:
        return list(self._folder.iterdir()) if self._folder.is_dir() else []

    def _file(self, relative: str) -> Path:
        return self._folder / quote(relative, safe="")


def _write(lock: _Lock, size: int) -> None:
    os.ftruncate(lock.descriptor, 0)
    os.pwrite(lock.descriptor, json.dumps(size).encode(), 0)


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder, some of which may go meanwhile."""
    files: Any = [path] if path.is_file() else path.rglob("*")
    total = 0
    for file in files:
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

"""Files in an object store, for hosts with disks of their own.

    <relative path>                     a file; of a folder, each of its files
    manifests/<relative path>.json      of a file or folder that is whole: its files with their hashes
    doubtful/<path, quoted>             as in a data folder

A file or folder exists from the moment when its manifest is created, which comes last; when it is removed the manifest
goes first. The data folder has what is on its way, what a trainer writes, and copies (service/storage_cache.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote

from service.errors import FilesDamagedError, StorageUnavailableError
from service.incoming_files import FileRecord
from service.object_store import ObjectStore
from service.patience import NONE, Patience
from service.settings import Settings
from service.storage import Storage
from service.storage_cache import Cache

MANIFESTS = "manifests"
DOUBTS = "doubtful"
ROOTS = ("datasets", "tokenizers", "models")
"""Folders that a data folder in use has some of."""
TIDY_SECONDS = 600.0
"""Between two looks for what this host need not keep."""
LEFT_SECONDS = 86_400.0
"""Age from which a checkpoint's folder that was not published is what a crash has left."""
LOG_SECONDS = 30 * 86_400.0
"""Age from which the log of a trainer goes, whose job may be deleted: of that the host that ran it does not hear."""
_BLOCK_BYTES = 1 << 22
_FILE, _FOLDER = "file", "folder"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a file or folder consists of."""

    kind: str
    files: tuple[FileRecord, ...]
    """Of a file the one that it is."""

    def to_json(self) -> bytes:
        return json.dumps({"version": 1, "kind": self.kind, "files": self.files}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises FilesDamagedError."""
        try:
            fields = json.loads(data)
            return cls(fields["kind"], tuple(fields["files"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FilesDamagedError("the manifest cannot be read") from error

    def keys(self, relative: str) -> list[tuple[str, FileRecord]]:
        """Each file's key."""
        if self.kind == _FILE:
            return [(relative, self.files[0])]
        return [(f"{relative}/{record['name']}", record) for record in self.files]


class ObjectStorage(Storage):
    """As `Storage`, of which it keeps the promises; `root` is this host's own folder."""

    remote = True

    def __init__(self, root: Path, store: ObjectStore, cache_bytes: int) -> None:
        super().__init__(root)
        self._store = store
        self._cache = Cache(self.root, cache_bytes)
        self._tidied_at = 0.0

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """On the settings' store, to which it does not connect. Raises ValueError for a data folder that files lie in:
        as copies of what the store never had they would go when their turn came."""
        made = cls(settings.data_dir, ObjectStore.of(settings), settings.cache_bytes)
        if not made._cache.adopt(ROOTS):
            raise ValueError(
                f"SLIMTUNE_DATA_DIR: {settings.data_dir} has files from before SLIMTUNE_STORAGE_URL was set; name an "
                "empty folder, and copy the files with `python -m service.storage_program` (docs/storage.md)"
            )
        return made

    def exists(self, relative: str) -> bool:
        self.path(relative)
        if self._manifest_of(relative) is not None:
            return True
        return any(True for _ in self._store.entries(f"{MANIFESTS}/{relative}"))

    def hold(self, relative: str, held: ExitStack, patience: Patience = NONE) -> Path:
        self.path(relative)

        def bring(temporary: Path) -> int:
            manifest = patience.run(lambda: self._manifest_for(relative))
            return self._download(relative, manifest, temporary, patience)

        return self._cache.hold(relative, held, bring, patience)

    def drop_copy(self, relative: str) -> None:
        self._cache.remove(relative)

    def expect(self, relative: str, held: ExitStack) -> None:
        self.path(relative).parent.mkdir(parents=True, exist_ok=True)
        self._cache.expect(relative, held)

    def publish(self, relative: str, patience: Patience = NONE, records: Sequence[FileRecord] | None = None) -> None:
        path = self.path(relative)
        if patience.run(lambda: self._manifest_of(relative)) is None:
            self.store(path, relative, records, patience)
        self._cache.record(relative, sum(each.stat().st_size for each in _files(path)))
        self._cache.make_room()

    def store(
        self, path: Path, relative: str, records: Sequence[FileRecord] | None = None, patience: Patience = NONE
    ) -> None:
        """Send a file or folder that lies anywhere, its manifest last. Raises StorageUnavailableError, OSError."""
        if records is None:
            records = _records(path, patience)
        manifest = Manifest(_FILE if path.is_file() else _FOLDER, tuple(dict(record) for record in records))
        for key, record in manifest.keys(relative):
            source = path if manifest.kind == _FILE else path / record["name"]
            patience.run(lambda key=key, source=source: self._store.put_file(key, source, patience.beat))  # type: ignore[misc]
        patience.run(lambda: self._store.create(_manifest_key(relative), manifest.to_json()))

    def stat(self, relative: str) -> os.stat_result:
        self.path(relative)
        entry = self._store.entry(relative)
        modified = int(entry.modified.timestamp())
        return os.stat_result((0o100600, 0, 0, 1, 0, 0, entry.bytes, modified, modified, modified))

    def stream(self, relative: str) -> Callable[[int], AsyncIterator[bytes]]:
        self.path(relative)
        return lambda position: self._store.stream(relative, position)

    def blocks(self, relative: str) -> Iterator[bytes]:
        self.path(relative)
        return self._store.blocks(relative)

    def names_in(self, relative: str) -> list[str]:
        self.path(relative)
        return self._store.names_in(relative)

    def remove(self, relative: str) -> None:
        """As in a data folder; what a process sends meanwhile stays, and so does the doubt about it."""
        self.path(relative)
        manifests, keys = (self._keys_of(path) for path in (f"{MANIFESTS}/{relative}", relative))
        self._store.delete([_manifest_key(relative), *manifests])  # first: half must not be taken for the whole
        self._store.delete(keys)
        self._cache.remove(relative)
        if keys:
            self.trust(relative)

    def remove_strays(self, below: str, registered: Collection[str]) -> None:
        super().remove_strays(below, registered)
        within = tuple(f"{path}/" for path in registered)
        manifests = {_manifest_key(path) for path in registered}
        doomed = [key for key in self._keys_below(f"{MANIFESTS}/{below}") if key not in manifests]
        doomed += [key for key in self._keys_below(below) if not key.startswith(within)]
        self._store.delete(doomed)

    def remove_file(self, relative: str) -> None:
        folder = str(Path(relative).parent)
        self._store.delete([_manifest_key(relative), _manifest_key(folder)])
        self._store.delete([relative])
        self._cache.remove(relative)

    def doubt(self, relative: str) -> None:
        self._store.put(self._doubt_key(relative), b"")

    def trust(self, relative: str) -> None:
        self._store.delete([self._doubt_key(relative)])

    def doubtful(self, older_than_seconds: float) -> list[str]:
        horizon = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        old = [entry.key for entry in self._store.entries(DOUBTS) if entry.modified < horizon]
        return [unquote(key.rpartition("/")[2].replace("=", "%")) for key in old]

    def is_reachable(self) -> bool:
        try:
            self._store.check(DOUBTS)
        except StorageUnavailableError as error:
            logger.warning("the object store is not ready: %s", error.detail)
            return False
        return True

    def tidy(self) -> None:
        """Now and then: forget copies of what was removed elsewhere, and what crashes have left on this host."""
        if time.monotonic() - self._tidied_at < TIDY_SECONDS:
            return
        self._tidied_at = time.monotonic()
        self.clean_temporary()
        self._remove_unpublished()
        self._remove_old_logs()
        try:
            self._cache.forget(lambda relative: self.path(relative).exists() and self._is_gone(relative))
        except StorageUnavailableError as error:
            logger.info("copies are not looked through: %s", error.detail)
        self._cache.make_room()

    def _place_file(self, temporary: Path, relative: str, record: FileRecord) -> None:
        self.store(temporary, relative, [record])

    def _place_folder(self, temporary: Path, relative: str, records: Sequence[FileRecord]) -> None:
        self.store(temporary, relative, records)

    def _download(self, relative: str, manifest: Manifest, temporary: Path, patience: Patience) -> int:
        """Raises FilesDamagedError where a file is not what the manifest says."""
        for key, record in manifest.keys(relative):
            target = temporary if manifest.kind == _FILE else temporary / record["name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            patience.run(lambda key=key, record=record, target=target: self._fetch(key, record, target, patience))  # type: ignore[misc]
        return sum(record["bytes"] for record in manifest.files)

    def _fetch(self, key: str, record: FileRecord, target: Path, patience: Patience) -> None:
        digest = hashlib.sha256()
        try:
            with target.open("wb") as file:
                for block in self._store.blocks(key):
                    patience.beat()
                    digest.update(block)
                    file.write(block)
        except FileNotFoundError:
            raise FilesDamagedError(f"{record['name']} is missing") from None
        if digest.hexdigest() != record["sha256"]:
            raise FilesDamagedError(f"{record['name']} does not have the SHA-256 that it was stored with")

    def _manifest_for(self, relative: str) -> Manifest:
        """Of a file or folder, or of one file of a folder. Raises FileNotFoundError."""
        if (manifest := self._manifest_of(relative)) is not None:
            return manifest
        folder, _, name = relative.rpartition("/")
        if folder and (holder := self._manifest_of(folder)) is not None:
            for record in holder.files:
                if record["name"] == name:
                    return Manifest(_FILE, (record,))
        raise FileNotFoundError(relative)

    def _manifest_of(self, relative: str) -> Manifest | None:
        try:
            return Manifest.from_json(self._store.get(_manifest_key(relative)))
        except FileNotFoundError:
            return None

    def _is_gone(self, relative: str) -> bool:
        try:
            self._manifest_for(relative)
        except FileNotFoundError:
            return True
        return False

    def _keys_of(self, relative: str) -> list[str]:
        """Of a folder's files, or of the file that it is."""
        if keys := self._keys_below(relative):
            return keys
        try:
            return [self._store.entry(relative).key]
        except FileNotFoundError:
            return []

    def _keys_below(self, folder: str) -> list[str]:
        return [entry.key for entry in self._store.entries(folder)]

    def _doubt_key(self, relative: str) -> str:
        return f"{DOUBTS}/{quote(relative, safe='').replace('%', '=')}"

    def _remove_unpublished(self) -> None:
        horizon = time.time() - LEFT_SECONDS
        for folder in self.root.glob("jobs/*/checkpoints/attempt-*/*"):
            relative = str(folder.relative_to(self.root))
            if folder.stat().st_mtime < horizon and not self._cache.has(relative):
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_old_logs(self) -> None:
        horizon = time.time() - LOG_SECONDS
        for log in self.root.glob("jobs/*/attempt-*.stderr"):
            with contextlib.suppress(FileNotFoundError):  # another process may be at it as well
                if log.stat().st_mtime < horizon:
                    log.unlink()
                    with contextlib.suppress(OSError):  # while there is more of the job, the folder stays
                        log.parent.rmdir()


def _manifest_key(relative: str) -> str:
    return f"{MANIFESTS}/{relative}.json"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def _records(path: Path, patience: Patience) -> list[FileRecord]:
    """Raises FileNotFoundError, also where a folder has nothing in it: there is no such thing in a store."""
    if not (files := _files(path)):
        raise FileNotFoundError(path)
    records = []
    for file in files:
        name = file.name if file == path else str(file.relative_to(path))
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as opened:
            while block := opened.read(_BLOCK_BYTES):
                digest.update(block)
                patience.beat()
        records.append({"name": name, "bytes": file.stat().st_size, "sha256": digest.hexdigest()})
    return records

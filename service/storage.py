"""Files by relative path: uploads, checkpoints, and how both come and go without leaving halves behind.

`Storage` keeps them in the data folder, which API and workers share. `service.object_storage.ObjectStorage` keeps them
in an object store, and has in the data folder what this host needs of them; `open_storage` chooses.

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
    backup-in-progress                          an empty file, made by who copies all this, as long as it takes

Names come from the server only. A path in the database is relative, so that the folder can move; it is the key in an
object store.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote, unquote

from service.errors import StorageFullError
from service.incoming_files import FileRecord, FolderUpload, Upload, move, sync_folder, translated
from service.patience import NONE, Patience
from service.settings import Settings

BACKUP_SECONDS = 86_400.0
"""Age from which the note that a backup is under way is taken for one that was forgotten."""
logger = logging.getLogger(__name__)

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


_BLOCK_BYTES = 1 << 20


def open_storage(settings: Settings) -> Storage:
    """Where the settings say that files lie. Connects to nothing."""
    if settings.storage_url is None:
        return Storage(settings.data_dir)
    from service.object_storage import ObjectStorage  # noqa: PLC0415  # its library is loaded where it is needed

    return ObjectStorage.of(settings)


class Storage:
    """The data folder. Creates what it needs; refuses any path that leads out of it."""

    remote = False
    """Whether the files lie elsewhere, so that they have to be held and published."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._tmp = self.root / "tmp"
        self._doubts = self.root / "doubtful"
        self._backup = self.root / "backup-in-progress"

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
            return Upload(self._tmp / f"upload-{secrets.token_hex(8)}", limit_bytes, self._place_file)
        except OSError as error:
            raise translated(error) from error

    def folder_upload(self, limit_bytes: int) -> FolderUpload:
        """A folder to write an upload of several files into; use it as a context manager. Raises StorageFullError."""
        try:
            self._tmp.mkdir(parents=True, exist_ok=True)
            return FolderUpload(self._tmp / f"upload-{secrets.token_hex(8)}", limit_bytes, self._place_folder)
        except OSError as error:
            raise translated(error) from error

    def _place_file(self, temporary: Path, relative: str, _record: FileRecord) -> None:
        move(temporary, self.path(relative))

    def _place_folder(self, temporary: Path, relative: str, _records: Sequence[FileRecord]) -> None:
        move(temporary, self.path(relative))

    def exists(self, relative: str) -> bool:
        """Whether the file or folder is stored, whole, or a folder has something in it that is."""
        return self.path(relative).exists()

    def hold(self, relative: str, held: ExitStack, patience: Patience = NONE) -> Path:  # noqa: ARG002  # for others
        """The path of a file or folder on this host, which stays there until `held` is closed unless it is removed.

        From an object store it is fetched first, where it is not here yet. Raises FileNotFoundError if there is none
        (a data folder does not look), FilesDamagedError, StorageUnavailableError, OSError.
        """
        return self.path(relative)

    def drop_copy(self, relative: str) -> None:
        """Of what is stored elsewhere, or is not going to be stored: what this host has of it."""

    def expect(self, relative: str, held: ExitStack) -> None:
        """A folder that somebody may make at its path, on this host and for it alone, until `held` is closed."""

    def publish(self, relative: str, patience: Patience = NONE, records: Sequence[FileRecord] | None = None) -> None:
        """Store what lies at the file's or folder's path on this host; `records` are its files, if they are known.

        Afterwards it exists, for all hosts. Raises StorageUnavailableError.
        """

    def stat(self, relative: str) -> os.stat_result:
        """Size and time of a file. Raises FileNotFoundError, StorageUnavailableError."""
        return self.path(relative).stat()

    def stream(self, relative: str) -> Callable[[int], AsyncIterator[bytes]] | None:  # noqa: ARG002  # for others
        """A file's bytes from a position on, asynchronously; None where it is to be opened at its path."""
        return None

    def blocks(self, relative: str) -> Iterator[bytes]:
        """A file's bytes. Raises FileNotFoundError, StorageUnavailableError."""
        with self.path(relative).open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block

    def remove_strays(self, below: str, registered: Collection[str]) -> None:
        """Remove what lies below a folder and neither is one of `registered`, nor in or above one."""
        for stray in strays(self.path(below), frozenset(self.path(path) for path in registered)):
            self.retire(str(stray.relative_to(self.root)))

    def remove_file(self, relative: str) -> None:
        """Delete one file of a folder whose others stay. Missing is fine."""
        self.path(relative).unlink(missing_ok=True)

    def is_reachable(self) -> bool:
        """Whether an object store answers, and lets us in."""
        return True

    def tidy(self) -> None:
        """Remove what this host need not keep; to be called often, looks now and then. Raises OSError."""

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

    def is_being_backed_up(self) -> bool:
        """Whether a backup of the data folder needs the files of rows that are deleted meanwhile. Of an object store,
        which can keep them itself, it is never said."""
        try:
            return not self.remote and self._backup.stat().st_mtime > time.time() - BACKUP_SECONDS
        except FileNotFoundError:
            return False

    def retire(self, relative: str) -> None:
        """`remove` what had a row until now. During a backup it stays, in doubt, and goes with `uploads.settle`."""
        if not self.is_being_backed_up():
            self.remove(relative)
            return
        try:
            self.doubt(relative)
        except StorageFullError:
            logger.warning("%s: no space to note that it is nobody's; service.verify_program finds it", relative)

    def doubt(self, relative: str) -> None:
        """Whether the folder has a row is in doubt (service/uploads.py) until `trust`, or `remove` has removed it.

        No power cut takes that back. Raises StorageFullError.
        """
        try:
            folder = self.make_folder(self._doubts.name)
            self._doubt(relative).touch()
            sync_folder(folder)
        except OSError as error:
            raise translated(error) from error

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


def strays(checkpoints_dir: Path, registered: frozenset[Path]) -> list[Path]:
    """What lies below `checkpoints_dir` and is neither `registered` nor above what is, so that no row knows it.

    Half-written folders, steps that were never registered, folders of earlier attempts that hold nothing else. (Older
    versions put the steps of all attempts into `checkpoints_dir` itself.)
    """
    needed = registered | {parent for path in registered for parent in path.parents}
    found = []
    for entry in _entries(checkpoints_dir):
        if entry not in needed:
            found.append(entry)
        elif entry not in registered:
            found += [inner for inner in _entries(entry) if inner not in registered]
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_older(entry: Path, horizon: float) -> bool:
    """By its last change; False where another process has removed it meanwhile."""
    try:
        return entry.lstat().st_mtime < horizon
    except FileNotFoundError:
        return False

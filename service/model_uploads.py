"""The way in of a base model: its files, checked before anything is kept. Rows and the way out are base_models.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Engine

from service import uploads
from service.base_models import GGUF_FILE, CheckedModel, describe
from service.errors import ModelInvalidError
from service.filenames import clean_name
from service.ids import new_id
from service.jsonable import clean_text
from service.limits import UNLIMITED, Limits
from service.models import Model
from service.status import PENDING, READY
from service.storage import Storage, converted_path, model_path

MAX_FILES = 256
"""Of one model: shards, and what lies beside them."""
_KIB, _MIB = 1 << 10, 1 << 20

SMALL_FILES = {
    "config.json": 256 * _KIB,
    "model.safetensors.index.json": 16 * _MIB,
    "tokenizer.json": 64 * _MIB,
    "tokenizer_config.json": 8 * _MIB,
    "special_tokens_map.json": _MIB,
    "generation_config.json": 256 * _KIB,
    "chat_template.jinja": _MIB,
}
"""What may lie beside the weights, with the most bytes of each: they are read whole."""
ACCEPTED = (*SMALL_FILES, "model.safetensors", "model-00001-of-00002.safetensors (and so on)", "one .gguf, alone")
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_GGUF_MAGIC = b"GGUF"


class ModelUpload:
    """One upload from its first byte to its row. A block that ends without `store` leaves nothing behind."""

    def __init__(self, files: Storage, limit_bytes: int) -> None:
        """`limit_bytes` for all files together."""
        self._files = files
        self._limit_bytes = limit_bytes
        self._upload = files.folder_upload(limit_bytes)
        self._names: list[str] = []
        self._head = b""
        self._default_name = "uploaded model"

    def begin(self, filename: str) -> None:
        """The bytes of this file follow. Raises ModelInvalidError for a name that is none of those that are read."""
        name = _accepted_name(filename)
        if name in self._names:
            raise ModelInvalidError([{"file": name, "reason": "was sent twice"}])
        if self._names and GGUF_FILE in (name, self._names[0]):
            raise ModelInvalidError([{"file": name, "reason": "a .gguf holds everything and must come alone"}])
        if name == GGUF_FILE:
            self._default_name = filename[: -len(".gguf")]
        self._names.append(name)
        self._head = b""
        self._upload.begin(name, SMALL_FILES.get(name, self._limit_bytes))

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises UploadTooLargeError, StorageFullError; ModelInvalidError for what is no GGUF."""
        if self._names == [GGUF_FILE] and len(self._head) < len(_GGUF_MAGIC):
            self._head += data[: len(_GGUF_MAGIC) - len(self._head)]
            if not _GGUF_MAGIC.startswith(self._head):
                raise ModelInvalidError([{"file": GGUF_FILE, "reason": "is not GGUF: it begins with other bytes"}])
        self._upload.write(data)

    def store(
        self,
        bind: Engine,
        name: str | None,
        check: Callable[[Path], CheckedModel],
        *,
        tenant: str,
        limits: Limits = UNLIMITED,
    ) -> Model:
        """Make files and row durable, after `check` of the folder, which a .gguf only gets when it is converted.

        Raises ModelInvalidError, as `check` does (nothing is stored), StorageFullError.
        """
        self._upload.seal()
        checked = None if self._names == [GGUF_FILE] else check(self._upload.folder)
        row = self._row(tenant, name, checked)
        folder = model_path(row.id)
        commit, size = lambda: self._upload.commit(folder), self._upload.bytes
        recorded = uploads.recorded(bind, self._files, folder, commit, size, tenant, limits)
        with recorded as session:
            session.add(row)
            session.flush()
            session.refresh(row)
        return row

    def _row(self, tenant: str, name: str | None, checked: CheckedModel | None) -> Model:
        model_id = new_id("model")
        row = Model(
            id=model_id,
            tenant=tenant,
            name=clean_name(name or self._default_name),
            kind="upload",
            status=PENDING if checked is None else READY,
            path=model_path(model_id),
            files=self._upload.files,
            bytes=self._upload.bytes,
        )
        if checked is None:
            row.path = converted_path(model_id)
        else:
            describe(row, checked)
        return row

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._upload.__exit__(kind, error, trace)


def _accepted_name(filename: str) -> str:
    """What the file is called below the model's folder. A name with a path is none: it is not for us to guess."""
    if filename in SMALL_FILES or filename == "model.safetensors" or _SHARD.fullmatch(filename):
        return filename
    if filename.lower().endswith(".gguf") and "/" not in filename and "\\" not in filename:
        return GGUF_FILE
    shown = clean_text(filename)[:80]
    raise ModelInvalidError(
        [{"file": shown, "reason": "is not a file of a model that is read"}], accepted_files=list(ACCEPTED)
    )

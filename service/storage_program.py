"""Copy the files of a data folder into the object store of SLIMTUNE_STORAGE_URL: `python -m service.storage_program
--from FOLDER`.

What the rows of the database name is copied, each with its manifest, and nothing is deleted. What is there already is
left alone, so it can be stopped, and run again. One JSON object on stdout; exit status 1 where files were missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import select
from sqlalchemy.orm import Session

from service import database, preparations
from service.base_models import GGUF_FILE
from service.errors import StorageUnavailableError
from service.incoming_files import FileRecord
from service.models import Checkpoint, Dataset, Model, Tokenization, Tokenizer
from service.object_storage import ObjectStorage
from service.patience import Patience
from service.settings import load_settings
from service.status import READY
from service.storage import model_path, tokens_dir

PATIENCE_SECONDS = 300.0

logger = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the data folder so far")
    folder = parser.parse_args(arguments).source
    settings = load_settings()
    if settings.storage_url is None:
        print(json.dumps({"error": "SLIMTUNE_STORAGE_URL is not set"}))
        return 1
    engine = sqlalchemy.create_engine(settings.database_url, poolclass=sqlalchemy.NullPool)
    with database.transaction(engine) as session:
        wanted = dict(stored(session))
    try:
        answer = copy(folder, ObjectStorage.of(settings), wanted)
    except StorageUnavailableError as error:
        print(json.dumps({"error": f"{error.message} {error.detail}"}))
        return 1
    print(json.dumps(answer))
    return 1 if answer["missing"] else 0


def stored(session: Session) -> Iterator[tuple[str, list[FileRecord] | None]]:
    """Each file and folder that a row has, with what the row knows of its files."""
    for dataset in session.scalars(select(Dataset)):
        path = preparations.source_path(session, dataset.id)
        yield path, [{"name": Path(path).name, "bytes": dataset.bytes, "sha256": dataset.sha256}]
    ready = select(Tokenization.dataset_id, Tokenization.key).where(Tokenization.status == READY)
    for dataset_id, key in session.execute(ready):
        yield tokens_dir(dataset_id, key), None
    for tokenizer in session.scalars(select(Tokenizer)):
        if tokenizer.source == "upload" or tokenizer.status == READY:
            yield tokenizer.path, None
    for model in session.scalars(select(Model).where(Model.kind == "upload")):
        is_gguf = model.path != model_path(model.id)
        if model.status == READY or not is_gguf:
            yield model.path, None if is_gguf else model.files
        else:
            yield f"{model_path(model.id)}/{GGUF_FILE}", None
    for checkpoint in session.scalars(select(Checkpoint)):
        yield checkpoint.path, checkpoint.files


def copy(folder: Path, storage: ObjectStorage, wanted: dict[str, list[FileRecord] | None]) -> dict[str, Any]:
    """Raises StorageUnavailableError after minutes without an answer."""
    patience = Patience(PATIENCE_SECONDS)
    copied, there, missing = 0, 0, []
    for relative, records in wanted.items():
        if patience.run(lambda relative=relative: storage.exists(relative)):  # type: ignore[misc]
            there += 1
        elif not (folder / relative).exists():
            missing.append(relative)
        else:
            storage.store(folder / relative, relative, records, patience)
            copied += 1
    return {"copied": copied, "already_there": there, "missing": missing}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

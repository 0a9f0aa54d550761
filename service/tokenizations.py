"""Which datasets are to be tokenised by what. The work itself is queued and recorded in preparations.py."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.models import Tokenization
from service.status import FAILED, PENDING
from service.tokenizers import TokenizerRef


def request(session: Session, dataset_id: str, tokenizer: TokenizerRef) -> Tokenization:
    """Have the dataset's tokens made, unless they are there or being made; one that failed is tried again.

    The caller holds the dataset's row.
    """
    mine = (Tokenization.dataset_id == dataset_id, Tokenization.key == tokenizer.key)
    values = {"tokenizer": tokenizer.name, "tokenizer_path": tokenizer.path, "status": PENDING}
    added = insert(Tokenization).values(dataset_id=dataset_id, key=tokenizer.key, **values).on_conflict_do_nothing()
    session.execute(added)
    fresh = {"error": None, "failures": 0, "retry_at": None, "finished_at": None}
    session.execute(
        update(Tokenization).where(*mine, Tokenization.status == FAILED).values(**values, **fresh),
        execution_options={"synchronize_session": False},
    )
    session.execute(  # what waits for its next try, for space on the disk for example, is tried now
        update(Tokenization).where(*mine, Tokenization.status == PENDING).values(retry_at=None),
        execution_options={"synchronize_session": False},
    )
    return session.scalars(select(Tokenization).where(*mine), execution_options={"populate_existing": True}).one()


def get(session: Session, dataset_id: str, key: str) -> Tokenization | None:
    """The tokenization, if it was ever asked for."""
    return session.get(Tokenization, (dataset_id, key), populate_existing=True)

"""What a request's datasets are under its tokenizer: whether they are large enough, and how many steps epochs are."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from api.errors import InvalidRequestError
from api.schemas import PlanRequest
from service import database, datasets, storage, tokenizations
from service.errors import DatasetNotTokenizedError, DatasetTooSmallError, DatasetUnusableError
from service.models import Dataset
from service.status import FAILED, READY
from service.storage import Storage
from service.tokenizers import BYTES, TokenizerRef

MAX_STEPS = 1_000_000_000
_HOPELESS = ("dataset_invalid", "tokenizer_invalid")
"""Codes of failed tokenizations that say the same to every trainer."""

Packing = Literal["packed", "continuous", "single"]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a request trains on."""

    steps: int
    packing: Packing


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a dataset under a tokenizer."""

    documents: int
    tokens: int
    longest_document_tokens: int


def describe(session: Session, request: PlanRequest, tokenizer: TokenizerRef, files: Storage) -> TrainingData:
    """Check a request's data and count its steps.

    Counts are asked for only where the answer depends on them: a job in steps may be created before its dataset is
    tokenised, and finds out later if it has too few tokens. Raises as `workload.resolve` does.
    """
    dataset = _checked(session, "dataset", request, request.dataset, tokenizer)
    _checked(session, "validation_dataset", request, request.validation_dataset, tokenizer)
    one_document = dataset is not None and dataset.documents == 1
    if one_document and request.validation_fraction is not None:
        raise InvalidRequestError(("validation_fraction", "needs a dataset of two documents or more"))
    packing: Packing = "continuous" if one_document and request.packing == "packed" else request.packing
    return TrainingData(_steps(session, request, dataset, tokenizer, packing, files), packing)


def _checked(
    session: Session, field: str, request: PlanRequest, dataset_id: str | None, tokenizer: TokenizerRef
) -> Dataset | None:
    """The dataset, with as many tokens as a window needs if their number is known."""
    if dataset_id is None:
        return None
    dataset = datasets.get(session, dataset_id)
    counts = counts_of(field, dataset, tokenizer)
    if counts is None or request.packing == "single":  # where a short document leaves the rest of its window empty
        return dataset
    if counts.tokens < request.sequence_length + 1:
        raise DatasetTooSmallError(field, dataset.id, counts.tokens, request.sequence_length)
    kept = int(counts.tokens * (request.validation_fraction or 0))
    if request.validation_fraction is not None and kept < request.sequence_length + 1:
        raise DatasetTooSmallError("validation_fraction", dataset.id, kept, request.sequence_length)
    return dataset


def counts_of(field: str, dataset: Dataset, tokenizer: TokenizerRef) -> Counts | None:
    """What the dataset is under the tokenizer; None while that is not known. Raises DatasetUnusableError where it never
    will be."""
    row = next((each for each in dataset.tokenizations if each.key == tokenizer.key), None)
    if row is not None and row.status == FAILED and row.error and row.error["code"] in _HOPELESS:
        raise DatasetUnusableError(field, dataset.id, tokenizer.name, row.error)
    if row is not None and row.status == READY and row.counts is not None:
        return Counts(row.counts["documents"], row.counts["tokens"], row.counts["longest"])
    if tokenizer == BYTES and dataset.documents and dataset.tokens and dataset.longest_document_tokens:
        return Counts(dataset.documents, dataset.tokens, dataset.longest_document_tokens)
    return None


def _steps(
    session: Session,
    request: PlanRequest,
    dataset: Dataset | None,
    tokenizer: TokenizerRef,
    packing: Packing,
    files: Storage,
) -> int:
    """Optimiser steps. An epoch is every window once; with `validation_fraction`, its share of them."""
    if request.steps is not None:
        return request.steps
    assert request.epochs is not None  # noqa: S101  # by workload's rules
    assert dataset is not None  # noqa: S101  # by workload's rules
    counts = counts_of("dataset", dataset, tokenizer)
    borders = files.blocks(f"{storage.tokens_dir(dataset.id, tokenizer.key)}/documents.bin")
    windows = None if counts is None else _windows(counts, request.sequence_length, packing, borders)
    if windows is None:
        raise not_tokenized(session, dataset, tokenizer)
    training = max(1, round(windows * (1 - (request.validation_fraction or 0))))
    steps = request.epochs * -(-training // request.batch_size)
    if steps > MAX_STEPS:
        raise InvalidRequestError(("epochs", f"are {steps} steps on this dataset; at most {MAX_STEPS} are possible"))
    return steps


def _windows(counts: Counts, length: int, packing: Packing, borders: Iterator[bytes]) -> int | None:
    """Sequences of `length` tokens in the dataset, each of which needs one more as its last target; None where it takes
    the documents' lengths, which are not there yet."""
    if packing != "single":
        return (counts.tokens - 1) // length
    if counts.longest_document_tokens <= length + 1:
        return counts.documents
    try:
        return _single_windows(borders, length)
    except FileNotFoundError:
        return None


def _single_windows(borders: Iterable[bytes], length: int) -> int:
    """Windows of documents that are cut one by one: a document of L tokens has ceil((L - 1) / length). The blocks are
    of documents.bin: where each begins, and where the last ends."""
    windows, previous, rest = 0, 0, b""
    for block in borders:
        data = rest + block
        whole = len(data) - len(data) % 8
        rest = data[whole:]
        for end in array("q", data[:whole]):
            if end > previous:
                windows += (end - previous + length - 2) // length
                previous = end
    return windows


def not_tokenized(session: Session, dataset: Dataset, tokenizer: TokenizerRef) -> DatasetNotTokenizedError:
    """The refusal, after the tokens were asked for: in a transaction of its own, as the request's is rolled back."""
    bind: Any = session.get_bind()
    assert isinstance(bind, Engine)  # noqa: S101  # what api.dependencies makes sessions from
    with database.transaction(bind, database.tenant_of(session)) as own:
        datasets.get(own, dataset.id, keep=True)
        status = tokenizations.request(own, dataset.id, tokenizer).status
    return DatasetNotTokenizedError("dataset", dataset.id, tokenizer.name, status)

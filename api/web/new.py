"""A new job: the form, empty or as a job before it was."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session

from api.dependencies import CallerDep, ContextDep
from api.responses import DatasetResponse, ModelResponse, TokenizerResponse
from api.web import job_form
from api.web.pages import page, shown_number
from service import base_models, database, datasets, jobs, tokenizers
from slim_core.config import BUILTIN_MODELS

router = APIRouter(prefix="/ui", include_in_schema=False)

LISTED = 100
"""Newest datasets, models and tokenizers to choose from; any other is named in the address."""
START: dict[str, Any] = {
    "model": next(iter(BUILTIN_MODELS)),
    "memory_cap": "512 MiB",
    "sequence_length": 8_192,
    "steps": 200,
}
"""Where the API has no defaults: something that fits, and has a curve to look at."""
CHOICE_NAMES = {
    ("method.type", "full"): "full: all weights",
    ("method.type", "lora"): "LoRA: adapters beside frozen weights",
    ("chunking", "auto"): "as the planner chooses",
    ("chunking", job_form.OWN): "of my own length",
}
"""Where the API's words alone say too little."""
DATA_FILES = ".txt,.jsonl,.parquet,.gz,.zst"
Reference = Annotated[str | None, Query(max_length=100)]


@dataclass(frozen=True, slots=True)
class Choice:
    """One entry of a list to choose from."""

    value: str
    label: str
    hint: str = ""
    """What to know of it, shown when it is chosen."""
    built_in: bool = False
    softmax: bool = False


@router.get("/new")
def form(
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    source: Annotated[str | None, Query(alias="from", max_length=100)] = None,
    dataset: Reference = None,
    model: Reference = None,
    tokenizer: Reference = None,
) -> Response:
    """Raises NotFoundError for a job that is not there."""
    known = job_form.fields()
    with database.reading(context.engine, caller.tenant) as session:
        job = None if source is None else jobs.get(session, source)
        spec = {**START} if job is None else _as_typed(job.spec)
        spec |= {name: value for name, value in _given(dataset, model, tokenizer) if value is not None}
        values = job_form.values_of(known, spec)
        choices = {
            "dataset": _with(_datasets(session), values["dataset"]),
            "model": _with(_models(session), values["model"]),
            "tokenizer": _with(_tokenizers(session), values["tokenizer"]),
        }
        choices["validation_dataset"] = _with(choices["dataset"], values["validation_dataset"])
    shown = {
        "duration": "epochs" if values["epochs"] is not None else "steps",
        "validation": next((n for n in ("dataset", "fraction") if values[f"validation_{n}"] is not None), "none"),
    }
    return page(
        request,
        "new.html",
        fields=known,
        groups=job_form.groups(known),
        values=values,
        choices=choices,
        shown=shown,
        source=job,
        key=uuid.uuid4(),
        data_files=DATA_FILES,
        choice_names=CHOICE_NAMES,
        pair_lines=job_form.pair_lines,
    )


def _given(*references: str | None) -> Iterable[tuple[str, str | None]]:
    return zip(("dataset", "model", "tokenizer"), references, strict=True)


def _as_typed(spec: dict[str, Any]) -> dict[str, Any]:
    """A job's spec as a person would write it."""
    cap = spec.get("memory_cap")
    if not isinstance(cap, int):
        return {**spec}
    return {**spec, "memory_cap": f"{cap >> 20} MiB" if cap and cap % (1 << 20) == 0 else str(cap)}


def _with(choices: list[Choice], value: str | None) -> list[Choice]:
    """What is chosen is among what can be chosen, also where it is older than what is listed."""
    if value is None or any(each.value == value for each in choices):
        return choices
    return [*choices, Choice(value, value)]


def _datasets(session: Session) -> list[Choice]:
    rows, _ = datasets.page(session, None, LISTED)
    return [_of_dataset(DatasetResponse.of_row(row)) for row in rows]


def _of_dataset(row: DatasetResponse) -> Choice:
    counts = [(row.documents, "document"), (row.tokens, "byte")]
    hint = [f"{count:,} {what}{'' if count == 1 else 's'}" for count, what in counts if count is not None]
    hint += (
        [f"the longest {row.longest_document_tokens:,}"] if row.longest_document_tokens and row.documents != 1 else []
    )
    return Choice(row.id, f"{row.name} ({row.id[-6:]})", ", ".join(hint) or "not counted yet")


def _models(session: Session) -> list[Choice]:
    rows, _ = base_models.page(session, None, LISTED)
    listed = [ModelResponse.of_builtin(*item) for item in BUILTIN_MODELS.items()]
    return [_of_model(each) for each in listed + [ModelResponse.of_row(row) for row in rows if row.status != "failed"]]


def _of_model(row: ModelResponse) -> Choice:
    config = row.config or {}
    softmax = config.get("attention", "softmax") == "softmax"
    hint = [f"{shown_number(row.num_parameters)} weights"] if row.num_parameters else ["being prepared"]
    hint += [f"{config.get('attention')} attention"] if config else []
    positions = config.get("max_positions")
    hint += [f"up to {positions:,} positions"] if positions else []
    kinds = {"built_in": "built in, new weights", "upload": "upload", "output": "output of a job"}
    name = row.name if row.kind == "built_in" else f"{row.name} ({row.id[-6:]})"
    return Choice(
        row.id, f"{name}, {kinds[row.kind]}", ", ".join(hint), built_in=row.kind == "built_in", softmax=softmax
    )


def _tokenizers(session: Session) -> list[Choice]:
    rows, _ = tokenizers.page(session, None, LISTED)
    answers = [TokenizerResponse.of_row(row) for row in rows if row.status != "failed"]
    return [
        Choice(each.id, f"{each.name} ({each.id[-6:]})", f"{shown_number(each.vocab_size)} tokens") for each in answers
    ]

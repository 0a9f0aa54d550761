"""Datasets, models and tokenizers: what there is, how far its preparation is, and what was wrong with it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from api.dependencies import CallerDep, ContextDep
from api.responses import DatasetResponse, ModelResponse, TokenizerResponse
from api.schemas import TrainFields
from api.web.new import DATA_FILES
from api.web.pages import page
from service import base_models, database, datasets, tokenizers
from slim_core.config import BUILTIN_MODELS

router = APIRouter(prefix="/ui", include_in_schema=False)

SHOWN = 20
"""Entries of a page of a list."""
MODEL_FILES = ".json,.safetensors,.gguf,.jinja,.txt,.model"
"""What a chooser of files offers; the upload itself decides."""
After = Annotated[str | None, Query(max_length=100)]


@router.get("/data")
@router.get("/data/lists", name="lists")
def listed(
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    datasets_after: After = None,
    models_after: After = None,
    tokenizers_after: After = None,
) -> Response:
    """The page, or the lists alone for a script that looks again."""
    with database.reading(context.engine, caller.tenant) as session:
        data, more_data = datasets.page(session, datasets_after, SHOWN)
        models, more_models = base_models.page(session, models_after, SHOWN)
        words, more_words = tokenizers.page(session, tokenizers_after, SHOWN)
        values: dict[str, Any] = {
            "datasets": [DatasetResponse.of_row(row) for row in data],
            "models": [ModelResponse.of_row(row) for row in models],
            "tokenizers": [TokenizerResponse.of_row(row) for row in words],
        }
    builtin = [ModelResponse.of_builtin(*item) for item in BUILTIN_MODELS.items()] if models_after is None else []
    values |= {
        "models": values["models"] + builtin,
        "older_than": {
            "datasets": data[-1].id if more_data else None,
            "models": models[-1].id if more_models else None,
            "tokenizers": words[-1].id if more_words else None,
        },
        "paged": bool(datasets_after or models_after or tokenizers_after),
        "names": {each.id: each.name for each in values["tokenizers"] + values["models"]},
        "vocab": _limits(TrainFields),
        "files": {"datasets": DATA_FILES, "models": MODEL_FILES, "tokenizers": ".json,.jinja"},
    }
    return page(request, "data_lists.html" if request.url.path.endswith("/lists") else "data.html", **values)


def _limits(fields: type[TrainFields]) -> dict[str, int]:
    schema = fields.model_json_schema()["properties"]["vocab_size"]
    return {"least": schema["minimum"], "most": schema["maximum"]}

"""Everything under /v1."""

from __future__ import annotations

from fastapi import APIRouter

from api.openai import files, jobs, models, uploads

router = APIRouter(prefix="/v1", tags=["openai"])
for resource in (files, uploads, jobs, models):
    router.include_router(resource.router)

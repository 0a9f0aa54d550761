"""All pages."""

from __future__ import annotations

from fastapi import APIRouter

from api.web import assets, compare, data, jobs, login, new

router = APIRouter()
for part in (assets, login, jobs, new, compare, data):
    router.include_router(part.router)

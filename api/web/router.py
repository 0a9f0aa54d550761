"""All pages."""

from __future__ import annotations

from fastapi import APIRouter

from api.web import assets, compare, data, devices, job, jobs, login, new

router = APIRouter()
for part in (assets, login, jobs, job, new, compare, data, devices):
    router.include_router(part.router)

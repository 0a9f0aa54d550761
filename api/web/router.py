"""All pages."""

from __future__ import annotations

from fastapi import APIRouter

from api.web import assets, devices, job, jobs, login

router = APIRouter()
for part in (assets, login, jobs, job, devices):
    router.include_router(part.router)

"""What jobs run on."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import SessionDep
from api.responses import DeviceResponse, Page
from service import devices

router = APIRouter(prefix="/devices", tags=["devices"])


@router.get("", summary="List devices")
def list_all(session: SessionDep) -> Page[DeviceResponse]:
    """What workers have announced. Jobs run side by side while the sum of their caps fits `memory_bytes`."""
    rows = devices.page(session)
    return Page[DeviceResponse](data=[DeviceResponse.model_validate(row) for row in rows], has_more=False)

"""What jobs run on, and what waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fastapi import APIRouter, Request, Response

from api.dependencies import CallerDep, ContextDep
from api.web.pages import page, shown_bytes
from service import database, devices
from service.devices import DeviceState, Occupant, Queued

router = APIRouter(include_in_schema=False)

WAITING = 50
"""Jobs of the queue that are listed."""


@dataclass(frozen=True, slots=True)
class Part:
    """What an occupant takes of the bar, in percent of it."""

    occupant: Occupant
    start: float
    width: float
    shade: int
    """Which of the few colours."""


@dataclass(frozen=True, slots=True)
class Wait:
    job: Queued
    place: int
    why: str


@router.get("/ui/devices")
def listed(request: Request, context: ContextDep, caller: CallerDep) -> Response:
    with database.reading(context.engine, caller.tenant) as session:
        found = devices.page(session)
        held = devices.occupants(session)
        waiting, more = devices.queue(session, WAITING)
    piece = request.headers.get("hx-request") == "true"
    return page(
        request,
        "devices_list.html" if piece else "devices.html",
        devices=[(each, parts(each, [one for one in held if one.device_id == each.id])) for each in found],
        queue=waits(found, waiting),
        more=more,
    )


def parts(device: DeviceState, held: list[Occupant]) -> list[Part]:
    """The occupants side by side; what is more than the device, as after it was given less memory, fills the bar."""
    whole = max(device.memory_bytes, sum(one.memory_cap_bytes for one in held), 1)
    edges = [0]
    for one in held:
        edges.append(edges[-1] + one.memory_cap_bytes)
    return [
        Part(one, round(start / whole * 100, 2), round((end - start) / whole * 100, 2), index % 4)
        for index, (one, (start, end)) in enumerate(zip(held, pairwise(edges), strict=True))
    ]


def waits(found: list[DeviceState], waiting: list[Queued]) -> list[Wait]:
    live = [device for device in found if device.live]
    return [Wait(job, place, _why(job, place, live)) for place, job in enumerate(waiting, 1)]


def _why(job: Queued, place: int, live: list[DeviceState]) -> str:
    """As far as the service knows: whose turn it is across tenants is decided when a device has room."""
    if not live:
        return "No worker is live."
    large_enough = [device for device in live if device.memory_bytes >= job.memory_cap_bytes]
    if not large_enough:
        largest = max(device.memory_bytes for device in live)
        return f"Larger than every live device: the largest has {shown_bytes(largest)}."
    if job.kept_free is not None:
        return f"{job.kept_free} is kept free for it: it starts when enough of what runs there has ended."
    free = max(0, *(device.memory_bytes - device.bytes_in_use for device in large_enough))
    if job.blocked_since is not None:
        why = f"It is its turn, but {shown_bytes(free)} at most are free."
    elif place > 1:
        why = f"Behind {place - 1} older {'job' if place == 2 else 'jobs'}."
    elif free < job.memory_cap_bytes:
        why = f"{shown_bytes(free)} at most are free now."
    elif all(device.jobs_running >= device.slots for device in large_enough):
        why = "All slots are taken."
    else:
        why = "It starts in a moment."
    return why

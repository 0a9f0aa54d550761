"""Caps on both sides of feasibility: jobs through the API and the supervisor, and plans that are wrong on purpose.

    python -m benchmarks.caps [--out FOLDER] [--draw]

Each specification meets five caps: 1 % under the smallest that has a plan, that one, one between, one above the
unchunked peak, and one under which it runs with the plan for twice as much. Writes docs/figures/caps.json and .png and
fills in docs/caps.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from sqlalchemy import Engine, func, update
from sqlalchemy.dialects.postgresql import JSONB
from starlette.testclient import TestClient

from api.app import create_app
from benchmarks.bench_measure import MIB, ROOT, Record, machine, progress
from benchmarks.caps_figure import draw
from benchmarks.page import Target, at_least, at_most, fill, table, targets_table
from benchmarks.plan_latency import migrate
from cli.embedded import EmbeddedServers
from service import calibrations, database, events, jobs
from service.models import Job
from service.settings import Settings
from slim_core.planning import Calibration
from worker import device
from worker.calibrator import measure
from worker.supervisor import TRAINER_COMMAND, supervise

NO_CAP = 1 << 50
STEPS = 2
ALLOWED_EXCESS = 1.03
UNDER, MINIMUM, BETWEEN, PLENTY, WRONG = "1 % under", "minimum", "between", "above unchunked", "plan for twice the cap"
KINDS = (UNDER, MINIMUM, BETWEEN, PLENTY, WRONG)


@dataclass(frozen=True)
class Specification:
    """A job but for its cap, as the API takes it."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


LORA = {"type": "lora", "rank": 8, "targets": ["query", "key_value"]}
SPECIFICATIONS = (
    Specification("performer-tiny, T 4,096", {"model": "performer-tiny", "sequence_length": 4_096}),
    Specification("performer-ptb, T 2,048", {"model": "performer-ptb", "sequence_length": 2_048}),
    Specification("performer-ptb, LoRA, T 2,048", {"model": "performer-ptb", "sequence_length": 2_048, "method": LORA}),
    Specification(
        "performer-tiny, bfloat16, T 2,048",
        {"model": "performer-tiny", "sequence_length": 2_048, "precision": "bfloat16"},
    ),
)
"""Short ones: at the minimum cap the chunks are the shortest, and hundreds of them take long, above all in bfloat16."""


def main() -> None:
    """Run, judge, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for everything, in place of docs/ and docs/figures/")
    parser.add_argument("--draw", action="store_true", help="run nothing; write everything again from the record")
    arguments = parser.parse_args()
    page = ROOT / "docs" / "caps.md"
    folder = page.parent / "figures"
    if arguments.out is not None:
        folder = arguments.out
        folder.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(page, folder / page.name))
    path = folder / "caps.json"
    record = json.loads(path.read_text()) if arguments.draw else run()
    record = {"targets": targets(record["runs"]), **{k: v for k, v in record.items() if k != "targets"}}
    path.write_text(json.dumps(record, indent=1) + "\n")
    page.write_text(
        fill(
            page.read_text(),
            {"targets": targets_table(record["targets"]), "summary": _summary(record), "runs": _runs(record)},
        )
    )
    draw(record["runs"], folder / "caps.png")
    for target in record["targets"]:
        print("met   " if target["met"] else "MISSED", target["name"], target["value"], target["unit"], target["bar"])
    print(f"written: {page}, {path}, and the figure in {folder}")


def run() -> Record:
    """Every specification under its caps, on servers of their own and with a calibration that is measured first."""
    began = time.monotonic()
    # Nobody looks at the times, and hundreds of short chunks on a busy machine would spend minutes in waiting threads.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    with tempfile.TemporaryDirectory() as scratch, EmbeddedServers(Path(scratch) / "servers") as servers:
        settings = Settings(
            database_url=servers.database_url,
            redis_url=servers.redis_url,
            data_dir=Path(scratch) / "data",
            trainer_threads=os.cpu_count() or 1,
        )
        migrate(settings)
        calibration = measure(settings.trainer_threads)
        runs = [
            record
            for specification in SPECIFICATIONS
            for record in under_all_caps(specification, settings, calibration)
        ]
    seconds = round(time.monotonic() - began)
    return {"machine": machine(), "seconds": seconds, "calibration": calibration.to_json(), "runs": runs}


def under_all_caps(
    specification: Specification,
    settings: Settings,
    calibration: Calibration,
    kinds: Collection[str] = KINDS,
    command: Sequence[str] = TRAINER_COMMAND,
) -> Iterator[Record]:
    """One record for each kind of cap, on a device that no cap exceeds; `command` starts a trainer."""
    settings = settings.model_copy(update={"device_memory_bytes": NO_CAP})
    with _client(settings, calibration) as (client, bind):
        dataset = client.post("/datasets", files={"file": ("data.txt", "\n".join(topics.values()))}).json()["id"]
        body = {"steps": STEPS, "dataset": dataset, **specification.fields}
        free = client.post("/plans", json={**body, "memory_cap": NO_CAP}).json()
        minimum, unchunked = free["minimum_cap_bytes"], free["unchunked_peak_bytes"]
        caps = {
            UNDER: math.floor(0.99 * minimum),
            MINIMUM: minimum,
            BETWEEN: math.floor(math.sqrt(minimum * unchunked)),
            PLENTY: math.ceil(1.02 * unchunked),
            WRONG: math.ceil(1.05 * minimum),
        }
        for kind in kinds:
            cap = caps[kind]
            asked = {**body, "memory_cap": cap}
            if kind == WRONG:
                asked |= {"memory_cap": 2 * cap, "chunking": _longest_chunks(client, body, 2 * cap)}
            answer = client.post("/jobs", json=asked)
            outcome = {"answer": answer.status_code, "status": "refused", "peaks_bytes": [], "codes": []}
            if answer.status_code == 202:
                outcome |= _supervised(answer.json()["id"], cap, settings, bind, command)
            elif answer.json().get("code") != "memory_cap_infeasible":
                raise RuntimeError(f"{specification.name}: {answer.text}")
            else:
                outcome |= {key: answer.json()[key] for key in ("minimum_cap_bytes", "max_sequence_length")}
            progress(specification.name, kind, f"{cap / MIB:.0f} MiB", outcome)
            own = {"specification": specification.name, "kind": kind, "cap_bytes": cap}
            yield {**own, "minimum_bytes": minimum, "unchunked_bytes": unchunked, **outcome}


@contextmanager
def _client(settings: Settings, calibration: Calibration) -> Iterator[tuple[TestClient, Engine]]:
    bind = database.engine(settings)
    try:
        with database.transaction(bind) as session:
            calibrations.store(session, calibration.device, "caps", calibration.to_json())
        with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
            yield client, bind
    finally:
        bind.dispose()


def _longest_chunks(client: TestClient, body: dict[str, Any], cap: int) -> dict[str, Any]:
    """What needs the most memory within `cap`. What the planner takes instead is the fastest: with some calibrations
    that needs little more than the minimum."""
    length = body["sequence_length"]
    while length > 1:
        chunking = {"chunk_length": length, "state_policy": "keep"}
        if client.post("/plans", json={**body, "memory_cap": cap, "chunking": chunking}).status_code == 200:
            return chunking
        length //= 2
    raise RuntimeError(f"no chunks fit into {cap} bytes")


def _supervised(job_id: str, cap: int, settings: Settings, bind: Engine, command: Sequence[str]) -> Record:
    """Run the job under `cap`, whatever it was planned for, attempt after attempt: how each ended, and its peak.

    A plan that did not hold is made anew by the planner, also where the first one was given.
    """
    with database.transaction(bind) as session:
        own = Job.spec.op("||", return_type=JSONB)(func.jsonb_build_object("chunking", "auto"))
        session.execute(update(Job).where(Job.id == job_id).values(memory_cap_bytes=cap, spec=own))
    chunks: list[int] = []
    while (job := _job(bind, job_id)).status == "queued":
        if job.attempt < len(chunks):
            raise RuntimeError(f"{job_id} was not claimed")
        chunks.append(job.plan["chunk_length"])
        device.announce(bind, device.discover(settings, drivers=()), "caps")
        supervise(job_id, settings, command)
    with database.transaction(bind) as session:
        failures = [row.data["error"] for row in events.page(session, job_id)[0] if row.type == "trainer_failed"]
    peaks = [error.get("peak_bytes") for error in failures]
    if job.status == "succeeded":
        peaks.append(job.measured_peak_bytes)
    return {
        "status": job.status,
        "predicted_bytes": job.predicted_peak_bytes,
        "chunk_lengths": chunks,
        "peaks_bytes": peaks,
        "codes": [error["code"] for error in failures],
    }


def _job(bind: Engine, job_id: str) -> Job:
    with database.transaction(bind) as session:
        return jobs.get(session, job_id)


def targets(runs: list[Record]) -> list[Target]:
    """What a cap promises."""
    under = [run for run in runs if run["kind"] == UNDER]
    feasible = [run for run in runs if run["kind"] not in (UNDER, WRONG)]
    wrong = [run for run in runs if run["kind"] == WRONG]
    highest = max((peak / run["cap_bytes"] for run in runs for peak in run["peaks_bytes"] if peak), default=0.0)
    replanned = [run for run in wrong if run["codes"][:1] == ["memory_cap_exceeded"] and run["status"] == "succeeded"]
    return [
        at_most("no run above its cap", highest, "largest peak / cap of any attempt, at most", ALLOWED_EXCESS),
        at_least("refused under the minimum", _share(under, "refused"), "share, at least", 1.0),
        at_least("trained from the minimum on", _share(feasible, "succeeded"), "share, at least", 1.0),
        at_least("wrong plans ended and mended", len(replanned) / len(wrong), "share, at least", 1.0),
    ]


def _share(runs: list[Record], status: str) -> float:
    return sum(bool(run["status"] == status) for run in runs) / len(runs)


def _summary(record: Record) -> str:
    where = record["machine"]
    first_time = sum(run["status"] == "succeeded" and len(run["peaks_bytes"]) == 1 for run in record["runs"])
    feasible = sum(run["kind"] not in (UNDER, WRONG) for run in record["runs"])
    return (
        f"{len(record['runs'])} caps on {where['cpu']}, {where['threads']} threads, torch {where['torch']}, in "
        f"{record['seconds']} s. Of the {feasible} jobs at or above the minimum {first_time} needed one attempt.\n\n"
        "![Measured peak against the cap, with the region that is refused](figures/caps.png)"
    )


def _runs(record: Record) -> str:
    head = ["", "cap", "MiB", "ended", "chunk", "peak, MiB", "peak / cap"]
    rows = []
    for run in record["runs"]:
        peaks = [peak or 0 for peak in run["peaks_bytes"]]
        cells = [
            " → ".join(str(length) for length in run.get("chunk_lengths", [])),
            " → ".join(f"{peak / MIB:.0f}" for peak in peaks),
            " → ".join(f"{peak / run['cap_bytes']:.2f}" for peak in peaks),
        ]
        ended = " → ".join([*("over the cap" for _ in run["codes"]), run["status"]])
        rows.append([run["specification"], run["kind"], f"{run['cap_bytes'] / MIB:.1f}", ended, *cells])
    return table(head, rows)


if __name__ == "__main__":
    main()

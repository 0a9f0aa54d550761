"""How long `POST /plans` takes: hundreds of different requests over HTTP, one after the other, to one uvicorn process.

    python -m benchmarks.plan_latency [--count 400] [--seed 0] [--out FOLDER]

Starts PostgreSQL and the API as `slimtune up` does, on two cores. Writes docs/figures/plan_latency.json and fills in
docs/planner.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench_measure import MIB, ROOT, Record, machine, progress
from benchmarks.page import Target, at_most, fill, table
from cli.embedded import EmbeddedServers
from service import calibrations, database
from service.settings import Settings
from slim_core.config import BUILTIN_MODELS
from slim_core.planning import default_calibration

CORES = 2
WARM_UP = 20
"""Requests that are not counted: the first ones import, connect and compile."""
BAR_MILLISECONDS = 20.0


@dataclass(frozen=True)
class Api:
    """One running uvicorn process."""

    pid: int
    port: int


def main() -> None:
    """Ask, judge and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for everything, in place of docs/ and docs/figures/")
    arguments = parser.parse_args()
    page = ROOT / "docs" / "planner.md"
    folder = page.parent / "figures"
    if arguments.out is not None:
        folder = arguments.out
        folder.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(page, folder / page.name))
    with tempfile.TemporaryDirectory() as scratch, running_api(Path(scratch)) as api:
        record = measured(api, arguments.count, arguments.seed)
    path = folder / "plan_latency.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    page.write_text(fill(page.read_text(), {"plan latency": _summary(record)}))
    for target in record["targets"]:
        print("met   " if target["met"] else "MISSED", target["name"], target["value"], target["unit"], target["bar"])
    print(f"written: {page} and {path}")


@contextmanager
def running_api(folder: Path) -> Iterator[Api]:
    """The API on a migrated database of its own, with a calibration."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:CORES])
    try:
        with EmbeddedServers(folder / "servers") as servers:
            settings = Settings(
                database_url=servers.database_url, redis_url=servers.redis_url, data_dir=folder / "data"
            )
            environment = {
                **os.environ,
                "DATABASE_URL": settings.database_url,
                "REDIS_URL": settings.redis_url,
                "SLIMTUNE_DATA_DIR": str(settings.data_dir),
            }
            migrate(settings)
            _calibrate(settings)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
            with (folder / "api.log").open("wb") as log:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            try:
                _wait_for(port, process)
                yield Api(process.pid, port)
            finally:
                process.terminate()
                process.wait()
    finally:
        os.sched_setaffinity(0, cores)


def migrate(settings: Settings) -> None:
    """Make the tables."""
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    environment = os.environ | {"DATABASE_URL": settings.database_url}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


def _calibrate(settings: Settings) -> None:
    bind = database.engine(settings)
    with database.transaction(bind) as session:
        calibrations.store(session, "cpu", "plan_latency", default_calibration().to_json())
    bind.dispose()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("uvicorn does not listen")


def requests(seed: int) -> Iterator[dict[str, Any]]:
    """Bodies of `POST /plans`, without end: models, lengths, batches and ways to train; a third of them cannot fit."""
    source = random.Random(seed)  # noqa: S311  # no secret
    while True:
        sequence_length = int(2 ** source.uniform(7, 20))
        low = source.random() < 1 / 3
        body: dict[str, Any] = {
            "model": source.choice(list(BUILTIN_MODELS)),
            "sequence_length": sequence_length,
            "batch_size": source.choice([1, 1, 2, 3, 8, 32]),
            "memory_cap": int(source.uniform(200, 340) if low else 2 ** source.uniform(9.5, 14)) * MIB,
            "steps": 1_000,
            "optimizer": {"name": source.choice(["adamw", "adafactor", "sgd"])},
            "method": {"type": source.choice(["full", "full", "lora"])},
            "precision": source.choice(["float32", "float32", "bfloat16"]),
        }
        if source.random() < 0.2:
            body["chunking"] = {"chunk_length": source.randint(1, sequence_length), "state_policy": "reverse"}
        yield body


def measured(api: Api, count: int, seed: int) -> Record:
    """Milliseconds of `count` requests on one kept connection, from the first byte sent to the last one read."""
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=60)
    milliseconds: dict[int, list[float]] = {200: [], 422: []}
    for number, body in zip(range(WARM_UP + count), requests(seed), strict=False):
        data = json.dumps(body)
        began = time.perf_counter()
        connection.request("POST", "/plans", data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        taken = 1_000 * (time.perf_counter() - began)
        if response.status not in milliseconds:
            raise RuntimeError(f"{response.status} for {data}: {answer[:500]!r}")
        if number >= WARM_UP:
            milliseconds[response.status].append(taken)
    connection.close()
    progress(f"{count} plans, the slowest in {max(max(taken) for taken in milliseconds.values()):.1f} ms")
    maps = Path(f"/proc/{api.pid}/maps").read_text()
    kinds = {"a plan": milliseconds[200], "a refusal": milliseconds[422]}
    times = {name: {"requests": len(taken), **_percentiles(taken)} for name, taken in kinds.items()}
    return {
        "targets": targets(times, torch_libraries=maps.count("libtorch")),
        "machine": machine(),
        "cores": CORES,
        "load": round(os.getloadavg()[0], 2),
        "seed": seed,
        "milliseconds": times,
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 2), "p95": round(cuts[94], 2), "max": round(max(values), 2)}


def targets(times: dict[str, Any], torch_libraries: int) -> list[Target]:
    """The median of both kinds of answers, and no torch."""
    return [
        *(
            at_most(f"POST /plans, {name}", times[name]["p50"], "ms, median, at most", BAR_MILLISECONDS)
            for name in times
        ),
        at_most("torch in the API's process", torch_libraries, "mappings of its libraries, at most", 0),
    ]


def _summary(record: Record) -> str:
    rows = [
        [f"`POST /plans`, {name}", str(values["requests"]), *(f"{values[key]:.1f}" for key in ("p50", "p95", "max"))]
        for name, values in record["milliseconds"].items()
    ]
    where = f"{record['machine']['cpu']}, {record['cores']} cores, load {record['load']}"
    head = ["milliseconds", "requests", "median", "95 %", "slowest"]
    return f"{table(head, rows)}\n\nOne uvicorn process and its client on {where} (`make plan-latency`)."


if __name__ == "__main__":
    main()

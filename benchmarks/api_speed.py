"""How fast the API is on two cores: one job looked at, jobs created, a large file downloaded.

    python -m benchmarks.api_speed [--short] [--out FOLDER] [--draw] [--before RECORD]

Starts `slimtune up` as a process in a folder of its own, with a key required, and wrk beside it. Writes
docs/figures/api_speed.json and .png and fills in docs/api-speed.md. Takes six minutes; `--short` shows in two that
everything works, and its times mean nothing. `--before` takes the record of an earlier version along for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

from benchmarks import api_speed_downloads, api_speed_figure
from benchmarks.api_speed_downloads import Client
from benchmarks.api_speed_report import blocks, targets
from benchmarks.bench_measure import MIB, ROOT, Record, machine, progress
from benchmarks.load_stage import CORES, Service, crowd, running_service, text_file
from benchmarks.page import fill
from service import database, keys

CONNECTIONS = 16
JOB: dict[str, Any] = {"model": "performer-tiny", "memory_cap": 400 * MIB, "steps": 1_000, "sequence_length": 4_096}
KINDS: dict[str, tuple[str, Record]] = {
    "GET /jobs/{id}": ("get", {}),
    "POST /jobs, a sweep": ("post", {"seed": "@N@", "optimizer": {"name": "adamw", "learning_rate": "1e-@N@"}}),
    "POST /jobs, all different": ("post", {"seed": "@N@", "sequence_length": "@LENGTH@"}),
}
"""What wrk asks for: its script, and what differs between the jobs. Of a sweep the plan is the same."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    jobs: int = 20_000
    rounds: int = 5
    seconds: int = 8
    """Of wrk, a kind and a round."""
    file_bytes: int = 1 << 30


SHORT = Size(jobs=300, rounds=1, seconds=1, file_bytes=64 * MIB)


def main() -> None:
    """Run, judge, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="less of everything; the times mean nothing")
    parser.add_argument("--out", type=Path, help="folder for everything, in place of docs/ and docs/figures/")
    parser.add_argument("--draw", action="store_true", help="run nothing; write everything again from the record")
    parser.add_argument("--before", type=Path, help="record of an earlier version (default: that of last time)")
    arguments = parser.parse_args()
    page = ROOT / "docs" / "api-speed.md"
    known = folder = page.parent / "figures"
    if arguments.out is not None:
        folder = arguments.out
        folder.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(page, folder / page.name))
    last = known / "api_speed.json"
    before = json.loads((arguments.before or last).read_text()) if arguments.before or last.exists() else {}
    if arguments.draw:
        record = json.loads((folder / last.name).read_text())
    else:
        record = measured(SHORT if arguments.short else Size())
    record["before"] = _compared(before) if arguments.before else record.get("before", before.get("before"))
    record["targets"] = targets(record)
    (folder / last.name).write_text(json.dumps(record) + "\n")
    page.write_text(fill(page.read_text(), blocks(record)))
    api_speed_figure.draw(record, folder / "api_speed.png")
    for target in record["targets"]:
        print("met   " if target["met"] else "MISSED", target["name"], target["value"], target["unit"], target["bar"])
    print(f"written: {page} and {folder / last.name}")


def _compared(record: Record) -> Record:
    """What of an earlier version's record is compared."""
    return {name: record[name] for name in ("machine", "load", "rounds", "downloads", "memory")}


def measured(size: Size) -> Record:
    """Everything, on a service that is started for it."""
    _need("wrk", "nginx", "curl")
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="speed-", dir="/tmp") as scratch:  # a short path, for sockets
        home = Path(scratch)
        with running_service(home, {"SLIMTUNE_AUTHENTICATION": "keys"}) as service, _client(service) as client:
            request = {**JOB, "dataset": _upload(client, home)}
            template = _job(client, {**request, "name": "template"})
            client.post(f"/jobs/{template}/cancel").raise_for_status()
            with service.connect() as connection:
                others = crowd(connection, template, size.jobs, long_steps=200)
            progress(f"{size.jobs} jobs in the table")
            holder = _hold_the_device(service, client, request)
            url = api_speed_downloads.add_checkpoint(service, holder, home, size.file_bytes)
            asker = Client(f"{service.url}{url}", client.headers["authorization"])
            memory = api_speed_downloads.memory(service.api(), asker, size.rounds)
            progress("memory", memory["before"], max(rss for _, rss in memory["resident"]))
            downloads = api_speed_downloads.compare(service.api(), asker, home, size.rounds)
            rounds = _rounds(service, client, home, others.jobs, request, size)
    return {
        "machine": machine(),
        "cores": CORES,
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.monotonic() - began),
        "size": asdict(size),
        "memory": memory,
        "downloads": downloads,
        "rounds": rounds,
    }


def _need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)} (Debian, Ubuntu: apt-get install {' '.join(missing)})")


@contextmanager
def _client(service: Service) -> Iterator[httpx2.Client]:
    """With a key of its own."""
    bind = service.engine()
    with database.transaction(bind) as session:
        _, key = keys.create(session, "default", "benchmark")
    bind.dispose()
    headers = {"authorization": f"Bearer {key}"}
    with httpx2.Client(base_url=service.url, headers=headers, trust_env=False, timeout=60) as client:
        yield client


def _upload(client: httpx2.Client, folder: Path) -> str:
    with text_file(folder).open("rb") as file:
        answer = client.post("/datasets", files={"file": ("topics.jsonl", file)})
    answer.raise_for_status()
    return str(answer.json()["id"])


def _job(client: httpx2.Client, request: Record) -> str:
    answer = client.post("/jobs", json=request)
    answer.raise_for_status()
    return str(answer.json()["id"])


def _hold_the_device(service: Service, client: httpx2.Client, request: Record) -> str:
    """A job that has the whole device, as the database has it, and computes nothing: those that are created wait."""
    job = _job(client, {**request, "name": "holder"})
    with service.connect() as connection:
        connection.execute(
            "UPDATE jobs SET status = 'running', attempt = attempt + 1, worker = 'benchmark', device_id = devices.id, "
            "memory_cap_bytes = memory_bytes, lease_until = now() + interval '1 day' FROM devices WHERE jobs.id = %s",
            (job,),
        )
    return job


def _rounds(
    service: Service, client: httpx2.Client, home: Path, jobs: list[str], request: Record, size: Size
) -> list[Record]:
    """What wrk reached with each kind, in turns, and what the service's processes used meanwhile."""
    paths = home / "paths.txt"
    paths.write_text("".join(f"/jobs/{job}\n" for job in jobs))
    rounds: list[Record] = []
    for number in range(-1, size.rounds):  # the first one is not counted
        for kind, (script, changes) in KINDS.items():
            body = home / "body.json"
            body.write_text(re.sub(r'"(@[A-Z]+@|1e-@N@)"', _number, json.dumps({**request, **changes})))
            arguments = [str(paths)] if script == "get" else [str(body), f"{number}-{len(rounds)}-{kind[-5:-1]}"]
            used = service.cpu_seconds()
            outcome = _wrk(service.url, client.headers["authorization"], script, arguments, size.seconds)
            cores = {role: seconds - used[role] for role, seconds in service.cpu_seconds().items()}
            if number >= 0:
                rounds.append({"kind": kind, **outcome, "cpu_seconds": cores})
                progress(kind, outcome)
    return rounds


def _number(found: re.Match[str]) -> str:
    """A placeholder without its quotes: wrk puts a number there."""
    return "0.000@N@1" if found[1].startswith("1e") else found[1]


def _wrk(url: str, authorization: str, script: str, arguments: list[str], seconds: int) -> Record:
    command = [
        *("wrk", "--threads", "1", "--connections", str(CONNECTIONS), "--duration", f"{seconds}s", "--timeout", "10s"),
        *("--header", f"Authorization: {authorization}", "--script", f"benchmarks/api_speed_{script}.lua"),
        *(url, "--", *arguments),
    ]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = re.search(r"^OUTCOME (.*)$", said, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"wrk said:\n{said}")
    outcome: Record = json.loads(found[1])
    return outcome


if __name__ == "__main__":
    main()

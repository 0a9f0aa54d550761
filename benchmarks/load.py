"""The API under load while a job trains: 200 requests a second on two cores, on a table of 20,000 jobs.

    python -m benchmarks.load [--short] [--out FOLDER] [--draw]

Starts `slimtune up` as a process in a folder of its own. Writes docs/figures/load.json and .png and fills in
docs/load.md. Takes four minutes; `--short` shows in less than one that everything works, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import load_figure
from benchmarks.bench_measure import MIB, ROOT, Record, machine, progress
from benchmarks.load_client import Played, Request, get, play, post
from benchmarks.load_report import PAGE_ROWS, SUBMISSIONS, blocks, targets
from benchmarks.load_stage import CORES, Crowd, Service, crowd, explained, nodes, reached, running_service, upload
from benchmarks.page import fill
from cli.client import Client, Job, ServiceError
from service import database, metrics
from service.models import Metric

JOB: dict[str, Any] = {"model": "performer-tiny", "memory_cap": 400 * MIB, "steps": 100_000}
SHARES = {
    "GET /jobs/{id}": 0.45,
    "GET /jobs/{id}/metrics": 0.18,
    "GET /jobs/{id}/events": 0.15,
    "GET /jobs": 0.12,
    "GET /healthz": 0.09,
    "POST /plans": 0.01,
}
LISTS = ("", "?status=running", "?status=succeeded", "?status=failed", "?after={id}", "?status=succeeded&after={id}")
SETTLE_SECONDS = 2.0
"""Steps that are written this soon after a phase began are nobody's: they began before it, and are written up to a
second late."""
LARGEST_PAGE_ROWS = 10_000
ENDED = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    jobs: int = 20_000
    long_steps: int = 1_000_000
    rate: int = 200
    """Requests a second."""
    load_seconds: float = 60.0
    quiet_seconds: float = 30.0
    """Before the load, and after it."""
    pages: int = 50
    """At random places of the long curve."""
    sequence_length: int = 4_096
    """Of the job that trains: a step takes a few hundred milliseconds."""


SHORT = Size(jobs=300, long_steps=20_000, rate=20, load_seconds=5.0, quiet_seconds=5.0, pages=3, sequence_length=512)


def main() -> None:
    """Run, judge, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="less of everything; the times mean nothing")
    parser.add_argument("--out", type=Path, help="folder for everything, in place of docs/ and docs/figures/")
    parser.add_argument("--draw", action="store_true", help="run nothing; write everything again from the record")
    arguments = parser.parse_args()
    page = ROOT / "docs" / "load.md"
    folder = page.parent / "figures"
    if arguments.out is not None:
        folder = arguments.out
        folder.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(page, folder / page.name))
    path = folder / "load.json"
    record = json.loads(path.read_text()) if arguments.draw else measured(SHORT if arguments.short else Size())
    record = {**record, "targets": targets(record)}
    path.write_text(json.dumps(record) + "\n")
    page.write_text(fill(page.read_text(), blocks(record)))
    load_figure.draw(record, folder / "load.png")
    for target in record["targets"]:
        print("met   " if target["met"] else "MISSED", target["name"], target["value"], target["unit"], target["bar"])
    print(f"written: {page} and {path}")


def measured(size: Size, prepare: Callable[[Path], None] = lambda _: None) -> Record:
    """Everything, on a service that is started for it, in a folder that `prepare` may have made ready."""
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="load-", dir="/tmp") as scratch:  # a short path, for sockets
        home = Path(scratch)
        prepare(home)
        with running_service(home) as service, Client(service.url) as client:
            request = {**JOB, "sequence_length": size.sequence_length, "dataset": upload(client, home)}
            template = client.jobs.create(**{**request, "name": "template"}).cancel().id
            with service.connect() as connection:
                others = crowd(connection, template, size.jobs, size.long_steps)
            progress(f"{size.jobs} jobs in the table, {size.long_steps} rows in the longest curve")
            pages = _pages(service, others.long, size)
            job = client.jobs.create(**request)
            reached(job, 5)
            phases = _phases(service, job, _Mix(others, job.id, request), size)
            submissions = _submissions(service, request)
            training = _training(service, job.id, phases)
            job.cancel()
    return {
        "machine": machine(),
        "cores": CORES,
        "load_before": round(load, 2),
        "seconds": round(time.monotonic() - began),
        "size": asdict(size),
        **training,
        "pages": pages,
        "submissions": submissions,
    }


class _Mix:
    """What clients that poll ask for, drawn at random, the same in every run. Half of those who look at one job look at
    the one that trains."""

    def __init__(self, others: Crowd, job: str, plan: dict[str, Any]) -> None:
        self._others = others
        self.job = job
        self._plan = json.dumps(plan)
        self._random = random.Random(0)  # noqa: S311  # no secret

    def requests(self, seconds: float, rate: int, step: int, step_seconds: float) -> list[Request]:
        """`rate * seconds` requests at times drawn evenly: arrivals of a Poisson process of which the count is known.

        `step` is where the job is that trains, and how fast it goes on: who watches it has the rows up to then.
        """
        times = sorted(self._random.uniform(0, seconds) for _ in range(int(rate * seconds)))
        # One of each kind at least: in a short run the rare ones would be luck.
        kinds = [*SHARES, *self._random.choices(list(SHARES), list(SHARES.values()), k=len(times) - len(SHARES))]
        return [
            Request(kind, due, self._text(kind, step + int(due / step_seconds)))
            for due, kind in zip(times, kinds, strict=True)
        ]

    def _text(self, kind: str, step: int) -> str:
        draw, others = self._random, self._others
        watched = draw.random() < 0.5
        if kind == "POST /plans":
            return post("/plans", self._plan)
        path = kind.removeprefix("GET ")
        if kind == "GET /jobs":
            return get(path + draw.choice(LISTS).format(id=draw.choice(others.jobs)))
        if kind == "GET /jobs/{id}/metrics":
            job = self.job if watched else draw.choice(others.with_curve)
            return get(f"{path.format(id=job)}?after_step={max(step - draw.randrange(10), 0) if watched else 100}")
        job = self.job if watched else draw.choice(others.jobs)
        if kind == "GET /jobs/{id}/events":
            return get(f"{path.format(id=job)}?after={draw.choice((0, others.last_event))}")
        return get(path.format(id=job))


def _phases(service: Service, job: Job, mix: _Mix, size: Size) -> list[Record]:
    """The job without load, with it, and without it again."""
    quiet = size.quiet_seconds
    before = _phase(service, "before", lambda: time.sleep(quiet))
    progress_ = job.refresh().progress
    requests = mix.requests(size.load_seconds, size.rate, progress_["step"], progress_["step_seconds"] or 1.0)
    during = _phase(service, "during", lambda: play(service.port, requests))
    after = _phase(service, "after", lambda: time.sleep(quiet))
    return [before, during, after]


def _phase(service: Service, name: str, what: Callable[[], Played | None]) -> Record:
    """When it was, what the processes used, and what became of the requests."""
    began, used = time.time(), service.cpu_seconds()
    played = what()
    ended = time.time()
    wall = ended - began
    cores = {role: (seconds - used[role]) / wall for role, seconds in service.cpu_seconds().items()}
    if played is None:
        return {"name": name, "began": began, "ended": ended, "cores": cores, "requests": []}
    progress("with load", cores)
    return {
        "name": name,
        "began": began,
        "ended": ended,
        "cores": cores | {"client": played.cpu_seconds / wall},
        "requests": [[o.kind, round(o.due, 4), round(1_000 * o.latency_seconds, 2), o.status] for o in played.outcomes],
        "answered_seconds": round(played.seconds, 3),
        "client_late_milliseconds": round(1_000 * max(o.late_seconds for o in played.outcomes), 2),
    }


def _training(service: Service, job: str, phases: list[Record]) -> Record:
    """The phases, and every step of the job: seconds from the beginning of the first phase, and what it took."""
    began = phases[0]["began"]
    query = "SELECT extract(epoch FROM created_at)::float8, step_seconds FROM metrics WHERE job_id = %s ORDER BY step"
    with service.connect() as connection:
        rows = connection.execute(query, (job,)).fetchall()
    steps = [[round(at - began, 2), seconds] for at, seconds in rows if seconds is not None]
    for phase in phases:
        phase["began"], phase["ended"] = phase["began"] - began, phase["ended"] - began
        phase["step_seconds"] = [s for at, s in steps if phase["began"] + SETTLE_SECONDS <= at <= phase["ended"]]
    return {"phases": phases, "steps": steps}


def _pages(service: Service, job: str, size: Size) -> Record:
    """Milliseconds of pages at random places of the long curve, over HTTP and by the service's function, and how the
    database finds one."""
    places = random.Random(1)  # noqa: S311  # no secret
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    bind = service.engine()

    def by_http(after: int, rows: int) -> bytes:
        limit = "" if rows == PAGE_ROWS else f"&limit={rows}"
        connection.request("GET", f"/jobs/{job}/metrics?after_step={after}{limit}")
        return connection.getresponse().read()

    def by_service(after: int, rows: int) -> list[Metric]:
        with database.transaction(bind) as session:
            return metrics.page(session, job, after, rows)[0]

    def steps_of(page: bytes | list[Metric]) -> list[int]:
        return [row["step"] for row in json.loads(page)["data"]] if isinstance(page, bytes) else [r.step for r in page]

    milliseconds: dict[str, list[float]] = {}
    ways: dict[str, Callable[[int, int], bytes | list[Metric]]] = {"HTTP": by_http, "service": by_service}
    for (name, ask), rows in itertools.product(ways.items(), (PAGE_ROWS, LARGEST_PAGE_ROWS)):
        ask(0, rows)  # the first one connects
        values = milliseconds[f"{name} {rows}"] = []
        for _ in range(size.pages):
            after = places.randrange(size.long_steps - rows)
            began = time.perf_counter()
            page = ask(after, rows)
            values.append(round(1_000 * (time.perf_counter() - began), 2))
            if (steps := steps_of(page)) != list(range(after + 1, after + rows + 1)):
                raise RuntimeError(f"{name}: not the {rows} rows after step {after}: {steps[:3]}")
    with database.transaction(bind) as session:
        plan = explained(session, lambda session: metrics.page(session, job, size.long_steps // 2, PAGE_ROWS))
    connection.close()
    bind.dispose()
    progress("pages", {name: statistics.median(values) for name, values in milliseconds.items()})
    scans = [{key: node.get(key) for key in ("Node Type", "Index Name", "Actual Rows")} for node in nodes(plan)]
    return {"milliseconds": milliseconds, "plan": scans, "execution_milliseconds": plan["Execution Time"]}


def _submissions(service: Service, request: dict[str, Any]) -> Record:
    """Many jobs posted at the same moment, each by a thread and connection of its own; what the table has of them; and
    what they are after all were cancelled."""
    names = [f"submission {number}" for number in range(SUBMISSIONS)]
    together = threading.Barrier(SUBMISSIONS)

    def submit(name: str) -> tuple[str | None, float]:
        with Client(service.url) as client:
            together.wait()
            began = time.perf_counter()
            try:
                return client.jobs.create(**{**request, "name": name}).id, time.perf_counter() - began
            except ServiceError as error:
                progress(name, error)
                return None, time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(SUBMISSIONS) as threads:
        answers = list(threads.map(submit, names))
    seconds = time.perf_counter() - began
    query = "SELECT jobs.id, name, count(job_events) FROM jobs JOIN job_events ON job_id = jobs.id AND type = 'queued' "
    with service.connect() as connection:
        rows = connection.execute(query + "WHERE name LIKE 'submission %' GROUP BY jobs.id").fetchall()
    there = Counter(name for _, name, _ in rows)
    answered = [job for job, _ in answers if job is not None]
    with Client(service.url) as client:
        jobs = [client.jobs.get(job).cancel() for job, *_ in rows]
        deadline = time.monotonic() + 60
        while (left := sum(job.refresh().status not in ENDED for job in jobs)) and time.monotonic() < deadline:
            time.sleep(0.5)
    return {
        "answered": len(answered),
        "lost": sum(there[name] == 0 for name in names) + len(set(answered) - {job for job, *_ in rows}),
        "doubled": sum(there[name] > 1 for name in names) + sum(queued != 1 for *_, queued in rows),
        "not_ended": left,
        "seconds": round(seconds, 3),
        "slowest_seconds": round(max(seconds for _, seconds in answers), 3),
    }


if __name__ == "__main__":
    main()

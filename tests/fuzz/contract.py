"""schemathesis over the document of a running API: every check, every phase, with a seed and a bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from service import calibrations, database, keys, runs
from service.settings import Settings
from service.storage import Storage
from tests.fuzz.live import ROOT, LiveApi
from tests.integration import seed

PHASES = "examples,coverage,fuzzing,stateful"
HOOK = "https://hooks.example.com/slimtune"
ENVIRONMENT = {"SLIMTUNE_WEBHOOK_ALLOWED": HOOK}
"""Of an API whose every route can be asked."""


@dataclass(frozen=True)
class Verdict:
    """What came of a run."""

    report: dict[str, Any]
    output: str

    @property
    def cases(self) -> int:
        return int(self.report["test_cases"]["generated"])

    @property
    def failures(self) -> list[str]:
        """One line each; empty if the API did as its document says."""
        found = [f"{', '.join(failure['operations'])}: {failure['title']}" for failure in self.report["failures"]]
        return found + [f"{error['title']} ({error['count']})" for error in self.report["errors"]]


def add_key(api: LiveApi) -> str:
    """A key for the API."""
    bind = database.engine(Settings(database_url=api.database_url, redis_url="redis://", data_dir=api.data_dir))
    with database.transaction(bind) as session:
        _, key = keys.create(session, "default", "fuzz")
    bind.dispose()
    return key


def furnish(api: LiveApi, headers: dict[str, str]) -> str:
    """Put in what only workers make: a calibration, without which it is not ready, and a job with a checkpoint. It is
    over, and its metrics were asked for."""
    settings = Settings(database_url=api.database_url, redis_url="redis://", data_dir=api.data_dir)
    bind, storage = database.engine(settings), Storage(api.data_dir)
    with httpx2.Client(base_url=api.url, headers=headers) as client:
        dataset = client.post("/datasets", files={"file": ("text.txt", b"Hello, world. " * 100)}).json()["id"]
        body = {"model": "performer-tiny", "dataset": dataset, "memory_cap": "4GiB", "sequence_length": 64, "steps": 9}
        job = client.post("/jobs", json=body).json()["id"]
    claimed = seed.claim(bind, job)
    with database.transaction(bind) as session:
        seed.add_checkpoint(session, storage, claimed, 3)
        calibrations.store(session, "cpu", "worker-1", {"threads": 2})
    with database.transaction(bind) as session:
        runs.finish(session, job, claimed.attempt, "succeeded")
    bind.dispose()
    metrics = f"result_{job.removeprefix('job_')}_metrics"
    httpx2.get(f"{api.url}/v1/files/{metrics}", headers=headers).raise_for_status()
    return str(job)


def conform(
    api: LiveApi,
    folder: Path,
    seed: int,
    *,
    examples: int,
    max_seconds: int | None = None,
    phases: str = PHASES,
    checks: str = "all",
    key: str | None = None,
) -> Verdict:
    """Run it; `examples` is the most per route and phase, `max_seconds` ends the run whatever it has got to. `key` is
    for an API that wants one."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    report = folder / "schemathesis.json"
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json", "--phases", phases,
        "--seed", str(seed), "--max-examples", str(examples), "--checks", checks,
        "--continue-on-failure", "--no-shrink", "--request-timeout", "30",
        "--report", "json", "--report-json-path", str(report),
    ]  # fmt: skip
    for name, value in headers.items():
        command += ["--header", f"{name}: {value}"]
    if max_seconds is not None:
        command += ["--max-time", str(max_seconds)]
    environment = (
        os.environ
        | {"FUZZ_JOB": furnish(api, headers)}
        | {"SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    )
    run = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert report.exists(), run.stdout[-3_000:]
    return Verdict(json.loads(report.read_text()), run.stdout)

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

from service import calibrations, database, jobs
from service.settings import Settings
from service.storage import Storage
from tests.fuzz.live import ROOT, LiveApi
from tests.integration import seed

PHASES = "examples,coverage,fuzzing,stateful"


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


def furnish(api: LiveApi) -> str:
    """Put in what only workers make: a calibration, without which it is not ready, and a job with a checkpoint."""
    settings = Settings(database_url=api.database_url, redis_url="redis://", data_dir=api.data_dir)
    bind, storage = database.engine(settings), Storage(api.data_dir)
    with httpx2.Client(base_url=api.url) as client:
        dataset = client.post("/datasets", files={"file": ("text.txt", b"Hello, world. " * 100)}).json()["id"]
        body = {"model": "performer-tiny", "dataset": dataset, "memory_cap": "4GiB", "sequence_length": 64, "steps": 9}
        job = client.post("/jobs", json=body).json()["id"]
    claimed = seed.claim(bind, job)
    with database.transaction(bind) as session:
        seed.add_checkpoint(session, storage, claimed, 3)
        calibrations.store(session, "cpu", "worker-1", {"threads": 2})
    with database.transaction(bind) as session:
        jobs.request(session, job, "cancel")
    bind.dispose()
    return str(job)


def conform(
    api: LiveApi, folder: Path, seed: int, *, examples: int, max_seconds: int | None = None, phases: str = PHASES
) -> Verdict:
    """Run it; `examples` is the most per route and phase, `max_seconds` ends the run whatever it has got to."""
    report = folder / "schemathesis.json"
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json", "--phases", phases,
        "--seed", str(seed), "--max-examples", str(examples), "--checks", "all", "--continue-on-failure", "--no-shrink",
        "--report", "json", "--report-json-path", str(report), "--request-timeout", "30",
    ]  # fmt: skip
    if max_seconds is not None:
        command += ["--max-time", str(max_seconds)]
    environment = (
        os.environ
        | {"FUZZ_JOB": furnish(api)}
        | {"SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    )
    run = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert report.exists(), run.stdout[-3_000:]
    return Verdict(json.loads(report.read_text()), run.stdout)

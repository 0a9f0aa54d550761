"""The API against whatever is sent to it: 10,000 hostile requests, then schemathesis for as long as is left.

    python -m tests.fuzz [--seed N] [--seconds S] [--requests N] [--out FOLDER]

The seed is drawn and printed where none is given. Writes docs/figures/fuzz.json and .png; exits with 1 after a
violation.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bench_measure import ROOT, machine
from cli.embedded import EmbeddedServers
from tests.chaos.arena import migrate
from tests.fuzz import figure
from tests.fuzz.contract import ENVIRONMENT, Verdict, conform
from tests.fuzz.live import LiveApi, live_api
from tests.fuzz.siege import GROWTH_BYTES, MAX_ERROR_BYTES, Outcome, besiege

FULL_REQUESTS = 10_000
EXAMPLES = 50
"""Of each route and phase, at most; the time ends before."""


def main() -> int:
    """Besiege, compare with the document, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--seconds", type=int, default=600, help="for schemathesis")
    parser.add_argument("--requests", type=int, default=FULL_REQUESTS, help="hostile ones")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="folder of fuzz.json and .png")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch, an_api(Path(scratch)) as (api, folder):
        began = time.monotonic()
        outcome = besiege(api, arguments.seed, arguments.requests)
        seconds = time.monotonic() - began
        print(f"{outcome.requests} hostile requests in {seconds:.0f} s, by status: {dict(outcome.statuses)}")
        print(*outcome.violations[:20], sep="\n", flush=True)
        verdict = conform(api, folder, arguments.seed, examples=EXAMPLES, max_seconds=arguments.seconds)
        print(verdict.output)
    record = {
        "targets": targets(outcome, verdict),
        "machine": machine(),
        "seed": arguments.seed,
        "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "hostile": {
            "seconds": round(seconds, 1),
            "requests": outcome.requests,
            "statuses": dict(sorted(outcome.statuses.items())),
            "kinds": by_kind(outcome),
            "violations": outcome.violations[:100],
            "largest_error_bytes": outcome.largest_error_bytes,
            "batches_counted": outcome.compared,
            "growth_bytes": outcome.growth_bytes,
        },
        "schemathesis": {
            "version": verdict.report["schemathesis_version"],
            "seconds": round(verdict.report["running_time"], 1),
            "phases": {name: phase["status"] for name, phase in verdict.report["phases"].items()},
            "cases": verdict.cases,
            "failures": verdict.failures,
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "fuzz.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    figure.draw(record, path.with_suffix(".png"))
    print(f"written: {path} and its picture")
    return 0 if not outcome.violations and not verdict.failures else 1


@contextmanager
def an_api(scratch: Path) -> Iterator[tuple[LiveApi, Path]]:
    """On servers of its own, and a folder."""
    scratch.chmod(0o711)
    with EmbeddedServers(scratch / "s", durable=False) as servers:
        with servers.connect() as connection:
            connection.execute("CREATE DATABASE fuzz")
        url = servers.database_url_of("fuzz")
        migrate(url)
        with live_api(url, servers.redis_url, scratch, **ENVIRONMENT) as api:
            yield api, scratch


def by_kind(outcome: Outcome) -> dict[str, dict[str, int]]:
    """Answers by status, for each kind of attack."""
    kinds: dict[str, dict[str, int]] = {}
    for (kind, status), count in sorted(outcome.answers.items()):
        kinds.setdefault(kind, {})[status] = count
    return kinds


def targets(outcome: Outcome, verdict: Verdict) -> list[dict[str, Any]]:
    """What is promised, and what came of it."""
    failing = sum(count for status, count in outcome.statuses.items() if status.startswith("5") and status != "501")
    enough = outcome.requests >= FULL_REQUESTS
    rows = (
        ("hostile requests", len(outcome.violations), f"violations in {outcome.requests:,}", 0, enough),
        ("server errors", failing, f"5xx in {outcome.requests:,}", 0, enough),
        ("largest error", outcome.largest_error_bytes, "bytes", MAX_ERROR_BYTES, True),
        ("memory", outcome.growth_bytes, "bytes of growth", GROWTH_BYTES, True),
        ("schemathesis", len(verdict.failures), f"failures in {verdict.cases:,} cases", 0, verdict.cases >= 1_000),
    )
    return [
        {"name": name, "value": value, "unit": unit, "bar": bar, "met": value <= bar and whole}
        for name, value, unit, bar, whole in rows
    ]


if __name__ == "__main__":
    sys.exit(main())

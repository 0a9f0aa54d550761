"""Every fault that slimtune says it survives, inflicted as often as it says, with a seed.

    python -m tests.chaos [--seed N] [--only NAME ...] [--short] [--draw] [--out FOLDER]

One line for each fault. Writes docs/figures/chaos.json and .png and fills in docs/chaos.md; with `--only` the other
faults keep their records.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bench_measure import ROOT, machine
from benchmarks.page import fill, targets_table
from cli.embedded import EmbeddedServers
from tests.chaos.arena import Arena, migrate
from tests.chaos.fault import Fault
from tests.chaos.figure import draw
from tests.chaos.table import FAULTS

Record = dict[str, Any]


def main() -> None:
    """Inflict, judge, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS], help="these faults")
    parser.add_argument("--short", action="store_true", help="as often as the tests do")
    parser.add_argument("--draw", action="store_true", help="inflict nothing; write everything again from the record")
    parser.add_argument("--out", type=Path, help="folder for everything, in place of docs/ and docs/figures/")
    arguments = parser.parse_args()
    page = ROOT / "docs" / "chaos.md"
    folder = page.parent / "figures"
    path = folder / "chaos.json"
    earlier = json.loads(path.read_text())["faults"] if path.exists() else {}
    if arguments.out is not None:
        folder = arguments.out
        folder.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(page, folder / page.name))
        path = folder / path.name
    chosen = [fault for fault in FAULTS if arguments.only is None or fault.name in arguments.only]
    inflicted = {} if arguments.draw else inflict_all(chosen, arguments.seed, short=arguments.short)
    faults = {fault.name: found for fault in FAULTS if (found := inflicted.get(fault.name, earlier.get(fault.name)))}
    record: Record = {"targets": targets(faults), "machine": machine(), "faults": faults}
    path.write_text(json.dumps(record, indent=1) + "\n")
    page.write_text(fill(page.read_text(), {"targets": targets_table(record["targets"]), "summary": summary(faults)}))
    draw(faults, folder / "chaos.png")
    print(f"written: {page}, {path}, and the figure in {folder}")


def inflict_all(faults: list[Fault], seed: int, *, short: bool) -> dict[str, Record]:
    """One after the other, on servers that they share."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # as in the tests: threads that wait must not take the cores
    records = {}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)
        with EmbeddedServers(folder / "s", durable=False) as servers:
            with servers.connect() as connection:
                connection.execute("CREATE DATABASE template")
            migrate(servers.database_url_of("template"))
            for fault in faults:
                arena = Arena(servers, "template", folder, seed)
                records[fault.name] = inflict(fault, arena, fault.short if short else fault.full)
    return records


def inflict(fault: Fault, arena: Arena, cycles: int) -> Record:
    """One fault, so many times; prints its line."""
    began = time.monotonic()
    violations = fault.violations(arena, cycles)
    seconds = time.monotonic() - began
    print(
        f"{fault.name:12} {cycles:6} {fault.unit:22} {len(violations):3} violations {seconds:7.1f} s  {fault.title}",
        *(f"    {violation}" for violation in violations[:20]),
        sep="\n",
        flush=True,
    )
    return {
        "title": fault.title,
        "unit": fault.unit,
        "cycles": cycles,
        "complete": cycles >= fault.full,
        "violations": violations,
        "seconds": round(seconds, 1),
        "recovery_seconds": [round(value, 3) for value in arena.recoveries],
        "seed": arena.seed,
        "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }


def targets(faults: dict[str, Record]) -> list[dict[str, Any]]:
    """No violation, and as many cycles as promised."""
    return [
        {
            "name": name,
            "value": len(record["violations"]),
            "unit": f"violations in {record['cycles']:,} {record['unit']}",
            "bar": 0,
            "met": not record["violations"] and record["complete"],
        }
        for name, record in faults.items()
    ]


def summary(faults: dict[str, Record]) -> str:
    """What the figure shows."""
    cycles = sum(record["cycles"] for record in faults.values())
    violations = sum(len(record["violations"]) for record in faults.values())
    minutes = sum(record["seconds"] for record in faults.values()) / 60
    return (
        f"{cycles:,} faults in {minutes:.0f} minutes, {violations} violations.\n\n"
        "![Seconds from each fault until the job went on](figures/chaos.png)"
    )


if __name__ == "__main__":
    main()

"""Speed and memory of `slim_core` beside its peers: tables, figures and a machine-readable record.

    python -m benchmarks.bench [operator step memory tradeoff longer] [--quick] [--draw] [--out FOLDER]

Every section named (all of them by default) is measured and replaces its part of bench.json; targets, figures and
tables are then made from all that is there. `--quick` runs tiny sizes, to see that everything works, and writes to a
temporary folder unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench_figures import FIGURES
from benchmarks.bench_measure import ROOT, Record, measured, progress
from benchmarks.bench_memory import longer_section, memory_section, tradeoff_section
from benchmarks.bench_operator import operator_section
from benchmarks.bench_report import write_report
from benchmarks.bench_step import step_section
from benchmarks.bench_targets import targets
from benchmarks.paper_runs import write_json

SECTIONS: dict[str, Callable[[bool], Record]] = {
    "operator": operator_section,
    "step": step_section,
    "memory": memory_section,
    "tradeoff": tradeoff_section,
    "longer": longer_section,
}
REPORT = ROOT / "docs" / "benchmarks.md"


def main() -> None:
    """Measure, judge, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into a temporary folder")
    parser.add_argument("--out", type=Path, help="folder for everything, in place of docs/ and docs/figures/")
    parser.add_argument("--draw", action="store_true", help="measure nothing; make figures and tables again")
    arguments = parser.parse_args()
    names = arguments.sections or list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    folder, report = _places(arguments.out, quick=arguments.quick)
    path = folder / "bench.json"
    sections = json.loads(path.read_text())["sections"] if path.exists() else {}
    if arguments.draw and not sections:
        parser.error(f"{path}: nothing has been measured yet")
    for name in [] if arguments.draw else names:
        progress(f"section {name}")
        sections[name] = measured(SECTIONS[name], quick=arguments.quick)
        _write(path, sections)
    record = _write(path, sections)
    write_report(record, report)
    for name, section in sections.items():
        FIGURES[name](section["result"], folder / f"bench_{name}.png")
    for target in record["targets"]:
        print("met   " if target["met"] else "MISSED", target["name"], target["value"], target["unit"], target["bar"])
    print(f"written: {report}, {path}, figures in {folder}")


def _write(path: Path, sections: Record) -> Record:
    """The record of all sections, the machine being that of the last one measured."""
    latest = max(sections.values(), key=lambda section: section["started"])
    record = {"targets": targets(sections), "machine": latest["machine"], "sections": sections}
    write_json(path, record, indent=1)
    return record


def _places(out: Path | None, *, quick: bool) -> tuple[Path, Path]:
    """Folder of figures and record, and the report, which outside docs/ is a copy to fill in."""
    if out is None and not quick:
        folder = REPORT.parent / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder, REPORT
    folder = out or Path(tempfile.mkdtemp(prefix="slimtune-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder, Path(shutil.copy(REPORT, folder / REPORT.name))


if __name__ == "__main__":
    main()

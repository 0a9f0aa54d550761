"""Reproduces what "Sub-Linear Memory: How to Make Performers SLiM" claims, and writes docs/paper.md.

    make paper
    python -m benchmarks.paper copying language gradients report     the same, in parts; any of them alone
    python -m benchmarks.paper copying --steps 40 --work /tmp/paper  a quick look at whether it runs

Each run is a process of one thread, two side by side. A run that is complete is skipped, one that was stopped goes on
from its last minute: start the program again after any interruption.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import paper_copying, paper_gradients, paper_language, paper_report
from benchmarks.paper_runs import WORK, Run, perform, read_result

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("copying", "language", "gradients", "report")


def main() -> int:
    """Run the parts that are named, all of them by default."""
    parser = argparse.ArgumentParser(description="Reproduce the claims of the SLiM Performer paper.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each (default 2)")
    parser.add_argument("--steps", type=int, help="training steps in place of each experiment's own, for a quick look")
    parser.add_argument("--work", type=Path, default=ROOT / WORK, help="folder of results (default .slimtune/paper)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of paper.md and figures/")
    parser.add_argument("--only", help="one run by its name, in this process")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if arguments.only is not None:
        torch.set_num_threads(1)
        _perform(arguments.only, arguments.steps, arguments.work)
        return 0
    names = [name for part in parts for name in _names(part, arguments.steps)]
    waiting = [name for name in names if not _is_complete(name, arguments.steps, arguments.work)]
    for name in names:
        if name not in waiting:
            print(f"{name}: complete")
    with ThreadPoolExecutor(max_workers=arguments.jobs) as pool:
        codes = list(pool.map(lambda name: _child(name, arguments.steps, arguments.work), waiting))
    failed = [name for name, code in zip(waiting, codes, strict=True) if code != 0]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    if "report" in parts:
        paper_report.write(arguments.work, arguments.docs)
    return 0


def _names(part: str, steps: int | None) -> list[str]:
    if part == "gradients":
        return [paper_gradients.NAME]
    return [run.name for run in _training_runs(steps) if run.name.startswith(part)]


def _training_runs(steps: int | None) -> list[Run]:
    return [*paper_copying.runs(steps), *paper_language.runs(steps)]


def _is_complete(name: str, steps: int | None, folder: Path) -> bool:
    """Whether there is a result of at least as many steps: a quick look never takes the place of a whole run."""
    result = read_result(folder, name)
    if result is None or name == paper_gradients.NAME:
        return result is not None
    (run,) = [run for run in _training_runs(steps) if run.name == name]
    return bool(result["steps"] >= run.steps)


def _perform(name: str, steps: int | None, folder: Path) -> None:
    if name == paper_gradients.NAME:
        paper_gradients.perform(folder)
        return
    (run,) = [run for run in _training_runs(steps) if run.name == name]
    perform(run, folder)


def _child(name: str, steps: int | None, folder: Path) -> int:
    """The exit code of one run in a process of one thread."""
    command = [sys.executable, "-m", "benchmarks.paper", "--only", name, "--work", str(folder.resolve())]
    if steps is not None:
        command += ["--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    print(f"{name}: started", flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

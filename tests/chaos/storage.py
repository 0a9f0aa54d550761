"""Faults of checkpoints and disks: a kill while one is written, bytes that change, no space left."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.models import Job
from service.storage import Storage
from tests.chaos.arena import Arena
from tests.chaos.fault import Fault
from tests.chaos.oracles import whole
from tests.chaos.training import curve, real_job, real_trainer
from tests.integration.seed import add_dataset
from tests.integration.stage import ROOT, Stage, wait_for
from worker import resume
from worker.supervisor import supervise

Log = list[dict[str, Any]]


def killed_while_writing(arena: Arena, cycles: int) -> Iterator[str]:
    """SIGKILL to a process that does nothing but write checkpoints; the next one goes on from the last reported."""
    command = [sys.executable, "-m", "tests.chaos.writer", *([] if arena.guard is None else [arena.guard])]
    with (
        arena.scratch() as folder,
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers,
    ):
        last: dict[str, Any] = {"reported": 0, "folder": None}
        for number in range(cycles):
            parent = folder / f"attempt-{number}"
            parent.mkdir()
            log = folder / f"{number}.jsonl"
            _write_and_kill(arena, writers, {"parent": str(parent), "resume_from": last["folder"], "log": str(log)})
            entries = _read(log)
            if (started := next(iter(entries), {}).get("started")) != last["reported"]:
                yield f"kill {number}: the next run began at {started}, not at {last['reported']}"
                break
            yield from _unfinished(parent)
            yield from _lost(entries)
            reported = [entry for entry in entries if "reported" in entry]
            if reported:
                if last["folder"] is not None:
                    shutil.rmtree(Path(last["folder"]).parent)
                last = reported[-1]
        if last["reported"] < cycles:
            yield f"{last['reported']} checkpoints in {cycles} runs: they were killed before they wrote"
        writers.communicate()


def _write_and_kill(arena: Arena, writers: subprocess.Popen[str], order: dict[str, Any]) -> None:
    assert writers.stdin is not None
    assert writers.stdout is not None
    print(json.dumps(order), file=writers.stdin, flush=True)
    pid = int(writers.stdout.readline())
    log = Path(order["log"])
    wait_for("a checkpoint", lambda: any("reported" in entry for entry in _read(log)), arena.patience_seconds)
    time.sleep(0.1 * arena.random.random())
    os.kill(pid, signal.SIGKILL)


def _read(log: Path) -> Log:
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _unfinished(parent: Path) -> Iterator[str]:
    """Folders that have the name of a whole checkpoint, and are none."""
    for folder in parent.iterdir():
        if folder.suffix == ".tmp":
            continue
        manifest = folder / "manifest.json"
        files = json.loads(manifest.read_text())["files"] if manifest.exists() else {"manifest.json": {"bytes": 0}}
        entries = [{"name": name, **entry} for name, entry in files.items()]
        if (reason := resume.damage(folder, entries, lambda: None)) is not None:
            yield f"{folder.name} has its name and is not whole: {reason}"


def _lost(entries: Log) -> Iterator[str]:
    """What a power cut would take of a checkpoint that was reported: names and bytes that nobody had synced."""
    for number, entry in enumerate(entries):
        if "reported" not in entry:
            continue
        before = {earlier["synced"]: earlier for earlier in entries[:number] if "synced" in earlier}
        folder = Path(entry["folder"])
        if (reason := resume.damage(folder, entry["files"], lambda: None)) is not None:
            yield f"{folder.name} was reported: {reason}"
        elif missing := [path.name for path in (folder, *sorted(folder.iterdir())) if not _durable(path, before)]:
            yield f"{folder.name} was reported before this was on disk: {', '.join(missing)}"


def _durable(path: Path, synced: dict[int, dict[str, Any]]) -> bool:
    """Whether this name was synced in its folder, and a file's bytes after their last change."""
    named = path.name in synced.get(path.parent.stat().st_ino, {}).get("names", [])
    if path.is_dir():
        return named
    status = path.stat()
    record = synced.get(status.st_ino, {})
    return named and (record.get("bytes"), record.get("changed_ns")) == (status.st_size, status.st_mtime_ns)


def damaged_checkpoints(arena: Arena, cycles: int) -> Iterator[str]:
    """A bit that flips, a file that is cut, longer, gone or another's: seen before it is loaded, every time.

    Of every fifty one is found by a whole attempt, which goes on from the checkpoint before.
    """
    with arena.stage() as stage:
        job_id = stage.create_job(steps=12)
        stage.run(job_id, crash_at=11, step_seconds=0.0)
        stage.request(job_id, "cancel")
        newest, _ = stage.checkpoints(job_id)
        folder = stage.settings.data_dir / newest.path
        backup = shutil.copytree(folder, folder.parents[3] / "backup")
        for number in range(cycles):
            what = _damage(arena, folder)
            if number % 50 == 0:
                yield from _resumed_before(arena, stage, newest.step, what)
            if resume.damage(folder, newest.files, lambda: None) is None:
                yield f"not seen: {what}"
            shutil.rmtree(folder)
            shutil.copytree(backup, folder)
        if (reason := resume.damage(folder, newest.files, lambda: None)) is not None:
            yield f"a whole checkpoint is called damaged: {reason}"


def _damage(arena: Arena, folder: Path) -> str:
    """One file of a checkpoint, changed at random; what was done to it."""
    path = arena.random.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = arena.random.choice(["bit", "bit", "bit", "bit", "cut", "longer", "gone", "swapped"])
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: arena.random.randrange(len(data))])
    elif kind == "longer":
        path.write_bytes(data + bytes([0]))
    elif kind == "swapped":
        other = arena.random.choice([entry for entry in sorted(folder.iterdir()) if entry != path])
        path.write_bytes(other.read_bytes())
    else:
        bit = arena.random.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    return f"{path.name}: {kind}"


def _resumed_before(arena: Arena, stage: Stage, newest_step: int, what: str) -> Iterator[str]:
    job_id = stage.create_job(steps=12)
    stage.run(job_id, crash_at=11, step_seconds=0.0)
    _damage(arena, stage.settings.data_dir / stage.checkpoints(job_id)[0].path)
    job = stage.run(job_id, step_seconds=0.0)
    starts = [entry["step"] for entry in stage.trace(job_id)]
    events = [data["step"] for _, data in stage.events(job_id, "checkpoint_damaged")]
    if (job.status, starts, events) != ("succeeded", [0, newest_step - 5], [newest_step]):
        yield f"{what}: {job.status}, began at {starts}, damaged: {events}"
    yield from whole(stage, job_id)


STEPS, EVERY = 15, 5


def full_disk(arena: Arena, cycles: int) -> Iterator[str]:
    """No space left for a later checkpoint, for the first, for the tokens, for anything: the job pauses and says so.

    What it has is intact and nothing else lies about; with space again it goes on to the curve that it would have had.
    """
    with arena.stage() as stage, _small_disk(stage.settings.data_dir) as disk:
        alone = _run(arena, stage, real_job(stage, _dataset(stage), STEPS, EVERY))
        if alone.status != "succeeded":
            yield f"{alone.id}: {alone.status} though there is space: {alone.error}"
            return
        expected = curve(stage, alone.id)
        written = [file["bytes"] for file in stage.checkpoints(alone.id)[0].files]
        sizes = _Sizes(2 * len(TEXT), sum(written), max(written))
        _delete_files(stage, alone)
        for kind in itertools.islice(itertools.cycle(disk.kinds), cycles):
            job_id = real_job(stage, _dataset(stage), STEPS, EVERY)
            with disk.room(arena, kind, sizes) as options:
                job = _run(arena, stage, job_id, options)
                yield from _stopped_well(stage, job, kind)
            if job.status == "paused":
                stage.request(job_id, "resume")
            job = _run(arena, stage, job_id)
            if (job.status, job.error) != ("succeeded", None) or curve(stage, job_id) != expected:
                yield f"{job_id}: {kind}: {job.status} at step {job.step} with space again: {job.error}"
            _delete_files(stage, job)


def _delete_files(stage: Stage, job: Job) -> None:
    """Of the job and its dataset: the disk is small."""
    shutil.rmtree(stage.folder(job.id).parent)
    shutil.rmtree(stage.settings.data_dir / "datasets" / job.dataset_id)


TEXT = "\n".join(f"{number}: {number * number}" for number in range(5_000))


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what a job writes."""

    tokens: int
    checkpoint: int
    largest: int
    """The largest file of a checkpoint."""


def _dataset(stage: Stage) -> str:
    """One of the job's own, so that its tokens are still to be written."""
    return add_dataset(stage.bind, Storage(stage.settings.data_dir), TEXT).id


def _run(arena: Arena, stage: Stage, job_id: str, options: tuple[str, ...] = ()) -> Job:
    """Attempts, as a worker would make them, until there is nothing more to do or nothing can be done."""
    for _ in range(6):
        supervise(job_id, stage.settings, command=real_trainer(arena, *options), device_wait_seconds=0.2)
        if stage.job(job_id).status != "queued":
            break
    return stage.job(job_id)


def _stopped_well(stage: Stage, job: Job, kind: str) -> Iterator[str]:
    code = (job.error or {}).get("code")
    # Without room for the note of what its slot holds nothing is claimed: the job waits, and nothing has happened.
    if (job.status, code) != ("paused", "disk_full") and (kind, job.status, job.attempt) != ("nothing", "queued", 0):
        yield f"{job.id}: {kind}: {job.status} at step {job.step}: {job.error}"
    rows = stage.checkpoints(job.id)
    if kind == "later" and not rows:
        yield f"{job.id}: no checkpoint is left"
    for row in rows:
        if (reason := resume.damage(stage.settings.data_dir / row.path, row.files, lambda: None)) is not None:
            yield f"{job.id}: checkpoint {row.step}: {reason}"
    root = stage.settings.data_dir
    known = {root / row.path for row in rows}
    half = [path for path in stage.folder(job.id).glob("*/*") if path not in known]
    half += [*root.glob("tmp/*"), *root.glob("datasets/*/*.tmp")]
    if half:
        yield f"{job.id}: {kind}: left behind: {', '.join(str(path.relative_to(root)) for path in half)}"


class _Tmpfs:
    """A file system of 8 MiB, filled up to what a job may have."""

    kinds = ("later", "first", "tokens", "nothing")

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def room(self, arena: Arena, kind: str, sizes: _Sizes) -> Iterator[tuple[str, ...]]:
        share = arena.random.random()
        free = {
            "later": sizes.tokens + sizes.checkpoint * (1.2 + 1.6 * share),
            "first": sizes.tokens + sizes.checkpoint * (0.1 + 0.8 * share),
            "tokens": sizes.tokens * (0.2 + 0.7 * share),
            "nothing": 2 * resource.getpagesize() * share,
        }[kind]
        status = os.statvfs(self._folder)
        ballast = self._folder / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - int(free)))
        try:
            yield ()
        finally:
            ballast.unlink()


class _LimitedFiles:
    """Where nothing can be mounted: a limit on the size of each file that the trainer writes."""

    kinds = ("first", "tokens")

    @contextmanager
    def room(self, arena: Arena, kind: str, sizes: _Sizes) -> Iterator[tuple[str, ...]]:
        least, most = (sizes.tokens, sizes.largest) if kind == "first" else (1_000, sizes.tokens)
        yield ("--largest-file", str(arena.random.randrange(least, most)))


@contextmanager
def _small_disk(folder: Path) -> Iterator[_Tmpfs | _LimitedFiles]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0711", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        yield _LimitedFiles()
        return
    try:
        yield _Tmpfs(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


STORAGE = (
    Fault(
        "checkpoint",
        "SIGKILL while a checkpoint is written: the one before loads; what was reported outlives a power cut",
        "kills",
        full=100,
        short=5,
        inflict=killed_while_writing,
        guards=("fsync",),
    ),
    Fault(
        "damage",
        "bits flipped, files cut, gone or swapped: seen every time, and the checkpoint before is used",
        "damages",
        full=1_000,
        short=60,
        inflict=damaged_checkpoints,
        guards=("hash check",),
    ),
    Fault(
        "disk",
        "no space left at any write: disk_full, nothing half written, the job waits and goes on when there is space",
        "full disks",
        full=40,
        short=4,
        inflict=full_disk,
        guards=("clean-up",),
    ),
)

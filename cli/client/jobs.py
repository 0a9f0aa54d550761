"""Jobs: making one, following it, steering it, taking its results home."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack
from uuid import uuid4

from cli.client.answers import (
    Artifact,
    Checkpoint,
    Event,
    FileRecord,
    JobData,
    JobFailure,
    Metric,
    Plan,
    Progress,
    Sample,
)
from cli.client.connection import Connection, problem_error, quoted, server_events
from cli.client.downloads import fetch, fetch_whole
from cli.client.errors import (
    JobCancelledError,
    JobFailedError,
    JobPausedError,
    RateLimitedError,
    UnavailableError,
    WaitTimeoutError,
)
from cli.client.requests import JobRequest, Message, SampleOptions

PAGE = 1_000
POLL_SECONDS = 0.5
AWAY_SECONDS = 300.0
"""For which a service that does not answer is asked again and again by who follows a job."""
SILENCE_SECONDS = 120.0
"""How long a sample may say nothing: the model is loaded first."""
QUIET_SECONDS = 60.0
"""Silence of a stream of events, which has a heartbeat, after which its connection is taken for lost."""
AGAIN_SECONDS = 1.0
"""Before a stream that broke off is asked for again."""

STOPPED = {"failed": JobFailedError, "cancelled": JobCancelledError, "paused": JobPausedError}
AT_REST = ("succeeded", *STOPPED)
"""States that a job does not leave by itself."""


class Look(NamedTuple):
    """What is new about a job since the look before."""

    metrics: list[Metric]
    """Rows of steps, in order: new, or with a validation loss that they did not have."""
    events: list[Event]


class Job:
    """One job, as it was when it was last looked at: `refresh`, `wait` and all that steers it look again."""

    def __init__(self, connection: Connection, data: JobData) -> None:
        self._connection = connection
        self._path = f"/jobs/{data['id']}"
        self.data = data
        """All that the service said of it, as it said it (docs/api.md)."""

    def __repr__(self) -> str:
        progress = self.progress
        return f"<Job {self.id} {self.status}, step {progress['step']}/{progress['total_steps']}>"

    @property
    def id(self) -> str:
        return self.data["id"]

    @property
    def name(self) -> str | None:
        return self.data["name"]

    @property
    def status(self) -> str:
        """`queued`, `running`, `paused`, `succeeded`, `failed` or `cancelled`."""
        return self.data["status"]

    @property
    def plan(self) -> Plan:
        """The schedule that the planner chose; of a job out of `list`, without its frontier."""
        return self.data["plan"]

    @property
    def progress(self) -> Progress:
        return self.data["progress"]

    @property
    def memory_cap_bytes(self) -> int:
        return self.data["memory_cap"]

    @property
    def measured_peak_bytes(self) -> int | None:
        """The most it has held so far."""
        return self.data["measured_peak_bytes"]

    @property
    def output_model(self) -> str | None:
        """Of a job that has succeeded: the id of its model, which another job may start from."""
        return self.data["output_model"]

    @property
    def error(self) -> JobFailure | None:
        """Why it failed, or was paused without being asked to."""
        return self.data["error"]

    def refresh(self) -> Self:
        self.data = self._connection.get(self._path)
        return self

    def wait(
        self,
        *,
        on_metric: Callable[[Metric], object] | None = None,
        on_event: Callable[[Event], object] | None = None,
        timeout_seconds: float | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> Self:
        """Until it has succeeded. Lost connections and restarts of the service are waited out, up to AWAY_SECONDS.

        `on_metric` is told every step's row, in order, those before the call too; a row whose validation loss came
        after it is told once more. `on_event` is told every event. What they raise ends the waiting, not the job.
        Raises JobFailedError, JobCancelledError, JobPausedError, WaitTimeoutError, ServiceError.
        """
        tell_metric, tell_event = on_metric or _unheard, on_event or _unheard
        looks = self.follow(
            poll_seconds, metrics=on_metric is not None, events=on_event is not None, timeout_seconds=timeout_seconds
        )
        for look in looks:
            for row in look.metrics:
                tell_metric(row)
            for event in look.events:
                tell_event(event)
        if self.status in STOPPED:
            raise STOPPED[self.status](self)
        return self

    def follow(
        self,
        poll_seconds: float = POLL_SECONDS,
        *,
        metrics: bool = True,
        events: bool = False,
        timeout_seconds: float | None = None,
    ) -> Iterator[Look]:
        """Look at it again and again until it rests; each look yields what is new since the one before, which is
        nothing while the service is away. Raises WaitTimeoutError, and ServiceError after AWAY_SECONDS."""
        heard = start = time.monotonic()
        row: Metric | None = None
        event_id = 0
        while True:
            look = Look([], [])
            at_rest = False
            try:
                status = self.refresh().status
                look = Look(
                    # From the last row on, not after it: a validation loss is added to a row that is already there.
                    list(self.metrics(-1 if row is None else row["step"] - 1)) if metrics else [],
                    list(self.events(event_id)) if events else [],
                )
            except (UnavailableError, RateLimitedError):
                if time.monotonic() > heard + AWAY_SECONDS:
                    raise
            else:
                at_rest = status in AT_REST
                heard = time.monotonic()
            fresh = [each for each in look.metrics if each != row]
            row = fresh[-1] if fresh else row
            event_id = look.events[-1]["id"] if look.events else event_id
            yield Look(fresh, look.events)
            if at_rest:
                return
            if timeout_seconds is not None and time.monotonic() > start + timeout_seconds:
                raise WaitTimeoutError(f"{self.id} is {self.status} after {timeout_seconds:g} s")
            time.sleep(poll_seconds)

    def pause(self) -> Self:
        """Have it write a checkpoint and wait."""
        self.data = self._connection.request("POST", f"{self._path}/pause", again=True)
        return self

    def resume(self, memory_cap: str | int | None = None) -> Self:
        """Queue it again, to go on from its checkpoint; with a cap, such as `1.5GiB`, planned anew under it."""
        body = {} if memory_cap is None else {"memory_cap": memory_cap}
        # With a cap it is refused unless the job is paused, which after the first time it is not.
        again = memory_cap is None
        self.data = self._connection.request("POST", f"{self._path}/resume", again=again, json=body)
        return self

    def cancel(self) -> Self:
        self.data = self._connection.request("POST", f"{self._path}/cancel", again=True)
        return self

    def delete(self) -> None:
        """Of a job that is over: with its curve, events, checkpoints, and the model that is its output."""
        self._connection.request("DELETE", self._path)

    def delete_checkpoint(self, step: int) -> None:
        """Not the newest one of a job that is not over, nor the one that is its output."""
        self._connection.request("DELETE", f"{self._path}/checkpoints/{step}")

    def metrics(self, after_step: int = -1) -> Iterator[Metric]:
        """The rows after a step, page by page."""
        asked = {"after_step": after_step, "limit": PAGE}
        return self._connection.pages(f"{self._path}/metrics", asked, lambda row: {"after_step": row["step"]})

    def events(self, after: int = 0) -> Iterator[Event]:
        """What happened since an event, page by page."""
        asked = {"after": after, "limit": PAGE}
        return self._connection.pages(f"{self._path}/events", asked, lambda event: {"after": event["id"]})

    def watch(self, after: int = 0) -> Iterator[Event]:
        """What happened since an event, and then what happens, as it happens, until the job is over.

        Goes on where it was after a lost connection or a restart of the service, with no event twice. Raises
        ServiceError also where the service did not come back for AWAY_SECONDS.
        """
        last = str(after)
        heard = time.monotonic()

        def hear(lines: Iterator[str]) -> Iterator[str]:
            nonlocal heard
            for line in lines:  # heartbeats count
                heard = time.monotonic()
                yield line

        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
            stream = self._connection.stream("GET", f"{self._path}/events", headers=headers, read_seconds=QUIET_SECONDS)
            try:
                with stream as response:
                    for event in server_events(hear(response.iter_lines())):
                        if event.name == "end":
                            return
                        yield event.data
                        last = event.id
            except (UnavailableError, RateLimitedError):
                if time.monotonic() > heard + AWAY_SECONDS:
                    raise
            time.sleep(AGAIN_SECONDS)

    def checkpoints(self) -> list[Checkpoint]:
        """Those there are, the newest first."""
        found: list[Checkpoint] = self._connection.get(f"{self._path}/checkpoints")["data"]
        return found

    def checkpoint(self, which: int | str = "latest") -> Checkpoint:
        """A step, or `latest`, `best`, `final`."""
        found: Checkpoint = self._connection.get(f"{self._path}/checkpoints/{quoted(str(which))}")
        return found

    def download(
        self,
        folder: Path | str,
        which: int | str = "final",
        *,
        files: Collection[str] = (),
        on_bytes: Callable[[FileRecord, int], object] | None = None,
    ) -> list[Path]:
        """The files of a checkpoint, or those named, in `folder`, where each appears once its size and SHA-256 are
        right. A connection that breaks is taken up again; what still broke off stays as `.part`, and the next call
        goes on from there.

        `on_bytes` is told how much of a file has arrived, what was there before included. Raises ServiceError,
        DamagedDownloadError, ValueError for a name that is none of the checkpoint's.
        """
        checkpoint = self.checkpoint(which)
        names = [file["name"] for file in checkpoint["files"]]
        if unknown := set(files) - set(names):
            raise ValueError(f"no such file: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        base = f"{self._path}/checkpoints/{checkpoint['step']}/files"
        return [
            fetch(self._connection, f"{base}/{file['name']}", file, target, on_bytes or _unheard)
            for file in checkpoint["files"]
            if not files or file["name"] in files
        ]

    def artifacts(self) -> list[Artifact]:
        """The loss curve as files: a CSV, and TensorBoard's events."""
        found: list[Artifact] = self._connection.get(f"{self._path}/artifacts")["data"]
        return found

    def download_artifacts(self, folder: Path | str) -> list[Path]:
        """All of them into `folder`, in place of what was there of an earlier time."""
        artifacts, target = self.artifacts(), Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        paths = [f"{self._path}/artifacts/{each['name']}" for each in artifacts]
        return [fetch_whole(self._connection, path, target) for path in paths]

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        on_text: Callable[[str], object] | None = None,
        **options: Unpack[SampleOptions],
    ) -> Sample:
        """Continue a text, or answer a conversation, with a checkpoint, also while the job trains. `on_text` is told
        the text in pieces as it comes."""
        path = f"{self._path}/generate"
        asked: dict[str, Any] = {"prompt" if isinstance(prompt, str) else "messages": prompt, **options, "stream": True}
        return self._connection.repeatedly(lambda: self._sample(path, asked, on_text or _unheard), again=False)

    def _sample(self, path: str, asked: Mapping[str, Any], on_text: Callable[[str], object]) -> Sample:
        pieces: list[str] = []
        with self._connection.stream("POST", path, json=asked, read_seconds=SILENCE_SECONDS) as response:
            for event in server_events(response.iter_lines()):
                if event.name == "token":
                    pieces.append(event.data["text"])
                    on_text(event.data["text"])
                elif event.name == "error":
                    raise problem_error(f"POST {path}", event.data["status"], event.data)
                elif event.name == "done":
                    sample: Sample = event.data | {"text": "".join(pieces)}
                    return sample
        raise UnavailableError(f"POST {path}: the sample broke off", status=0, code="unreachable")


class Jobs:
    """`client.jobs`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, *, idempotency_key: str | None = None, **request: Unpack[JobRequest]) -> Job:
        """One job, even if answers are lost: the request is sent again a few times, with one Idempotency-Key.

        Where no try was answered (UnavailableError), it is not known whether there is a job; call again within 24
        hours with a key of your own, the same each time, to find out. Where the data's tokens are still being counted,
        that is waited for, up to a minute. Raises MemoryCapInfeasibleError and other ServiceErrors.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        made = self._connection.request("POST", "/jobs", again=True, json=request, headers=headers)
        return Job(self._connection, made)

    def get(self, job_id: str) -> Job:
        return Job(self._connection, self._connection.get(f"/jobs/{quoted(job_id)}"))

    def list(self, status: str | None = None) -> Iterator[Job]:
        """All jobs, newest first, page by page; their plans have no frontier."""
        asked: dict[str, Any] = {"limit": 100} | ({} if status is None else {"status": status})
        for data in self._connection.pages("/jobs", asked, lambda job: {"after": job["id"]}):
            yield Job(self._connection, data)


def _unheard(*_: object) -> None:
    """Where nobody wants to be told."""

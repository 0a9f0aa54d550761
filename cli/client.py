"""A small client of the REST API."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from uuid import uuid4

import httpx2

from cli.answers import (
    Artifact,
    Checkpoint,
    Dataset,
    Device,
    Event,
    FileRecord,
    Job,
    Metric,
    Model,
    Plan,
    Sample,
    Tokenization,
    Tokenizer,
)

PAGE = 1_000
REPEAT_PAUSES_SECONDS = (0.1, 0.5, 1.0)
"""Before each further try to create a job where there was no answer."""
IN_FLIGHT_SECONDS = 60.0
"""How long to ask for what became of an earlier try that is still being worked on; a statement may take 30."""
UPLOAD_SECONDS = 300.0
"""How long the service may be silent at the end of an upload: the files are checked."""
SILENCE_SECONDS = 120.0
"""How long a sample may say nothing: the model is loaded first."""
PARTIAL = 206
QUIET_SECONDS = 60.0
"""Silence of a stream of events, which has a heartbeat, after which its connection is taken for lost."""
AWAY_SECONDS = 300.0
"""For which a stream of events is asked for again and again."""
LOST = frozenset({0, 502, 503, 504})
"""No answer of the service's: none at all, or that of a proxy in front of it or a database behind it."""


class ServiceError(RuntimeError):
    """The service refused a request (`status`, `code` and the whole `problem`), or did not answer (status 0)."""

    def __init__(self, message: str, *, status: int = 0, code: str = "unreachable", problem: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.problem = problem


class DamagedDownloadError(RuntimeError):
    """What arrived is not what the service registered; nothing was kept."""


class Client:
    """Calls the service at `url`. Methods raise ServiceError. A context manager.

    Without an `api_key` that of SLIMTUNE_API_KEY is sent, if there is one. Proxy settings of the environment are not
    used: the service is local or on a network of ours.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_seconds: float = 30.0) -> None:
        key = api_key or os.environ.get("SLIMTUNE_API_KEY")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def missing(self) -> list[str]:
        """What is missing for a job to run now: `api`, or any of `database`, `broker`, `worker`. Raises nothing."""
        try:
            response = self._http.get("/readyz")
        except httpx2.TransportError:
            return ["api"]
        if response.status_code not in (200, 503):
            return ["api"]
        return [name for name, there in response.json()["checks"].items() if not there]

    def upload_dataset(self, path: Path, tokenizer: str | None = None) -> Dataset:
        """Its tokens are made in the background: `dataset(id)["tokenizations"]` says how far they are."""
        data = {} if tokenizer is None else {"tokenizer": tokenizer}
        with path.open("rb") as file:
            files = {"file": (path.name, file)}
            dataset: Dataset = self._request("POST", "/datasets", files=files, data=data, timeout=UPLOAD_SECONDS)
        return dataset

    def find_dataset(self, filename: str, sha256: str) -> Dataset | None:
        """The newest dataset of a file of this name and content, if it is among the last hundred."""
        page = self._request("GET", "/datasets", params={"limit": 100})
        datasets: list[Dataset] = page["data"]
        return next((each for each in datasets if (each["filename"], each["sha256"]) == (filename, sha256)), None)

    def dataset(self, dataset_id: str) -> Dataset:
        dataset: Dataset = self._request("GET", f"/datasets/{dataset_id}")
        return dataset

    def tokenize(self, dataset_id: str, tokenizer: str) -> Tokenization:
        """Have the dataset's tokens made by a tokenizer, or by that of a model; asking twice is fine."""
        path = f"/datasets/{dataset_id}/tokenizations"
        tokenization: Tokenization = self._request("POST", path, json={"tokenizer": tokenizer})
        return tokenization

    def upload_tokenizer(self, paths: Sequence[Path], name: str | None = None) -> Tokenizer:
        """tokenizer.json, and what lies beside it; ready when `tokenizer(id)["status"]` says so."""
        with ExitStack() as stack:
            files = [("file", (path.name, stack.enter_context(path.open("rb")))) for path in paths]
            data = {} if name is None else {"name": name}
            tokenizer: Tokenizer = self._request("POST", "/tokenizers", files=files, data=data, timeout=UPLOAD_SECONDS)
        return tokenizer

    def train_tokenizer(self, dataset_id: str, vocab_size: int, name: str | None = None) -> Tokenizer:
        """A BPE of the dataset's text; ready when `tokenizer(id)["status"]` says so."""
        body: dict[str, Any] = {"train": {"dataset": dataset_id, "vocab_size": vocab_size}}
        tokenizer: Tokenizer = self._request("POST", "/tokenizers", json=body | ({"name": name} if name else {}))
        return tokenizer

    def tokenizer(self, tokenizer_id: str) -> Tokenizer:
        tokenizer: Tokenizer = self._request("GET", f"/tokenizers/{tokenizer_id}")
        return tokenizer

    def upload_model(self, paths: Sequence[Path], name: str | None = None) -> Model:
        """The files of a base model: config.json, its safetensors and its tokenizer's; or one .gguf, which is ready
        when `model(id)["status"]` says so."""
        with ExitStack() as stack:
            files = [("file", (path.name, stack.enter_context(path.open("rb")))) for path in paths]
            data = {} if name is None else {"name": name}
            model: Model = self._request("POST", "/models", files=files, data=data, timeout=UPLOAD_SECONDS)
        return model

    def model(self, model_id: str) -> Model:
        model: Model = self._request("GET", f"/models/{model_id}")
        return model

    def plan(self, job: dict[str, Any]) -> Plan:
        """How the job would run; stores nothing."""
        plan: Plan = self._request("POST", "/plans", json=job)
        return plan

    def create_job(self, job: dict[str, Any], idempotency_key: str | None = None) -> Job:
        """One job, even if answers are lost: the request is repeated a few times, with one Idempotency-Key.

        Where no try was answered (ServiceError with a status in LOST, or code idempotency_key_in_flight), it is not
        known whether there is a job; call again with a key of your own, the same each time, to find out.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        pauses = iter(REPEAT_PAUSES_SECONDS)
        deadline = time.monotonic() + IN_FLIGHT_SECONDS
        while True:
            try:
                created: Job = self._request("POST", "/jobs", json=job, headers=headers)
            except ServiceError as error:
                pause = next(pauses, None) if error.status in LOST else None
                if error.code == "idempotency_key_in_flight" and time.monotonic() < deadline:
                    pause = REPEAT_PAUSES_SECONDS[-1]
                if pause is None:
                    raise
                time.sleep(pause)
            else:
                return created

    def job(self, job_id: str) -> Job:
        job: Job = self._request("GET", f"/jobs/{job_id}")
        return job

    def jobs(self, status: str | None = None) -> Iterator[Job]:
        """All jobs, newest first, page by page; their plans have no frontier."""
        params: dict[str, Any] = {"limit": 100} | ({} if status is None else {"status": status})
        more = True
        while more:
            page = self._request("GET", "/jobs", params=params)
            yield from page["data"]
            more = page["has_more"]
            params["after"] = page["data"][-1]["id"] if page["data"] else None

    def cancel(self, job_id: str) -> Job:
        job: Job = self._request("POST", f"/jobs/{job_id}/cancel")
        return job

    def pause(self, job_id: str) -> Job:
        job: Job = self._request("POST", f"/jobs/{job_id}/pause")
        return job

    def resume(self, job_id: str, memory_cap: str | None = None) -> Job:
        """With a cap, such as `1.5GiB`, the job is planned anew under it."""
        body = {} if memory_cap is None else {"memory_cap": memory_cap}
        job: Job = self._request("POST", f"/jobs/{job_id}/resume", json=body)
        return job

    def metrics(self, job_id: str, after_step: int = -1) -> Iterator[Metric]:
        """The rows after a step, page by page."""
        more = True
        while more:
            page = self._request("GET", f"/jobs/{job_id}/metrics", params={"after_step": after_step, "limit": PAGE})
            yield from page["data"]
            more = page["has_more"]
            after_step = page["data"][-1]["step"] if page["data"] else after_step

    def events(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """What happened since an event, page by page."""
        more = True
        while more:
            page = self._request("GET", f"/jobs/{job_id}/events", params={"after": after, "limit": PAGE})
            yield from page["data"]
            more = page["has_more"]
            after = page["data"][-1]["id"] if page["data"] else after

    def watch(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """What happened since an event, and then what happens, as it happens, until the job is over.

        Goes on where it was after a lost connection or a restart of the service, with no event twice. Raises
        ServiceError also where the service did not come back for `AWAY_SECONDS`.
        """
        last = str(after)
        heard = time.monotonic()

        def alive() -> None:
            nonlocal heard
            heard = time.monotonic()

        while True:
            try:
                for identifier, event in self._events(job_id, last, alive):
                    if event is None:
                        return
                    yield event
                    last = identifier
            except ServiceError as error:
                if error.status not in LOST | {429} or time.monotonic() > heard + AWAY_SECONDS:
                    raise
            time.sleep(REPEAT_PAUSES_SECONDS[-1])

    def _events(self, job_id: str, last: str, alive: Callable[[], None]) -> Iterator[tuple[str, Event | None]]:
        """Ids and events of one stream, until it breaks off; None is the end. `alive` is called for every line, the
        heartbeats among them."""
        path = f"/jobs/{job_id}/events"
        headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
        timeout = httpx2.Timeout(self._http.timeout.connect, read=QUIET_SECONDS)
        try:
            with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    _raise_for_problem(response)
                fields: dict[str, str] = {}
                for line in response.iter_lines():
                    alive()
                    name, _, value = line.partition(": ")
                    fields[name] = value
                    if not line:
                        if fields.get("event") == "end":
                            yield fields["id"], None
                        elif "data" in fields:
                            yield fields["id"], json.loads(fields["data"])
                        fields = {}
        except httpx2.TransportError as error:
            raise ServiceError(f"GET {path}: the stream broke off ({error})") from error

    def devices(self) -> list[Device]:
        """What workers have announced."""
        devices: list[Device] = self._request("GET", "/devices")["data"]
        return devices

    def checkpoint(self, job_id: str, which: int | str) -> Checkpoint:
        """A step, or `latest`, `best`, `final`."""
        checkpoint: Checkpoint = self._request("GET", f"/jobs/{job_id}/checkpoints/{which}")
        return checkpoint

    def download(
        self,
        job_id: str,
        which: int | str,
        file: FileRecord,
        folder: Path,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> Path:
        """Stream one file of a checkpoint into `folder`, where it appears once its size and SHA-256 are right; one that
        the service has in a folder in a folder likewise.

        What arrived before the connection broke stays as `.part`, and the next call goes on from there. `on_bytes` is
        told how much has arrived, that included. Raises DamagedDownloadError, after which nothing is kept.
        """
        target = _below(folder, file["name"])
        target.parent.mkdir(exist_ok=True)
        partial = target.with_name(target.name + ".part")
        path = f"/jobs/{job_id}/checkpoints/{which}/files/{file['name']}"
        with partial.open("ab+") as output:
            self._continue(path, file, output, on_bytes)
            output.seek(0)
            digest = hashlib.file_digest(output, "sha256").hexdigest()
            size = output.tell()
        if size != file["bytes"] or digest != file["sha256"]:
            partial.unlink()
            raise DamagedDownloadError(
                f"{file['name']}: {size} bytes with SHA-256 {digest} arrived, "
                f"but {file['bytes']} bytes with {file['sha256']} were registered"
            )
        return partial.replace(target)

    def artifacts(self, job_id: str) -> list[Artifact]:
        """The loss curve as files: a CSV, and TensorBoard's events."""
        artifacts: list[Artifact] = self._request("GET", f"/jobs/{job_id}/artifacts")["data"]
        return artifacts

    def download_artifact(self, job_id: str, name: str, folder: Path) -> Path:
        """Stream one of them into `folder`, in place of what was there of an earlier time."""
        target = _below(folder, name)
        partial = target.with_name(target.name + ".part")
        try:
            with partial.open("wb") as output:
                for _, chunk in self._stream(f"/jobs/{job_id}/artifacts/{name}", {}):
                    output.write(chunk)
        except ServiceError:
            partial.unlink()
            raise
        return partial.replace(target)

    def _continue(self, path: str, file: FileRecord, output: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        """Append what is missing of the file. `If-Range`: all of it, where the service has another one by now."""
        have = output.tell()
        if have >= file["bytes"]:
            have = output.truncate(0)
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{file["sha256"]}"'} if have else {}
        whole = not have
        for status, chunk in self._stream(path, headers):
            if not whole and status != PARTIAL:
                have, whole = output.truncate(0), True
            have += output.write(chunk)
            on_bytes(have)

    def generate(self, job_id: str, request: dict[str, Any]) -> Iterator[str | Sample]:
        """The text that follows a prompt in pieces, as it comes, and at the end what the service says of it."""
        path = f"/jobs/{job_id}/generate"
        timeout = httpx2.Timeout(self._http.timeout.connect, read=SILENCE_SECONDS)
        try:
            with self._http.stream("POST", path, json={**request, "stream": True}, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    _raise_for_problem(response)
                event = ""
                for line in response.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        event = value
                    elif name == "data" and event == "error":
                        problem = json.loads(value)
                        raise _problem(f"POST {path}", problem["status"], problem)
                    elif name == "data":
                        data = json.loads(value)
                        yield data["text"] if event == "token" else data
        except httpx2.TransportError as error:
            raise ServiceError(f"POST {path}: the sample broke off ({error})") from error
        if event != "done":
            raise ServiceError(f"POST {path}: the sample broke off")

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx2.TransportError as error:
            raise ServiceError(f"{method} {path}: no answer from {self._http.base_url} ({error})") from error
        _raise_for_problem(response)
        return response.json()

    def _stream(self, path: str, headers: dict[str, str]) -> Iterator[tuple[int, bytes]]:
        """The body in pieces, each with the status."""
        try:
            with self._http.stream("GET", path, headers=headers) as response:
                if response.is_error:
                    response.read()
                    _raise_for_problem(response)
                # As they come: pieces of a given size would lose what came of the last one when the line breaks.
                for chunk in response.iter_bytes():
                    yield response.status_code, chunk
        except httpx2.TransportError as error:
            raise ServiceError(f"GET {path}: the download broke off ({error})") from error


def _below(folder: Path, name: str) -> Path:
    """Where a file of this name goes: in the folder, or in one folder in it."""
    parts = Path(name).parts
    if not 1 <= len(parts) <= 2 or any(part in ("..", "/") for part in parts):
        raise DamagedDownloadError(f"{name!r} is no name of a file of a checkpoint")
    return folder.joinpath(*parts)


def _raise_for_problem(response: httpx2.Response) -> None:
    """Errors come as application/problem+json (RFC 9457); one that does not was not made by the service."""
    if not response.is_error:
        return
    where = f"{response.request.method} {response.request.url.path}"
    if not response.headers.get("content-type", "").startswith("application/problem+json"):
        raise ServiceError(f"{where}: HTTP {response.status_code}", status=response.status_code, code="unknown")
    raise _problem(where, response.status_code, response.json())


def _problem(where: str, status: int, problem: dict[str, Any]) -> ServiceError:
    message = f"{where}: {problem.get('detail') or problem.get('title')} ({problem.get('code')})"
    return ServiceError(message, status=status, code=problem.get("code", "unknown"), problem=problem)

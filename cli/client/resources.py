"""All that is no job: datasets, tokenizers, models, plans, devices."""

from __future__ import annotations

import builtins
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar, Unpack

from cli.client.answers import Dataset, Device, Model, Plan, Tokenization, Tokenizer
from cli.client.connection import UPLOAD_SECONDS, Connection, quoted
from cli.client.errors import PreparationFailedError, WaitTimeoutError
from cli.client.requests import PlanQuestion

PREPARE_POLL_SECONDS = 0.5
UNFINISHED = ("pending", "running", "preparing")

Found = TypeVar("Found", bound=Mapping[str, Any])


class _Resource:
    _path = ""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def delete(self, identifier: str) -> None:
        self._connection.request("DELETE", self._of(identifier))

    def _get(self, identifier: str) -> Any:
        return self._connection.get(self._of(identifier))

    def _list(self) -> Iterator[Any]:
        return self._connection.pages(self._path, {"limit": 100}, lambda entry: {"after": entry["id"]})

    def _upload(self, paths: Sequence[Path | str], fields: Mapping[str, str | None]) -> Any:
        """A form with the files. It is sent again only where it did not leave, or was refused unread."""
        data = {name: value for name, value in fields.items() if value is not None}

        def send() -> Any:
            with ExitStack() as stack:
                files = [("file", (Path(path).name, stack.enter_context(Path(path).open("rb")))) for path in paths]
                return self._connection.once("POST", self._path, files=files, data=data, timeout=UPLOAD_SECONDS)

        return self._connection.repeatedly(send, again=False)

    def _of(self, identifier: str) -> str:
        return f"{self._path}/{quoted(identifier)}"


class Datasets(_Resource):
    """`client.datasets`."""

    _path = "/datasets"

    def upload(self, path: Path | str, *, name: str | None = None, tokenizer: str | None = None) -> Dataset:
        """Its tokens are made in the background, as bytes and by `tokenizer`: see `wait`."""
        found: Dataset = self._upload([path], {"name": name, "tokenizer": tokenizer})
        return found

    def find(self, path: Path | str) -> Dataset | None:
        """The newest dataset of a file of this name and content, if it is among the last hundred."""
        with Path(path).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        datasets: list[Dataset] = self._connection.get(self._path, {"limit": 100})["data"]
        name = Path(path).name
        return next((each for each in datasets if (each["filename"], each["sha256"]) == (name, sha256)), None)

    def get(self, dataset_id: str) -> Dataset:
        found: Dataset = self._get(dataset_id)
        return found

    def list(self) -> Iterator[Dataset]:
        """All, newest first, page by page."""
        return self._list()

    def tokenize(self, dataset_id: str, tokenizer: str) -> Tokenization:
        """Have its tokens made by a tokenizer, or by that of a model; asking twice is fine."""
        path = f"{self._of(dataset_id)}/tokenizations"
        found: Tokenization = self._connection.request("POST", path, again=True, json={"tokenizer": tokenizer})
        return found

    def wait(self, dataset_id: str, tokenizer: str = "bytes", *, timeout_seconds: float = 600.0) -> Tokenization:
        """Until its tokens by a tokenizer that was asked for are there. Raises PreparationFailedError,
        WaitTimeoutError, LookupError for one that was not asked for."""

        def look() -> Tokenization:
            made = self.get(dataset_id)["tokenizations"]
            for each in made:
                if each["tokenizer"] == tokenizer:
                    return each
            raise LookupError(f"{dataset_id} is not tokenized by {tokenizer}; ask for it with tokenize()")

        return _until_ready(look, f"{dataset_id} by {tokenizer}", timeout_seconds)


class Tokenizers(_Resource):
    """`client.tokenizers`."""

    _path = "/tokenizers"

    def upload(self, paths: Sequence[Path | str], *, name: str | None = None) -> Tokenizer:
        """tokenizer.json, and what lies beside it; see `wait`."""
        found: Tokenizer = self._upload(paths, {"name": name})
        return found

    def train(self, dataset_id: str, vocab_size: int, *, name: str | None = None) -> Tokenizer:
        """A BPE of the dataset's text; see `wait`."""
        body: dict[str, Any] = {"train": {"dataset": dataset_id, "vocab_size": vocab_size}}
        found: Tokenizer = self._connection.request("POST", self._path, json=body | ({"name": name} if name else {}))
        return found

    def get(self, tokenizer_id: str) -> Tokenizer:
        found: Tokenizer = self._get(tokenizer_id)
        return found

    def list(self) -> Iterator[Tokenizer]:
        """All, newest first, page by page."""
        return self._list()

    def wait(self, tokenizer_id: str, *, timeout_seconds: float = 600.0) -> Tokenizer:
        """Until it can be used. Raises PreparationFailedError, WaitTimeoutError."""
        return _until_ready(lambda: self.get(tokenizer_id), tokenizer_id, timeout_seconds)


class Models(_Resource):
    """`client.models`."""

    _path = "/models"

    def upload(self, paths: Sequence[Path | str], *, name: str | None = None) -> Model:
        """The files of a base model: config.json, its safetensors and its tokenizer's; or one .gguf, which is to be
        converted: see `wait`."""
        found: Model = self._upload(paths, {"name": name})
        return found

    def get(self, model_id: str) -> Model:
        found: Model = self._get(model_id)
        return found

    def list(self) -> Iterator[Model]:
        """The built-in ones and all others, page by page."""
        return self._list()

    def wait(self, model_id: str, *, timeout_seconds: float = 600.0) -> Model:
        """Until it can be used. Raises PreparationFailedError, WaitTimeoutError."""
        return _until_ready(lambda: self.get(model_id), model_id, timeout_seconds)


class Plans:
    """`client.plans`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, **request: Unpack[PlanQuestion]) -> Plan:
        """How a job would run; stores nothing. Raises MemoryCapInfeasibleError, which says what would fit."""
        plan: Plan = self._connection.request("POST", "/plans", again=True, json=request)
        return plan


class Devices:
    """`client.devices`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> builtins.list[Device]:
        """What workers have announced."""
        devices: list[Device] = self._connection.get("/devices")["data"]
        return devices


def _until_ready(look: Callable[[], Found], what: str, timeout_seconds: float) -> Found:
    deadline = time.monotonic() + timeout_seconds
    while (found := look())["status"] in UNFINISHED:
        if time.monotonic() > deadline:
            raise WaitTimeoutError(f"{what} is {found['status']} after {timeout_seconds:g} s")
        time.sleep(PREPARE_POLL_SECONDS)
    if found["status"] == "failed":
        raise PreparationFailedError(what, found["error"])
    return found

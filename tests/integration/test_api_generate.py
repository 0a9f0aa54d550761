"""Samples over HTTP: the same whole and streamed, within limits, and no process left behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api import sampler
from service import checkpoints, jobs, runs
from service.database import transaction
from service.models import Job
from service.runs import ClaimedJob
from service.settings import Settings
from service.storage import Storage
from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.weights.checkpoint import checkpoint_name, save_checkpoint
from tests.integration.seed import add_dataset, add_job, claim
from tests.integration.test_api_server import Server, server, storage

__all__ = ["server", "storage"]

JSON = {"content-type": "application/json"}
TINY = ModelConfig(num_layers=2, model_width=32, num_heads=2, mlp_width=48)


def add_model(bind: Engine, storage: Storage, claimed: ClaimedJob, step: int, config: ModelConfig = TINY) -> Path:
    """A checkpoint as the trainer writes it, of new weights."""
    parent = storage.path(claimed.checkpoints_dir)
    parent.mkdir(parents=True, exist_ok=True)
    model = LanguageModel(config).initialize(step)
    assert model.head is not None
    model.head.weight.data[-1] = 0  # never the most likely byte: the end of a document
    files = save_checkpoint(parent, step, model, make_optimizer(model, OptimizerConfig()), {})
    path = f"{claimed.checkpoints_dir}/{checkpoint_name(step)}"
    records = [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in files]
    with transaction(bind) as session:
        checkpoints.register(session, claimed.id, claimed.attempt, step, files=records, path=path)
    return storage.path(path)


@pytest.fixture
def run(bind: Engine, storage: Storage) -> ClaimedJob:
    return claim(bind, add_job(bind, add_dataset(bind, storage).id).id)


@pytest.fixture
def folder(bind: Engine, storage: Storage, run: ClaimedJob) -> Path:
    return add_model(bind, storage, run, 7)


@pytest.fixture
def ask(client: TestClient, run: ClaimedJob) -> Callable[..., httpx2.Response]:
    def ask(**body: Any) -> httpx2.Response:
        return client.post(f"/jobs/{run.id}/generate", json={"prompt": "The ", "seed": 5, **body})

    return ask


Ask = Callable[..., httpx2.Response]


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in text.removesuffix("\n\n").split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_a_stream_says_what_the_whole_answer_says(ask: Ask, folder: Path) -> None:
    whole = ask(max_tokens=40, top_p=0.9)
    assert whole.status_code == 200
    answer = whole.json()
    assert (answer["step"], answer["seed"], answer["prompt_tokens"]) == (7, 5, 4)
    assert (answer["finish_reason"], answer["tokens"]) == ("length", 40)
    stream = ask(max_tokens=40, top_p=0.9, stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    *pieces, (last, done) = events_of(stream.text)
    assert {name for name, _ in pieces} == {"token"}
    assert "".join(piece["text"] for _, piece in pieces) == answer["text"]
    assert (last, done) == ("done", {**{k: v for k, v in answer.items() if k != "text"}, "seconds": done["seconds"]})
    stop = answer["text"][5:8]
    stopped = ask(max_tokens=40, top_p=0.9, stop=stop).json()
    assert stopped["text"] == answer["text"][: answer["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    assert ask(max_tokens=40, top_p=0.9, seed=6).json()["text"] != answer["text"]


def test_every_checkpoint_can_be_asked(ask: Ask, bind: Engine, storage: Storage, run: ClaimedJob, folder: Path) -> None:
    add_model(bind, storage, run, 9)
    assert [ask(checkpoint=which, max_tokens=1).json()["step"] for which in ("latest", 7)] == [9, 7]
    assert ask(checkpoint="final").json()["code"] == "checkpoint_not_found"
    with transaction(bind) as session:
        runs.finish(session, run.id, run.attempt, "succeeded")
    assert ask(checkpoint="final", max_tokens=1).json()["step"] == 9


def test_a_conversation_is_written_by_the_template(ask: Ask, folder: Path) -> None:
    answer = ask(prompt=None, messages=[{"role": "user", "content": "Hi"}], max_tokens=3).json()
    assert answer["prompt_tokens"] == len("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_there_is_nothing_to_ask_yet_or_ever(client: TestClient, bind: Engine, job: Job) -> None:
    url = f"/jobs/{job.id}/generate"
    assert refusal(client.post(url, json={"prompt": "x"})) == (404, "checkpoint_not_found")
    with transaction(bind) as session:
        jobs.request(session, job.id, "cancel")
    assert refusal(client.post(url, json={"prompt": "x"})) == (409, "no_checkpoint")
    assert refusal(client.post("/jobs/job_0/generate", json={"prompt": "x"})) == (404, "job_not_found")


def refusal(answer: httpx2.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_that_went_away_or_broke(ask: Ask, folder: Path, stream: bool) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert refusal(ask(stream=stream)) == (500, "checkpoint_damaged")
    shutil.rmtree(folder)
    assert refusal(ask(stream=stream)) == (404, "checkpoint_not_found")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ({"prompt": None, "messages": []}, "messages"),
        ({"prompt": None, "messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 200_001}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": 4_097}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"checkpoint": "../../x"}, "checkpoint"),
        ({"checkpoint": -1}, "checkpoint"),
        ({"folder": "/etc"}, "folder"),
        ({"memory_bytes": 1}, "memory_bytes"),
    ],
)
def test_hostile_bodies(ask: Ask, client: TestClient, run: ClaimedJob, body: dict[str, Any], field: str) -> None:
    answer = client.post(f"/jobs/{run.id}/generate", content=json.dumps({"prompt": "The ", **body}), headers=JSON)
    assert refusal(answer) == (422, "invalid_request")
    assert {error["field"].split(".")[0] for error in answer.json()["errors"]} == {field.split(".", maxsplit=1)[0]}


def test_a_prompt_has_a_length(ask: Ask, folder: Path) -> None:
    answer = ask(prompt="x" * 32_769)
    assert refusal(answer) == (422, "prompt_too_long")
    assert answer.json()["max_prompt_tokens"] == 32_768


def test_one_too_many_has_to_wait(ask: Ask, client: TestClient, folder: Path) -> None:
    app: Any = client.app
    with app.state.context.sampler_slots.one():
        answer = ask()
    assert refusal(answer) == (429, "generate_busy")
    assert answer.headers["retry-after"] == "5"
    assert ask(max_tokens=1).status_code == 200


def test_without_torch(ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refusal(ask()) == (501, "generate_unavailable")


@pytest.mark.usefixtures("folder")
class TestLimits:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"generate_seconds": 0.5, "generate_memory_bytes": 2**28})

    def test_the_time_is_over(self, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sampler, "GRACE_SECONDS", 60.0)  # torch takes longer than the time to be loaded
        answer = ask().json()
        assert (answer["finish_reason"], answer["tokens"], answer["text"]) == ("time", 0, "")

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_process_that_hangs(self, ask: Ask, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sampler, "GRACE_SECONDS", 1.0)
        lines = '{"type":"started","prompt_tokens":4}\n{"type":"token","text":"so far","tokens":2}\n'
        script = f"printf '%s' '{lines}'; exec sleep 1000"
        monkeypatch.setattr(sampler, "COMMAND", ("/bin/sh", "-c", script))
        answer = ask(stream=stream)
        if stream:
            assert [name for name, _ in events_of(answer.text)] == ["token", "done"]
            assert events_of(answer.text)[1][1]["finish_reason"] == "time"
        else:
            assert (answer.json()["finish_reason"], answer.json()["text"], answer.json()["tokens"]) == (
                "time",
                "so far",
                2,
            )
        monkeypatch.setattr(sampler, "COMMAND", ("/bin/sh", "-c", "exec sleep 1000"))
        assert refusal(ask(stream=stream)) == (503, "generate_timeout")

    def test_a_process_that_crashes(self, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        script = """printf '%s' '{"type":"started","prompt_tokens":4}\n'; kill -9 $$"""
        monkeypatch.setattr(sampler, "COMMAND", ("/bin/sh", "-c", script))
        assert refusal(ask()) == (500, "generate_failed")
        last, problem = events_of(ask(stream=True).text)[-1]
        assert (last, problem["code"], problem["status"]) == ("error", "generate_failed", 500)

    def test_a_model_that_does_not_fit(self, ask: Ask, bind: Engine, storage: Storage, run: ClaimedJob) -> None:
        folder = add_model(bind, storage, run, 3)
        config = {**TINY.to_json(), "vocab_size": 10**6}
        (folder / "config.json").write_text(json.dumps(config))
        answer = ask()
        assert refusal(answer) == (422, "generate_memory_exceeded")
        problem = answer.json()
        assert problem["limit_bytes"] == 2**28
        assert problem["required_bytes"] > 2**28 + 10**6 * 32 * 4 * 2 - 100 * 2**20
        assert "SLIMTUNE_GENERATE_MEMORY_BYTES" in problem["detail"]


def test_no_secret_reaches_the_process(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:secret@host/db")
    assert "DATABASE_URL" not in sampler._environment(settings)


@pytest.fixture
def sampling(server: Server) -> Callable[[], psutil.Process]:
    """The process that samples, once it is there."""

    def sampling() -> psutil.Process:
        for _ in range(300):
            for child in psutil.Process(server.process.pid).children():
                if "slim_core.sampler" in child.cmdline():
                    return child
            time.sleep(0.1)
        raise AssertionError("no process samples")

    return sampling


def has_ended(process: psutil.Process) -> bool:
    for _ in range(300):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


ENDLESS = {"prompt": "x", "max_tokens": 4_096, "temperature": 0}
"""The most likely byte again and again."""


@pytest.fixture
def slow(bind: Engine, storage: Storage, run: ClaimedJob) -> Path:
    """A checkpoint that takes a while."""
    return add_model(bind, storage, run, 1, dataclasses.replace(TINY, num_layers=12))


@pytest.fixture
def streamed(server: Server, run: ClaimedJob, slow: Path) -> Iterator[httpx2.Response]:
    """A sample that has said something and is not done."""
    body = {**ENDLESS, "stream": True}
    url = f"{server.url}/jobs/{run.id}/generate"
    with httpx2.stream("POST", url, json=body, timeout=60) as response:
        pieces = response.iter_text()  # an iterator that nobody holds closes the connection
        assert "event: token" in next(pieces)
        yield response


def test_a_client_that_goes_away_ends_the_process(
    server: Server, run: ClaimedJob, streamed: httpx2.Response, sampling: Callable[[], psutil.Process]
) -> None:
    process = sampling()
    process.suspend()  # it cannot end by itself
    streamed.close()
    assert has_ended(process)
    again = httpx2.post(f"{server.url}/jobs/{run.id}/generate", json={"prompt": "x", "max_tokens": 1}, timeout=60)
    assert again.status_code == 200  # the slot is free


def test_so_does_one_that_waits_for_the_whole(
    server: Server, run: ClaimedJob, slow: Path, sampling: Callable[[], psutil.Process]
) -> None:
    body = json.dumps(ENDLESS).encode()
    head = f"POST /jobs/{run.id}/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        process = sampling()
        process.suspend()
    assert has_ended(process)


def test_an_api_that_is_killed_takes_the_process_along(
    server: Server, streamed: httpx2.Response, sampling: Callable[[], psutil.Process]
) -> None:
    process = sampling()
    process.suspend()
    server.process.kill()
    assert has_ended(process)

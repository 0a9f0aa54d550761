"""Downloads of a large checkpoint file, beside static file servers that have the same file, and what they take."""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.bench_measure import MIB, Record, progress
from benchmarks.load_stage import Service
from service import checkpoints, database

STEP = 1
"""Of the checkpoint."""
NAME = "model.safetensors"
CLIENTS = (1, 4)
"""At once."""
SAMPLE_SECONDS = 0.01
START_SECONDS = 10.0

NGINX = """
daemon off; worker_processes 1; pid {home}/nginx.pid; error_log {home}/nginx.log; {user}
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {home}/nginx; proxy_temp_path {home}/nginx; fastcgi_temp_path {home}/nginx;
    uwsgi_temp_path {home}/nginx; scgi_temp_path {home}/nginx;
    sendfile {sendfile};
    server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""


@dataclass(frozen=True)
class Client:
    """Whom to ask, and as whom."""

    url: str
    authorization: str = ""

    def download(self, count: int) -> float:
        """Seconds until `count` curls at once have the whole file. RuntimeError if one does not."""
        command = ["curl", "--silent", "--fail", "--output", os.devnull, self.url]
        if self.authorization:
            command += ["--header", f"Authorization: {self.authorization}"]
        began = time.perf_counter()
        running = [subprocess.Popen(command) for _ in range(count)]
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError(f"{self.url}: curl ended with {codes}")
        return time.perf_counter() - began


def add_checkpoint(service: Service, job: str, home: Path, size: int) -> str:
    """A checkpoint of the job with a file of `size` bytes; its path on the service."""
    path = f"checkpoints/{job}/step-{STEP:08d}"
    folder = home / "data" / path
    folder.mkdir(parents=True)
    digest = hashlib.sha256()
    with (folder / NAME).open("wb") as file:
        for _ in range(size // MIB):
            portion = os.urandom(MIB)
            digest.update(portion)
            file.write(portion)
    files = [{"name": NAME, "bytes": size, "sha256": digest.hexdigest()}]
    bind = service.engine()
    with database.transaction(bind) as session:
        checkpoints.register(session, job, 1, STEP, files=files, path=path)
    bind.dispose()
    return f"/jobs/{job}/checkpoints/{STEP}/files/{NAME}"


def memory(api: psutil.Process, client: Client, rounds: int) -> Record:
    """Resident bytes of the API over time, while four clients at once download the file, three times."""
    count, times = max(CLIENTS), min(rounds, 3)
    before = api.memory_info().rss
    over = threading.Event()
    resident: list[tuple[float, int]] = []
    began = time.perf_counter()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            resident.append((round(time.perf_counter() - began, 3), api.memory_info().rss))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        ends = [(client.download(count), round(time.perf_counter() - began, 3))[1] for _ in range(times)]
    finally:
        over.set()
        sampler.join()
    return {"before": before, "after": api.memory_info().rss, "resident": resident, "ends": ends, "clients": count}


def compare(api: psutil.Process, client: Client, home: Path, rounds: int) -> Record:
    """Gigabytes a second of each server and number of clients, a value a round, and what the server itself used."""
    path = next((home / "data" / "checkpoints").glob(f"*/*/{NAME}"))
    size = path.stat().st_size
    with ExitStack() as stack:
        contenders = {"slimtune": (api, client)}
        for name, sendfile in (("nginx, sendfile on", "on"), ("nginx, sendfile off", "off")):
            contenders[name] = stack.enter_context(_nginx(home, path, sendfile))
        contenders["python -m http.server"] = stack.enter_context(_http_server(path))
        speeds: Record = {}
        for number, count in itertools.product(range(-1, rounds), CLIENTS):  # the first round is not counted
            for name, (process, asker) in contenders.items():
                used = _cpu_seconds(process)
                seconds = asker.download(count)
                used = _cpu_seconds(process) - used
                if number >= 0:
                    gigabytes = count * size / 1e9
                    values = speeds.setdefault(name, {}).setdefault(str(count), {"speed": [], "cpu": []})
                    values["speed"].append(round(gigabytes / seconds, 3))
                    values["cpu"].append(round(used / gigabytes, 3))
    progress("downloads", speeds)
    return speeds


def _cpu_seconds(process: psutil.Process) -> float:
    """Its own and its children's."""
    times = [each.cpu_times() for each in (process, *process.children())]
    return float(sum(each.user + each.system for each in times))


@contextmanager
def _nginx(home: Path, file: Path, sendfile: str) -> Iterator[tuple[psutil.Process, Client]]:
    with tempfile.TemporaryDirectory(prefix="nginx-", dir=home) as scratch:
        port = _free_port()
        user = "user root;" if os.geteuid() == 0 else ""
        configuration = Path(scratch) / "nginx.conf"
        configuration.write_text(
            NGINX.format(home=scratch, folder=file.parent, port=port, sendfile=sendfile, user=user)
        )
        with _server(["nginx", "-p", scratch, "-c", str(configuration), "-e", f"{scratch}/nginx.log"], port) as process:
            yield process, Client(f"http://127.0.0.1:{port}/{file.name}")


@contextmanager
def _http_server(file: Path) -> Iterator[tuple[psutil.Process, Client]]:
    port = _free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(file.parent)]
    with _server(command, port) as process:
        yield process, Client(f"http://127.0.0.1:{port}/{file.name}")


@contextmanager
def _server(command: list[str], port: int) -> Iterator[psutil.Process]:
    """The program, once it listens. RuntimeError if it does not."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not listen") from None
                time.sleep(0.05)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Processes that write checkpoint after checkpoint, and what of it a power cut would leave.

    python -m tests.chaos.writer [GUARD ...]

One JSON object a line on stdin, {"parent", "resume_from", "log"}, starts such a process by a fork, so that torch is
loaded once; its pid is the answer. It goes on from the checkpoint `resume_from`, if that is not null, and writes to the
log what it has reported and what it has synced: a folder with the names in it, a file with its size and time of change.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.weights import checkpoint
from tests.chaos import guards

CONFIG = ModelConfig(num_layers=1, model_width=32, num_heads=2, mlp_width=64)


def main() -> None:
    """Start what stdin asks for, one at a time."""
    for guard in sys.argv[1:]:
        guards.remove(guard)
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _write_for_ever(Path(order["parent"]), order["resume_from"], _Log(Path(order["log"])))
        print(pid, flush=True)
        os.waitpid(pid, 0)


class _Log:
    """Appended by single system calls: what was logged before a SIGKILL stays."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, **entry: Any) -> None:
        os.write(self._descriptor, json.dumps(entry).encode() + b"\n")


def _write_for_ever(parent: Path, resume_from: str | None, log: _Log) -> None:
    _record_syncs(log)
    model = LanguageModel(CONFIG).initialize(0)
    optimizer = make_optimizer(model, OptimizerConfig())
    step = 0
    if resume_from is not None:
        step = checkpoint.load_training(model, optimizer, Path(resume_from))["step"]
    log(started=step)
    while True:
        step += 1
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 / step)
        optimizer.step()
        files = checkpoint.save_checkpoint(parent, step, model, optimizer, {})
        entries = [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in files]
        log(reported=step, folder=str(parent / checkpoint.checkpoint_name(step)), files=entries)


def _record_syncs(log: _Log) -> None:
    sync = os.fsync

    def recorded(descriptor: Any) -> None:
        sync(descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            folder = Path(f"/proc/self/fd/{descriptor}")
            log(synced=status.st_ino, names=[path.name for path in folder.iterdir()])
        else:
            log(synced=status.st_ino, bytes=status.st_size, changed_ns=status.st_mtime_ns)

    patch.object(os, "fsync", recorded).start()


if __name__ == "__main__":
    main()

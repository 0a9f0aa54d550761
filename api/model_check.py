"""The check of an uploaded model's folder, by the program that does it in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from service.base_models import CheckedModel
from service.errors import ModelInvalidError
from slim_core.data.tokens import BROKEN_DATASET

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 120.0
"""A tokenizer of 250,000 tokens takes some seconds, headers of a thousand layers less than one."""
_turn = threading.BoundedSemaphore(2)
"""Checks at once: each may take `memory_bytes`, and others wait in their threads."""


def check_model(folder: Path, memory_bytes: int) -> CheckedModel:
    """What the folder is. Raises ModelInvalidError with what is wrong with it, by file."""
    command = [sys.executable, "-m", "slim_core.weights.check_model", "--memory", str(memory_bytes), str(folder)]
    environment = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        with _turn:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_SECONDS,
            )
    except subprocess.TimeoutExpired as error:
        raise ModelInvalidError([{"reason": "The files take too long to be checked"}]) from error
    if done.returncode == 0:
        return CheckedModel(**json.loads(done.stdout))
    if done.returncode == BROKEN_DATASET:
        found: dict[str, Any] = json.loads(done.stderr.splitlines()[-2])
        raise ModelInvalidError(found["problems"])
    raise ModelInvalidError([{"reason": "The files take more memory to be checked than they may"}])

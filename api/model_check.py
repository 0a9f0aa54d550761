"""The check of an uploaded model's folder, by the program that does it in a process of its own."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from service.base_models import CheckedModel
from service.errors import ModelInvalidError
from slim_core.data.tokens import BROKEN_DATASET, NO_MEMORY_STATUSES

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 120.0
"""Of the clock; slim_core.weights.check_model has a limit of its own on what it computes."""
_TOO_LONG = "The files take too long to be checked"
_LOG_CHARACTERS = 2_000


def check_model(folder: Path, memory_bytes: int) -> CheckedModel:
    """What the folder is. Raises ModelInvalidError with what is wrong with it, by file."""
    command = [sys.executable, "-m", "slim_core.weights.check_model", "--memory", str(memory_bytes), str(folder)]
    environment = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(  # noqa: S603  # our own module; the folder's name is ours
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
        raise ModelInvalidError([{"reason": _TOO_LONG}]) from error
    if done.returncode == 0:
        return CheckedModel(**json.loads(done.stdout))
    if done.returncode == BROKEN_DATASET:
        found: dict[str, Any] = json.loads(done.stderr.splitlines()[-2])
        raise ModelInvalidError(found["problems"])
    if done.returncode in NO_MEMORY_STATUSES:
        raise ModelInvalidError([{"reason": "The files take more memory to be checked than they may"}])
    if done.returncode == -signal.SIGXCPU:
        raise ModelInvalidError([{"reason": _TOO_LONG}])
    logger.error("the check of a model ended with status %d: %s", done.returncode, done.stderr[-_LOG_CHARACTERS:])
    raise RuntimeError(f"the check of a model ended with status {done.returncode}")

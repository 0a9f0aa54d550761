"""Whether a file can be a tokenizer.json at all, looked at in a process of its own: parsing what a stranger sent may
take any memory and time.

    python -m service.tokenizer_files FILE        prints what is wrong with it, as JSON: a text, or null

The standard library alone: it starts in a few hundredths of a second. What only the tokenizers library knows is found
by the preparer (preparations.py).
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES = 64 * 1024**2
MAX_CONFIG_BYTES = 1024**2
MEMORY_BYTES = 1 << 30
CPU_SECONDS = 20
"""A tokenizer of 250,000 tokens takes 1 s and 300 MB."""
_NO_MEMORY = 3
_LIMIT_STATUSES = frozenset({_NO_MEMORY, -signal.SIGXCPU})
_LOG_BYTES = 2_000
_PR_SET_PDEATHSIG = 1
MODELS = ("BPE", "WordPiece", "WordLevel", "Unigram")


def problem_of(path: Path) -> str | None:
    """What is wrong with the file, as the end of a sentence that begins with "The file"; None if nothing is seen."""
    command = [sys.executable, "-m", "service.tokenizer_files", str(path)]
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(command, cwd=root, env={}, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603  # our own module; the file's name is ours
    if done.returncode in _LIMIT_STATUSES:
        return "takes too much time or memory to be parsed"
    if done.returncode:
        output = done.stderr[-_LOG_BYTES:].decode("utf-8", "replace")
        logger.error("the check of a tokenizer ended with status %d: %s", done.returncode, output)
        raise RuntimeError(f"the check of a tokenizer ended with status {done.returncode}")
    reason: str | None = json.loads(done.stdout)
    return reason


def problem_of_config(path: Path) -> str | None:
    """The same of a tokenizer_config.json, which is small: its chat template and names of special tokens are read."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return "has a config that is not valid JSON"
    if not isinstance(value, dict):
        return "has a config that is not a JSON object"
    template = value.get("chat_template")
    return None if isinstance(template, str | list | None) else "has a config whose chat_template is not a text"


def _problem(path: Path) -> str | None:
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return "is not valid UTF-8"
    except json.JSONDecodeError as error:
        return f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError:
        return "is not valid JSON: bad number"
    except RecursionError:
        return "is nested too deeply"
    if not isinstance(value, dict):
        return "is not a JSON object"
    return _shape_problem(value)


def _shape_problem(value: dict[str, Any]) -> str | None:
    model = value.get("model")
    if not isinstance(model, dict):
        return 'has no "model", or one that is not an object'
    kind = model.get("type", "BPE")  # which files of old releases leave out
    if kind not in MODELS:
        return f"has a model whose type is none of {', '.join(MODELS)}"
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, list if kind == "Unigram" else dict) or not vocabulary:
        return f'has no "model.vocab" of the shape that {kind} has'
    if kind == "BPE" and not isinstance(model.get("merges"), list):
        return 'has no "model.merges"'
    return None if isinstance(value.get("added_tokens", []), list) else 'has "added_tokens" that are not a list'


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call above
        sys.exit(1)


def main() -> int:
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    try:
        print(json.dumps(_problem(Path(sys.argv[1]))))
    except MemoryError:
        return _NO_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(main())

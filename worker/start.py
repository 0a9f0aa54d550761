"""A trainer's process from its first instruction: what has to happen before torch is loaded, then the trainer.

    python -m worker.start        started by the supervisor; not meant for a shell

One JSON object on stdin says what to do (`worker.attempt` writes it); stdin then stays open, and its end means that the
supervisor is gone: the process dies. Datasets are tokenised here, in a child, while this process holds next to nothing:
both count against the cap. Until torch is loaded SIGTERM simply ends it; there is nothing to save.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from slim_core.data.tokenizer import BYTES_KEY, TokenizerError, tokenizer_key
from slim_core.data.tokens import BROKEN_DATASET, NO_MEMORY_STATUSES, NO_SPACE, DatasetError, token_folder
from worker.memory_watch import private_bytes
from worker.process import die_with_parent
from worker.report import EXIT_ERROR, Reporter

_PR_SET_PDEATHSIG = 1
NICENESS = 5
"""Who waits for an answer goes before what runs for hours: beside two busy threads the slowest percentile of the API's
answers took half as long as at 0. On a machine that has nothing else to do a trainer loses nothing.
"""


class DocumentTooLargeError(Exception):
    """A document that cannot be parsed under the cap, under whatever plan."""


class DiskFullError(Exception):
    """No room for a token file."""


def main() -> int:
    """Train as stdin says; the exit status is part of the contract with the supervisor (worker/report.py)."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call above
        return EXIT_ERROR
    os.nice(NICENESS)
    os.environ.pop("LD_PRELOAD", None)  # this process has what it is for; its children need it not
    spec = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_at_end_of_stdin, daemon=True).start()
    reporter = Reporter(int(os.environ["SLIMTUNE_REPORT_FD"]))
    try:
        paths = [path for path in (spec["dataset_path"], spec["validation_path"]) if path is not None]
        tokenise([Path(path) for path in paths], spec.get("tokenizer"), spec["memory_cap_bytes"])
    except (DatasetError, TokenizerError) as error:
        return _refuse(reporter, "dataset_invalid", str(error))
    except DocumentTooLargeError as error:
        return _refuse(reporter, "document_too_large", str(error))
    except DiskFullError as error:
        return _refuse(reporter, "disk_full", str(error))
    except Exception as error:  # noqa: BLE001  # whatever it is, the supervisor must hear of it
        return _refuse(reporter, "trainer_error", f"{type(error).__name__}: {error}"[:500])
    from worker import trainer  # noqa: PLC0415  # torch: not before the tokenising is done

    return trainer.main(spec, reporter)


def tokenise(sources: list[Path], tokenizer: str | None, cap_bytes: int) -> None:
    """Make the token folders that are not there yet, each in a child: a document is parsed whole, and what that takes
    must not stay in the heap of this process. Together they hold at most the cap.

    Raises DatasetError, TokenizerError, DocumentTooLargeError, DiskFullError.
    """
    key = tokenizer_key(None if tokenizer is None else Path(tokenizer))
    for source in sources:
        if not (out := token_folder(source, key)).exists():
            _prepare(source, tokenizer or BYTES_KEY, out, cap_bytes)


def _prepare(source: Path, tokenizer: str, out: Path, cap_bytes: int) -> None:
    allowed = cap_bytes - private_bytes(os.getpid())
    files = ["--source", str(source), "--tokenizer", tokenizer, "--out", str(out)]
    result = subprocess.run(  # noqa: S603  # our own module
        [sys.executable, "-m", "slim_core.data.prepare", "--memory", str(allowed), *files],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=die_with_parent(),  # as in TrainerProcess
    )
    if result.returncode == BROKEN_DATASET:
        raise DatasetError(result.stderr.splitlines()[-1])
    if result.returncode in NO_MEMORY_STATUSES:
        raise DocumentTooLargeError(f"A document takes more than memory_cap ({cap_bytes} bytes) to be parsed.")
    if result.returncode == NO_SPACE:
        raise DiskFullError("The disk is full: a dataset's tokens take twice the size of its text, or more.")
    if result.returncode:
        raise RuntimeError(f"tokenising ended with status {result.returncode}: {result.stderr[-500:]}")


def _refuse(reporter: Reporter, code: str, message: str) -> int:
    reporter.send("error", code=code, message=message, step=None, peak_bytes=None)
    return EXIT_ERROR


def _die_at_end_of_stdin() -> None:
    # The raw descriptor: a buffered read would hold a lock that the interpreter's end wants.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

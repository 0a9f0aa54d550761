"""Whether a folder of files is a model that can be trained, with a tokenizer that fits it if there is one.

    python -m slim_core.weights.check_model --memory BYTES FOLDER      prints {"config", "layout", "tokenizer_key"}

In a process of its own because files from a stranger may take any memory and time to be parsed; the exit statuses are
those of slim_core/data/tokens.py, and SIGXCPU ends it after CPU_SECONDS. What is wrong is on stderr: {"problems":
[{file, reason}]}, and below it one line of it for people. Free of torch.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

from slim_core.config import ModelConfig
from slim_core.data.check_tokenizer import check
from slim_core.data.prepare import run_limited
from slim_core.data.tokenizer import TokenizerError, load_tokenizer
from slim_core.data.tokens import BROKEN_DATASET
from slim_core.lifeline import die_with_parent
from slim_core.weights.folder import ModelFolderError, check_folder

CPU_SECONDS = 120
"""A tokenizer of 250,000 tokens takes some seconds, headers of a thousand layers less than one."""
MAX_REASON = 300
"""Characters: names in a file may have any length."""


def tokenizer_key(folder: Path, config: ModelConfig) -> str | None:
    """The key of the folder's tokenizer, None where it has none. Raises TokenizerError for one that does not fit."""
    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer = load_tokenizer(folder)
    check(tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"tokenizer.json: has {tokenizer.vocab_size} tokens, the model has {config.vocab_size} of them"
        )
    return tokenizer.id


def describe(folder: Path) -> dict[str, Any]:
    """What the folder is. Raises ModelFolderError, TokenizerError."""
    summary = check_folder(folder)
    key = tokenizer_key(folder, summary.config)
    return {"config": summary.config.to_json(), "layout": summary.layout, "tokenizer_key": key}


def problem(sentence: str) -> dict[str, str]:
    """A problem of slim_core.weights.folder, "<file>: <reason>", as an object."""
    file, separator, reason = sentence.partition(": ")
    if not separator:
        return {"reason": sentence[:MAX_REASON]}
    return {"file": file, "reason": reason[:MAX_REASON]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, required=True, metavar="BYTES")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    problems: list[str] = []

    def action() -> None:
        try:
            sys.stdout.write(json.dumps(describe(arguments.folder), allow_nan=False) + "\n")
        except ModelFolderError as error:
            problems.extend(error.problems)
        except TokenizerError as error:
            problems.append(str(error) if str(error).startswith("tokenizer.json: ") else f"tokenizer.json: {error}")

    status = run_limited(arguments.memory, action)
    if problems:
        sys.stderr.write(json.dumps({"problems": [problem(sentence) for sentence in problems]}) + "\n")
        sys.stderr.write(" ".join(problems[0][:MAX_REASON].split()) + "\n")
        return BROKEN_DATASET
    return status


if __name__ == "__main__":
    sys.exit(main())

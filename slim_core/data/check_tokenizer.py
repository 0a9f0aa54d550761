"""Whether a tokenizer's folder can be used.

    python -m slim_core.data.check_tokenizer --memory BYTES FOLDER      prints {"key", "vocab_size"} as JSON

In a process of its own because a file from a stranger may take any memory and time; the exit statuses are those of
slim_core/data/tokens.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from slim_core.data.prepare import run_limited
from slim_core.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer

PROBE = 'Ünïcödé, 42 \u3053\u3093\u306b\u3061\u306f \U0001f600\n\n  {"a": [1.5]}  '


def check(tokenizer: Tokenizer) -> None:
    """Raises TokenizerError for one that cannot encode and decode, or whose tokens lie outside its vocabulary."""
    try:
        tokens = tokenizer.encode(PROBE)
        tokenizer.decode(tokens)
    except MemoryError:
        raise
    except Exception as error:  # the library's is no other
        raise TokenizerError(f"tokenizer.json: cannot encode: {error}") from error
    if not all(0 <= token < tokenizer.vocab_size for token in [*tokens, tokenizer.end_of_document]):
        raise TokenizerError("tokenizer.json: makes tokens outside its vocabulary")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, required=True, metavar="BYTES")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()

    def action() -> None:
        tokenizer = load_tokenizer(arguments.folder)
        check(tokenizer)
        sys.stdout.write(json.dumps({"key": tokenizer.id, "vocab_size": tokenizer.vocab_size}) + "\n")

    return run_limited(arguments.memory, action)


if __name__ == "__main__":
    sys.exit(main())

"""A GGUF file becomes a model folder, in a process of its own with a limit on its memory.

    python -m slim_core.weights.gguf_import --memory BYTES SOURCE OUT

The exit statuses are those of `slim_core.data.tokens`.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path

from slim_core.data.tokens import NO_MEMORY, NO_SPACE, NO_SPACE_ERRORS

BROKEN_MODEL = 2
"""Exit status for a file that is no model that can be converted; the reason is the last line of stderr."""


def main() -> int:
    """Convert with at most `--memory` bytes of private memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, required=True, metavar="BYTES")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a .gguf file")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    arguments = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each thread would reserve memory, and there is nothing to multiply
    from slim_core.weights.gguf_convert import convert  # noqa: PLC0415  # numpy: not before the line above
    from slim_core.weights.gguf_file import GgufError  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_DATA, (arguments.memory, arguments.memory))
    try:
        convert(arguments.source, arguments.out)
    except GgufError as error:
        sys.stderr.write(f"{error}\n")
        return BROKEN_MODEL
    except MemoryError:
        return NO_MEMORY
    except OSError as error:
        if error.errno not in NO_SPACE_ERRORS:
            raise
        return NO_SPACE
    return 0


if __name__ == "__main__":
    sys.exit(main())

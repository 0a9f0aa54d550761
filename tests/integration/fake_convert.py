"""In place of slim_core.weights.gguf_import: whatever the file holds, the tiny Llama comes out."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.integration.model_files import llama

if __name__ == "__main__":
    source, out = map(Path, sys.argv[-2:])
    assert source.read_bytes().startswith(b"GGUF")
    out.mkdir()
    for name, content in llama().items():
        (out / name).write_bytes(content)

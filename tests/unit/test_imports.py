"""What import-linter cannot see: what is really loaded when a process starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "module",
    [
        "api.app",
        "cli.main",
        "worker.tasks",
        "worker.start",
        "slim_core.data.tokens",
        "slim_core.weights.folder",
        "slim_core.weights.source",
        "slim_core.weights.card",
        "slim_core.data.prepare",
    ],
)
def test_starts_without_torch(module: str, tmp_path: Path) -> None:
    settings = {
        "DATABASE_URL": "postgresql://nowhere/none",
        "REDIS_URL": "redis://nowhere",
        "SLIMTUNE_DATA_DIR": str(tmp_path),
    }
    code = f"import sys, {module}; print([name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy')])"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"

"""The version of this command: by the pyproject.toml beside it, as in a checkout or an image, else as installed.

The service says its own (`GET /version`); the command line imports nothing of it.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path


def version() -> str:
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.exists():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return importlib.metadata.version("slimtune")

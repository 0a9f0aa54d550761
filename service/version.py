"""Which version this is. The one place that says so is pyproject.toml."""

from __future__ import annotations

import functools
import importlib.metadata
import tomllib
from pathlib import Path

API_VERSION = "1.0"
"""Of the contract of the REST API: the second number grows with what is added, the first with what breaks clients."""


@functools.cache
def version() -> str:
    """Of this code: by the pyproject.toml beside it, as in a checkout or an image, else by what was installed."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.exists():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return importlib.metadata.version("slimtune")

"""The documentation as a site: it builds without a warning, has the reference, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.extra

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
LOADED_BY_STYLE = re.compile(r"(?:@import\s+|url\()[\"']?((?:https?:)?//[^\"')]+)")


def test_the_site(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    assert 'id="create_jobs_post"' in pages["reference/jobs.html"]
    assert 'id="memory_cap_infeasible"' in pages["reference/errors.html"]
    foreign = {name: found for name, text in pages.items() if (found := LOADED.findall(text))}
    styles = {path.name: LOADED_BY_STYLE.findall(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("*.css")}
    assert (foreign, {name: found for name, found in styles.items() if found}) == ({}, {})
    assert len(styles) >= 3

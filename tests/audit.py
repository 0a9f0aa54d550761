"""Whether a version in requirements.lock is known to be vulnerable: `python -m tests.audit`.

pip-audit says "no known vulnerabilities" and exits with 0 where it could look nothing up. Here that is 2: not known.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
SERVICES = ("pypi", "osv")


@dataclass(frozen=True)
class Audit:
    """Of a lock file."""

    audited: tuple[str, ...]
    unknown: tuple[str, ...]
    """Packages that could not be looked up."""
    vulnerable: tuple[str, ...]
    """Package, version, advisory and the versions that mend it."""

    @property
    def exit_code(self) -> int:
        """0: all were looked up and none is known to be vulnerable; 1: one is; 2: some, or all, are not known."""
        return 1 if self.vulnerable else 2 if self.unknown or not self.audited else 0

    def __str__(self) -> str:
        lines = [f"VULNERABLE {line}" for line in self.vulnerable]
        if self.unknown:
            few = ", ".join(self.unknown[:5]) + (", ..." if len(self.unknown) > 5 else "")
            lines.append(f"NOT AUDITED, as their data could not be reached: {len(self.unknown)} ({few})")
        lines.append(f"audited: {len(self.audited)} packages, {len(self.vulnerable)} vulnerabilities known")
        return "\n".join(lines)


def audit(lock: Path = LOCK) -> Audit:
    """By the service that knows most of the packages."""
    tried = []
    for service in SERVICES:
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--no-deps", "--disable-pip"]
        command += ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.stdout.startswith("{"):
            tried.append(read(json.loads(run.stdout)))
    return max(tried, key=lambda found: len(found.audited), default=Audit((), (lock.name,), ()))


def read(report: Mapping[str, Any]) -> Audit:
    """What pip-audit's JSON says."""
    entries = report["dependencies"]
    known = [entry for entry in entries if "skip_reason" not in entry]
    return Audit(
        tuple(entry["name"] for entry in known),
        tuple(entry["name"] for entry in entries if "skip_reason" in entry),
        tuple(
            f"{entry['name']} {entry['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or '-'}"
            for entry in known
            for found in entry["vulns"]
        ),
    )


if __name__ == "__main__":
    made = audit()
    print(made)
    sys.exit(made.exit_code)

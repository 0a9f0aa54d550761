"""The judgement of pip-audit's report, which calls what it could not look up a success."""

from __future__ import annotations

from tests.audit import read

KNOWN = {"name": "a", "version": "1", "vulns": []}
LOST = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (1)"}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}


def test_what_was_not_looked_up_is_no_success() -> None:
    assert read({"dependencies": [KNOWN]}).exit_code == 0
    assert read({"dependencies": [LOST]}).exit_code == 2
    assert read({"dependencies": [KNOWN, LOST]}).exit_code == 2
    assert read({"dependencies": []}).exit_code == 2
    assert "NOT AUDITED" in str(read({"dependencies": [KNOWN, LOST]}))


def test_a_vulnerability_is_named() -> None:
    found = read({"dependencies": [KNOWN, LOST, BAD]})
    assert found.exit_code == 1
    assert found.vulnerable == ("c 2: PYSEC-1, mended in 3",)

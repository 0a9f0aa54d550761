"""The versions of requirements.lock against what is known of them, where that can be asked."""

from __future__ import annotations

import pytest

from tests.audit import audit

pytestmark = pytest.mark.extra


@pytest.mark.timeout(300)
def test_no_version_in_the_lock_is_known_to_be_vulnerable() -> None:
    pytest.importorskip("pip_audit")
    found = audit()
    if not found.audited:
        pytest.skip(f"nothing could be looked up: {found}")
    assert found.vulnerable == ()

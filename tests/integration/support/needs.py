"""What a test needs of the machine (root, a GPU, a tool), and what happens where it is not there.

The test is skipped with the reason. With RUNTIME_TEST_REQUIRE_ALL=1 (the full check of the project sets it)
such a skip is a failure: a check that silently does not run is not a check.
"""

from __future__ import annotations

import os

import pytest


def need(there: object, what: str) -> None:
    """Go on if `there`; otherwise skip (or fail) the test, saying that it needs `what`."""
    if there:
        return
    if os.environ.get("RUNTIME_TEST_REQUIRE_ALL") == "1":
        pytest.fail(
            f"needs {what}, which is not here, and RUNTIME_TEST_REQUIRE_ALL=1 allows no skip"
        )
    pytest.skip(f"needs {what}")


def need_root() -> None:
    need(os.geteuid() == 0, "to run as root")

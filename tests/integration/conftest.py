"""Fixtures of the tests that start real jobs. All of them carry the `integration` marker,
those that use the testbed `hosts`, too."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.hosts import hosts, testbed
from tests.integration.support.job import Job

__all__ = ["hosts", "testbed"]

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("RUNTIME_TEST_LONG") != "1":
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)
        if "testbed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.hosts)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """`write("train.py", text)`: a file in the job's working directory, dedented."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"))
        return path

    return write


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """`launch(*options, **settings) -> Job`; whatever is left of the jobs at the end is killed."""
    jobs: list[Job] = []

    def launch(*options: str | Path, **settings: Any) -> Job:
        jobs.append(Job(options, cwd=tmp_path, **settings))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.close()

"""Steps that a worker reports, as its agent reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.job import Entry
from runtime.launcher.progress import reported
from runtime.worker import Worker
from tests.worker_process import worker_spec


def test_the_agent_reads_what_a_worker_has_reported_last(tmp_path: Path) -> None:
    spec = worker_spec(tmp_path, Entry("script", "x.py"))
    assert reported([spec]) == {}
    worker = Worker(spec)
    worker.report(loss=1.0)
    assert reported([spec]) == {}
    for step in (0, 7, 2**70):
        worker.report(step=step)
        worker.report(loss=0.5)
        assert reported([spec]) == {spec.info.name: {"step": min(step, 2**64 - 2)}}


def test_a_worker_whose_reports_nobody_can_see_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = replace(
        worker_spec(tmp_path, Entry("script", "x.py")), address="ipc:///no/such/folder/x"
    )
    worker = Worker(spec)
    worker.report(step=1)
    worker.report(step=2)
    assert worker.progress is not None
    assert worker.progress.step == 2
    assert len(caplog.records) == 1
    assert reported([spec]) == {}

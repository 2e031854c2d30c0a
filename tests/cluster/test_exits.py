"""Reading what a worker wrote about its own end."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from runtime.cluster.exits import OwnReport, oom_kills, read_report, wall_clock


def written(path: Path, record: Any) -> str:
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    os.utime(path, (100.25, 100.25))
    return str(path)


def test_the_report_has_the_error_the_step_and_the_time_of_the_file(tmp_path: Path) -> None:
    extra = {"py_callstack": "line 3", "timestamp": "99"}
    record = {
        "message": {"message": "bad", "extraInfo": extra}, "type": "ValueError", "step": 7,
    }  # fmt: skip
    error = {"type": "ValueError", "message": "bad", "traceback": "line 3"}
    assert read_report(written(tmp_path / "e", record)) == OwnReport(100.25, error, 7)


def test_torchelastics_short_form_is_read(tmp_path: Path) -> None:
    found = read_report(written(tmp_path / "e", {"message": "bad"}))
    assert found == OwnReport(100.25, {"type": "", "message": "bad", "traceback": ""}, None)


def test_no_file_is_no_report(tmp_path: Path) -> None:
    assert read_report(str(tmp_path / "none")) == OwnReport(None, {}, None)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"message": 5}', "{}"])
def test_half_a_file_is_no_report_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    with caplog.at_level(logging.WARNING, "runtime"):
        assert read_report(written(tmp_path / "e", text)) == OwnReport()
    assert "cannot read" in caplog.text


def test_the_wall_clock_is_that_of_files(tmp_path: Path) -> None:
    (tmp_path / "now").write_text("")
    assert abs((tmp_path / "now").stat().st_mtime - wall_clock()) < 5


def test_kills_for_memory_are_counted_from_0() -> None:
    assert oom_kills() >= 0

"""Weights for four members of another host, one of whom gets the bytes for all: what becomes of them when processes
die, freeze or lose their connections at any step of that. One job runs the scenarios of `support/holding_program.py`
that are asked for; whatever happened, each leaves nothing held, awaited or in the arena behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.job import Job

pytestmark = pytest.mark.timeout(240)

Results = dict[str, dict[str, Any]]

_OK = ["ok"] * 4
_STEPS = ("arriving", "staging", "staged", "serving", "served")
_EXPECTED: dict[str, Any] = {
    "well": _OK,
    **{f"killed-{step}": [True, *_OK[1:]] for step in _STEPS},
    **{f"killed-{step}-2": [True, *_OK[1:]] for step in ("asking", "asked")},
    **{f"frozen-{step}": _OK for step in _STEPS},
    "late-staged": ["Timeout", "ok", "ok", "ok"],
    **{f"cut-{step}": _OK for step in _STEPS},
    "cut-asking-2": _OK,
    "full-24": _OK,
    "full-40": _OK,
    **{f"cancelled-{step}": [[], [], [], []] for step in ("arriving", "staging")},
    **{f"orphaned-{step}": ["PeerLostError", 0, 0, 0] for step in ("arriving", "staging")},
    "together": [[], True],
}
_QUICK = {"killed-serving", "frozen-staged", "cut-arriving", "orphaned-staging"}


def _role(name: str, entry: str, total: int, *, driver: bool = False) -> str:
    restart = "{ policy = 'never', max = 0 }" if driver else "{ policy = 'one', max = 50 }"
    return (
        f"[roles.{name}]\nentry = 'tests.integration.support.holding_program:{entry}'\n"
        f"kind = 'simple'\ntotal = {total}\ndriver = {str(driver).lower()}\nrestart = {restart}\n"
    )


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Results]:
    cwd: Path = tmp_path_factory.mktemp("holding")
    ours = [item for item in request.session.items if item.path == request.path]
    scenarios = [item.callspec.params["scenario"] for item in ours]  # type: ignore[attr-defined]
    (cwd / "scenarios").write_text(" ".join(scenarios))
    roles = _role("driver", "Driver", 1, driver=True), _role("second", "Second", 1)
    (cwd / "job.toml").write_text("".join((*roles, _role("member", "Member", 4))))
    job = Job(
        ["--job", "job.toml", "--arena", "64MiB"],
        cwd=cwd,
        env={"PRETENDED_HOSTS": "h1:2,h2:4"},
        program="tests.integration.support.several",
    )
    try:
        assert job.wait(200) == 0, job.describe()
        job.assert_nothing_left()
        yield json.loads((cwd / "results.json").read_text())
    finally:
        job.close()


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(name, marks=() if name in _QUICK else pytest.mark.long) for name in _EXPECTED],
)
def test_each_member_gets_them_once_or_its_caller_hears_why(
    results: Results, scenario: str
) -> None:
    found = results[scenario]
    assert found.get("value") == _EXPECTED[scenario], found
    assert found["left"] == [0, 0, 0], "payloads held, calls that wait for one, slots in use"

"""What calls mean when there are very many of them at once: whose answer, which order, what is left.

One job a transport runs all scenarios of `support/scale_program.py`; each test looks at one of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.job import Job

Results = dict[str, dict[str, Any]]

_PROGRAM = Path(__file__).parent / "support" / "scale_program.py"


def role(name: str, entry: str, total: int, driver: bool) -> str:
    return (
        f'[roles.{name}]\nentry = "scale_program:{entry}"\ntotal = {total}\n'
        f'driver = {str(driver).lower()}\nrestart = {{ policy = "never", max = 0 }}\n'
    )


@pytest.fixture(scope="module", params=["auto", "zmq"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def results(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    cwd = tmp_path_factory.mktemp("scale")
    shutil.copy(_PROGRAM, cwd)
    roles = role("driver", "Driver", 2, True) + role("server", "Server", 1, False)
    (cwd / "job.toml").write_text(roles)
    job = Job(["--timeout", "50", "--transport", transport, "--job", "job.toml"], cwd=cwd)
    try:
        code = job.wait(58)
        assert code == 0, job.describe()
        job.assert_nothing_left()
        yield json.loads((cwd / "results.json").read_text())
    finally:
        job.close()


def value(results: Results, scenario: str) -> Any:
    assert "value" in results[scenario], results[scenario]["trace"]
    return results[scenario]["value"]


def nothing_is_left(found: dict[str, Any]) -> None:
    for before, after in zip(found["before"], found["after"], strict=True):
        assert all(after[what] <= before[what] for what in before), found
        assert after["slots"] == 0, found


def test_1000_threads_and_1000_tasks_at_once_each_get_their_own_answer(results: Results) -> None:
    found = value(results, "threads_and_tasks_at_once")
    assert found["wrong"] == []
    nothing_is_left(found)


def test_1000_handlers_that_call_out_at_once_each_get_their_own_answer(results: Results) -> None:
    assert value(results, "tasks_on_the_peer_loop") == [number + 1 for number in range(1000)]


def test_an_async_handler_calls_its_caller_back(results: Results) -> None:
    assert value(results, "there_and_back") == 3


def test_100_calls_there_and_back_through_handlers_of_limited_concurrency(
    results: Results,
) -> None:
    assert value(results, "100_there_and_back") == [number + 3 for number in range(100)]


def test_100_calls_that_go_to_and_fro_20_times(results: Results) -> None:
    assert value(results, "100_deep") == [number + 20 for number in range(100)]


def test_large_bodies_go_to_and_fro_without_a_deadlock(results: Results) -> None:
    assert value(results, "large_there_and_back") == []


def test_callers_wait_for_a_slow_callee_but_not_beyond_their_time(results: Results) -> None:
    found = value(results, "more_than_the_window")
    assert found["right"] == 160
    assert found["errors"] == ["Timeout"] * 20
    assert 0.3 <= found["waited"] < 20, "until the handler before them had ended"


@pytest.mark.parametrize(
    ("how", "instead"),
    [
        ("result", "await"),
        ("exception", "await"),
        ("wait_ready", "await"),
        ("sequence", "await"),
        ("batch", "await"),
        ("queue", "get_async"),
        ("proxy", "await"),
        ("barrier", "barrier_async"),
        ("kv", "kv.get_async"),
    ],
)
def test_a_blocking_wait_on_the_peer_loop_is_refused_and_names_the_async_form(
    results: Results, how: str, instead: str
) -> None:
    found = value(results, "blocking_on_the_loop")
    kind, text = found[how]
    assert kind == "MisuseError", text
    assert instead in text
    assert found["then"] == "alive"


def test_1000_cancelled_and_timed_out_calls_leave_nothing(results: Results, transport: str) -> None:
    found = value(results, "cancelled_and_timed_out")
    assert (found["during"]["slots"] > 0) is (transport == "auto")  # there was something to leave
    assert found["outcomes"] == {"CancelledError": 500, "Timeout": 500}
    nothing_is_left(found)


@pytest.mark.parametrize("method", ["note", "note_async"])
def test_calls_of_two_callers_start_in_the_order_of_each_whatever_their_size(
    results: Results, method: str
) -> None:
    found = value(results, "order")[method]
    assert found == {"0": list(range(100)), "1": list(range(100))}

"""What can go wrong in a call between two roles of a real job, and what the caller then sees.

One job runs all scenarios of `support/rpc_program.py`; each test looks at one of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.job import Job
from tests.integration.support.screen import assert_no_noise

Launch = Callable[..., Job]
Results = dict[str, dict[str, Any]]

_PROGRAM = Path(__file__).parent / "support" / "rpc_program.py"
AT_ONCE_S = 5.0
"""Much less than any wait that would have to run out, and enough for a busy machine."""


def role(name: str, entry: str, *, total: int = 1, driver: bool = False, restarts: int = 0) -> str:
    policy = "one" if restarts else "never"
    return (
        f'[roles.{name}]\nentry = "rpc_program:{entry}"\nkind = "simple"\ntotal = {total}\n'
        f"driver = {str(driver).lower()}\n"
        f'restart = {{ policy = "{policy}", max = {restarts} }}\n'
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    cwd = tmp_path_factory.mktemp("rpc")
    shutil.copy(_PROGRAM, cwd)
    roles = [
        role("driver", "Driver", driver=True),
        role("server", "Server", total=2),
        role("victim", "Server", total=2, restarts=1),
        role("late", "Late"),
        role("left", "Left"),
        role("right", "Right"),
        role("leaver", "leave_at_once"),
    ]
    (cwd / "job.toml").write_text("".join(roles))
    job = Job(["--timeout", "90", "--job", "job.toml"], cwd=cwd)
    try:
        code = job.wait(100)
        assert code == 0, job.describe()
        job.assert_nothing_left()
        yield json.loads((cwd / "results.json").read_text())
    finally:
        job.close()


def raised(results: Results, scenario: str, kind: str, *words: str) -> dict[str, Any]:
    """The scenario raised an error that is a `kind` and whose text says `words`."""
    found = results[scenario]
    assert "error" in found, f"nothing was raised: {found}"
    assert kind in found["error"], found["trace"]
    for word in words:
        assert word in found["text"], found["text"]
    return found


def test_an_unknown_method_lists_what_there_is_and_suggests_the_nearest(results: Results) -> None:
    found = raised(results, "unknown_method", "NotExposedError", "ecko", "echo", "add", "lookup")
    assert "AttributeError" in found["error"]
    assert {"echo", "add", "lookup", "slow"} <= set(found["attributes"]["exposed"])


@pytest.mark.parametrize(
    ("scenario", "word"), [("too_few_arguments", "right"), ("unknown_keyword", "middle")]
)
def test_wrong_arguments_fail_the_call_and_name_method_and_argument(
    results: Results, scenario: str, word: str
) -> None:
    found = results[scenario]
    assert {"TypeError", "MisuseError"} & set(found["error"]), found
    assert "add" in found["text"]
    assert word in found["text"]


def test_an_unpicklable_argument_fails_that_call_only(results: Results) -> None:
    found = results["unpicklable_argument"]
    assert {"TypeError", "MisuseError"} & set(found["error"]), found
    assert "lock" in found["text"].lower()
    assert found["seconds"] < AT_ONCE_S


def test_an_unpicklable_result_fails_that_call_only(results: Results) -> None:
    found = results["unpicklable_result"]
    assert "RuntimeFault" in found["error"], found
    assert "unpicklable" in found["text"]
    assert found["seconds"] < AT_ONCE_S


def test_an_unknown_role_lists_the_roles(results: Results) -> None:
    raised(results, "unknown_role", "MisuseError", "servr", "server", "victim", "driver")


def test_what_a_handler_raises_is_caught_by_its_own_class(results: Results) -> None:
    found = results["handler_raises"]["value"]
    assert {"KeyError", "RemoteError"} <= set(found["mro"])
    assert found["type_name"].endswith("KeyError")
    assert "table[key]" in found["remote_traceback"]
    assert (found["role"], found["rank"]) == ("server", 0)


def test_the_failures_of_a_group_come_together(results: Results) -> None:
    assert results["a_whole_group_raises"]["value"] == [["server", 0], ["server", 1]]


def test_a_callee_that_dies_in_mid_call_is_told_at_once_with_its_cause(results: Results) -> None:
    found = raised(results, "died_in_mid_call", "PeerLostError", "victim", "SIGKILL")
    assert "ConnectionError" in found["error"]
    assert found["attributes"] == {"role": "victim", "rank": 1, "cause": "SIGKILL"}
    assert found["seconds"] < AT_ONCE_S


def test_a_restarted_callee_is_reached_without_a_new_proxy(results: Results) -> None:
    assert results["died_in_mid_call_then_again"]["value"] == "back"


def test_a_callee_that_is_gone_for_good_fails_at_once(results: Results) -> None:
    found = raised(results, "gone_for_good", "PeerLostError", "leaver")
    assert found["seconds"] < AT_ONCE_S


def test_a_call_times_out_after_its_time_and_says_what_it_waited_for(results: Results) -> None:
    found = raised(results, "timeout", "Timeout", "slow", "server")
    assert "TimeoutError" in found["error"]
    assert 0.35 < found["seconds"] < AT_ONCE_S


def test_a_late_answer_goes_to_nobody(results: Results) -> None:
    assert results["timeout_drops_the_late_answer"]["value"] == list(range(20))


@pytest.mark.parametrize(
    "scenario", ["timeout_cancels_an_async_handler", "cancel_cancels_an_async_handler"]
)
def test_an_async_handler_is_cancelled(results: Results, scenario: str) -> None:
    assert results[scenario].get("value") is True, results[scenario]


def test_a_queued_call_whose_time_ran_out_never_starts(results: Results) -> None:
    events = results["queued_call_never_starts"]["value"]
    assert "start holds the thread" in events
    assert "start queued" not in events


def test_a_call_to_a_callee_that_still_starts_waits_for_it(results: Results) -> None:
    assert results["starting_callee"]["value"] == "at last"


def test_calls_of_one_caller_start_in_order_whatever_their_size(results: Results) -> None:
    assert results["order"].get("value") == [f"{i:03d}" for i in range(100)], results["order"]


def test_a_cycle_of_plain_handlers_fails_at_once_and_names_the_cycle(results: Results) -> None:
    found = results["cycle"]
    assert "error" in found, found
    assert "left" in found["text"]
    assert "right" in found["text"]
    assert "cycle" in found["text"].lower()
    assert found["seconds"] < AT_ONCE_S


def test_10000_interleaved_calls_of_8_callers_each_get_their_own_answer(
    launch: Launch, tmp_path: Path
) -> None:
    shutil.copy(_PROGRAM, tmp_path)
    text = role("caller", "many_calls", total=8, driver=True) + role("server", "Server")
    (tmp_path / "job.toml").write_text(text)
    job = launch("--job", "job.toml")
    assert job.wait(60) == 0, job.describe()
    assert job.out.count("all mine") == 8
    assert_no_noise(job)
    job.assert_nothing_left()


@pytest.mark.slow
def test_64_mib_and_bfloat16_tensors_come_back_bit_for_bit(launch: Launch, tmp_path: Path) -> None:
    shutil.copy(_PROGRAM, tmp_path)
    text = role("caller", "tensors", driver=True) + role("server", "Server")
    (tmp_path / "job.toml").write_text(text)
    job = launch("--job", "job.toml")
    assert job.wait(60) == 0, job.describe()
    assert "bit for bit" in job.out
    job.assert_nothing_left()

"""Every way to call, between the processes of a real job: one job runs all of `support/api_program.py`.

And the example of typed stubs, as its README says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.job import ROOT, Job

_PROGRAM = Path(__file__).parent / "support" / "api_program.py"

_JOB = """
[roles.driver]
entry = "api_program:Driver"

[roles.worker]
entry = "api_program:Worker"
total = 4
driver = false

[roles.victim]
entry = "api_program:Worker"
total = 3
driver = false
restart = { policy = "one", max = 20 }
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    cwd = tmp_path_factory.mktemp("api")
    shutil.copy(_PROGRAM, cwd)
    (cwd / "job.toml").write_text(_JOB)
    job = Job(["--timeout", "90", "--job", "job.toml"], cwd=cwd)
    try:
        code = job.wait(100)
        assert code == 0, job.describe()
        job.assert_nothing_left()
        yield json.loads((cwd / "results.json").read_text())
    finally:
        job.close()


def test_a_batch_of_5_on_4_ranks_is_2_2_1_and_none(results: dict[str, Any]) -> None:
    length, last, some, waited, every, pieces = results["batch"]
    assert (length, last, some) == (5, 10, [4, 6])
    assert waited == every == [2, 4, 6, 8, 10]
    assert pieces == [[[n, "text", [7, 8]]] for n in (2, 2, 1)] + [[]]


def test_an_empty_batch_calls_nobody(results: dict[str, Any]) -> None:
    assert results["batch_of_nothing"] == [0, [], [[], [], [], []]]


def test_a_tensor_is_cut_along_dim_0(results: dict[str, Any]) -> None:
    assert results["batch_of_a_tensor"] == [True, [[[2]], [[2]], [[2]], []]]


def test_each_member_gets_its_own_item_of_scattered_lists(results: dict[str, Any]) -> None:
    assert results["scatter"] == ["0a1", "1b2", "2c3", "3d4"]


def test_calls_of_any_member_are_spread(results: dict[str, Any]) -> None:
    assert results["any"] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_weights_reach_every_member_as_its_own(results: dict[str, Any]) -> None:
    before, after, scribbled = results["broadcast"]
    assert before == [[-1, 2.0**20, 3.0, 9.0]] * 4
    assert after == [[5, 2.0**20, 3.0, 9.0]] * 4
    assert scribbled == [rank * 2.0**20 for rank in range(4)], "neither the sender's nor another's"


def test_streams_end_and_can_be_given_up(results: dict[str, Any]) -> None:
    assert results["stream"] == [True, [[rank, rank] for rank in range(4)]]
    assert results["stream_given_up"] is True


def test_a_death_fails_what_the_dead_member_had_to_give(results: dict[str, Any]) -> None:
    assert results["batch_with_a_death"] == [2, 6, ["SIGKILL", 1], [1]]
    assert results["stream_with_a_death"] == [23, [0, 1, 2], ["SIGKILL"]]


def test_an_idempotent_call_survives_the_death_of_its_member(results: dict[str, Any]) -> None:
    assert results["any_with_a_death"] == [True, True]
    assert results["retry_with_a_death"] == 2


def test_everything_can_be_awaited_on_the_peer_loop_and_on_one_s_own(
    results: dict[str, Any],
) -> None:
    ranks = [0, 1, 2, 3]
    streamed = [[rank, rank] for rank in ranks]
    assert results["peer_loop"] == [ranks, [2, 4, 6], streamed, [0, 1, 2]]
    assert results["own_loop"] == [ranks, [2, 4], [[0, 10], [1, 12]]]


def test_handlers_run_where_they_say(results: dict[str, Any]) -> None:
    assert results["on_the_loop"] == [True] * 4
    assert results["export_twice"] == 42
    assert results["proxy"] == ["3x1", [0, 1, 2]]


def test_the_example_of_typed_stubs_runs(launch: Callable[..., Job]) -> None:
    shown = launch("--timeout", "60", "--job", ROOT / "examples/remote_call/job.toml")
    assert shown.wait(60) == 0, shown.describe()
    for line in (
        "judges: judge-0, judge-1",
        "alpha: 4",
        "delta: 3",
        "scored by the first judge: 3",
    ):
        assert f"[player 0] {line}" in shown.out

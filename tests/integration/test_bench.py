"""The turns of the measurements in `bench/`, each with few repetitions: that they work, not what they find."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bench import common, group, launch_hosts, overload, queue, rpc, tensor
from tests.integration.support.hosts import Hosts

Turn = Callable[[], Mapping[str, float]]

_PROGRAMS = "tests.integration.support.bench_programs"


def test_the_processes_of_a_turn_hand_over_figures_when_all_have_ended() -> None:
    found = common.run_programs(_PROGRAMS, ["serve 1", "serve 2"], "call")
    assert found == {"servers": 2}


def test_a_server_that_does_not_come_up_ends_the_turn_with_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"not there \(exit 3\): no such side: brak"):
        common.run_programs(_PROGRAMS, ["brak"], "call")


def test_a_job_that_fails_ends_the_turn_with_its_last_lines() -> None:
    with pytest.raises(RuntimeError, match=r"exit 2: .*no module of that name"):
        common.run_job(common.role("driver", "no_such_module:main", driver=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "turn",
    [
        pytest.param(lambda: rpc.raw("unix"), id="rpc-unix"),
        pytest.param(lambda: rpc.raw("busy"), id="rpc-busy"),
        pytest.param(lambda: rpc.raw("zmq"), id="rpc-zmq"),
        pytest.param(lambda: rpc.raw("zmq-loop"), id="rpc-zmq-loop"),
        pytest.param(lambda: group.raw(3), id="group"),
        pytest.param(lambda: tensor.raw("memcpy-1"), id="memcpy"),
        pytest.param(lambda: tensor.raw("tcp-1"), id="sendall"),
        pytest.param(lambda: tensor.raw("fresh-1"), id="sendall-fresh"),
        pytest.param(lambda: queue.raw("stream"), id="queue-stream"),
        pytest.param(lambda: queue.raw("mp"), id="queue-mp"),
    ],
)
def test_the_sides_that_we_are_compared_with_work(
    turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    works(turn, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "turn",
    [
        pytest.param(lambda: rpc.job("-m bench.rpc_job echo"), id="rpc"),
        pytest.param(lambda: rpc.job("-m bench.rpc_job echo", "BusyServer"), id="rpc-busy"),
        pytest.param(lambda: rpc.blocking("plain_echo"), id="rpc-blocking"),
        pytest.param(lambda: rpc.tcp("small-curve"), id="rpc-tcp"),
        pytest.param(lambda: group.job("-m bench.rpc_job echo all", 3), id="group"),
        pytest.param(lambda: group.job("bench.rpc_job:block_all", 3), id="group-blocking"),
        pytest.param(
            lambda: group.job("-m bench.group_job", 2, "group_job:Learner"), id="broadcast"
        ),
        pytest.param(lambda: group.remote("held"), id="broadcast-hosts"),
        pytest.param(lambda: tensor.job(1), id="tensor"),
        pytest.param(lambda: tensor.tcp("1"), id="tensor-tcp"),
        pytest.param(lambda: queue.job("blocking"), id="queue-blocking"),
        pytest.param(lambda: queue.job("async"), id="queue-async"),
        pytest.param(lambda: queue.job("ahead"), id="queue-ahead"),
        pytest.param(lambda: queue.job("async", "apart"), id="queue-apart"),
        pytest.param(lambda: overload.job("cast", 32, 1.0), id="overload-casts"),
        pytest.param(lambda: overload.job("call", 1024, 1.0), id="overload-calls"),
        pytest.param(lambda: overload.job("queue", 32, 1.0), id="overload-queue"),
    ],
)
def test_our_own_sides_work(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    works(turn, monkeypatch)


@pytest.mark.slow
def test_a_launch_on_hosts_and_what_it_is_compared_with_work(hosts: Hosts, tmp_path: Path) -> None:
    for argv in (launch_hosts.ours, launch_hosts.plain_ssh):
        found = launch_hosts.measure(hosts, argv(tmp_path), tmp_path)
        assert 0 < found["first line, s"] <= found["first line of all, s"] <= found["exit, s"]


def works(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_SCALE", "0.01")
    found = turn()
    assert found
    assert all(isinstance(value, float | int) for value in found.values()), found

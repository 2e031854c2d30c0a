"""What `runtime.init` decides before it talks to anybody, and what it makes of what the ranks say."""

from __future__ import annotations

import pytest

import runtime
from runtime import embedding
from runtime.errors import MisuseError, RendezvousError
from runtime.launcher.plan import planned_actors
from runtime.launcher.torchrun import Outer, Place
from runtime.transport.security import Security

OUTER_NAMES = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "RUNTIME_ACTOR")
OUTER = Outer("torchrun", "run", 0, 4, 0, 0, Place(("h",), (1,)), node="0", restart=1)


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OUTER_NAMES:
        monkeypatch.delenv(name, raising=False)


def record(host: str, node: str, local_rank: int, **more: object) -> dict[str, object]:
    rank = {"pid": 100 + local_rank, "host": host, "node": node, "local_rank": local_rank}
    return {**rank, "role": "default", "role_rank": 0, **more}


def test_outside_of_any_job_it_says_how_to_start_one() -> None:
    with pytest.raises(MisuseError, match=r"torchrun --nproc-per-node 2 script\.py"):
        runtime.init()


def test_settings_that_mean_nothing_are_named() -> None:
    with pytest.raises(MisuseError, match=r"timeout=0\): allowed are seconds above 0"):
        runtime.init(timeout=0)
    with pytest.raises(MisuseError, match="transport='tcp'"):
        runtime.init(transport="tcp")  # type: ignore[arg-type]


def test_a_child_of_a_worker_is_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_ACTOR", "trainer-1")
    with pytest.raises(MisuseError, match=r"started by the worker trainer-1"):
        runtime.init()


def test_shutdown_without_init_is_nothing() -> None:
    runtime.shutdown()
    with pytest.raises(MisuseError, match="torchrun"):
        runtime.init()  # and is no leaving


def test_ranks_are_sorted_into_nodes_by_local_rank_with_rank_0_first() -> None:
    ranks = [record("b", "1", 0), record("a", "0", 1), record("b", "1", 1), record("a", "0", 0)]
    assert embedding._by_node(ranks) == [[0, 2], [3, 1]]


def test_without_numbers_nodes_are_told_apart_by_their_hosts() -> None:
    assert embedding._by_node([record("a", "", 0), record("b", "", 0)]) == [[0], [1]]


def test_two_ranks_with_one_local_rank_are_refused() -> None:
    with pytest.raises(RendezvousError, match=r"the ranks \[0, 1\] on a have the local ranks"):
        embedding._by_node([record("a", "", 0), record("a", "", 0)])


def test_the_plan_names_every_rank_by_its_role_and_its_rank_there() -> None:
    ranks = [
        record("a", "0", 0),
        record("a", "0", 1, role="eval"),
        record("b", "1", 0, role_rank=1),
    ]
    plan = embedding._plan(OUTER, ranks, embedding._by_node(ranks))
    infos = planned_actors(plan)
    assert [info.name for info in infos] == ["default-0", "eval-0", "default-1"]
    assert [info.node_rank for info in infos] == [0, 0, 1]
    assert [(info.world_size, info.local_world_size) for info in infos] == [(2, 2), (1, 2), (2, 1)]
    assert [host.name for host in plan.hosts] == ["a", "b"]


def test_the_first_host_is_where_the_others_see_it() -> None:
    keys = Security(b"p" * 32, b"s" * 32, frozenset({b"p" * 32}))

    def leader(host: str, node: str, **more: object) -> dict[str, object]:
        return record(host, node, 0, key=(node * 32).encode().hex(), **more)

    ranks = [
        leader("a", "0", address="127.0.1.1", first="127.0.1.1", addresses=["10.0.0.1"]),
        leader("b", "1", address="10.0.0.2", first="10.0.0.1", addresses=["10.0.0.2", "10.9.0.2"]),
    ]
    nodes = embedding._by_node(ranks)
    settings = embedding._Settings(1.0, "auto", None, None)
    first = embedding._assignment(OUTER, settings, ranks, nodes)
    assert (first.address, first.security) == ("", None)  # until it is known that there are two
    first = embedding._secured(first, keys, ranks, nodes)
    assert first.address == "10.0.0.1"
    assert set(first.accept_from) == {"10.0.0.1", "10.0.0.2", "10.9.0.2"}
    assert first.security == keys._replace(allowed=frozenset({b"0" * 32, b"1" * 32}))
    other = embedding._assignment(OUTER._replace(rank=1), settings, ranks, nodes)
    assert embedding._secured(other, keys, ranks, nodes).address == "10.0.0.2"

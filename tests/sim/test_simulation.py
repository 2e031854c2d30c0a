"""The control plane under some thousand schedules of faults, and wrong ones that must be found.

SIM_RUNS sets how many schedules are played (2,000 otherwise); SIM_SEED plays just that one.
"""

from __future__ import annotations

import os

import pytest

from runtime.machine import Call, Effect, Message, Reply
from tests.sim.mutants import MUTANTS
from tests.sim.referee import Violation
from tests.sim.supervision import supervised
from tests.sim.world import Extension, Kit, World, play

_PARTS = 4


@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(_PARTS))
def test_no_schedule_breaks_a_rule(part: int) -> None:
    if "SIM_SEED" in os.environ:
        play(int(os.environ["SIM_SEED"]))
        return
    runs = int(os.environ.get("SIM_RUNS", "2000"))
    releases = sum(play(seed).referee.releases for seed in range(part, runs, _PARTS))
    assert releases > runs / _PARTS  # The schedules get somewhere at all.


@pytest.mark.timeout(0)
@pytest.mark.parametrize("traffic", [False, True])
def test_no_schedule_breaks_a_rule_of_supervision(traffic: bool) -> None:
    kit = supervised(traffic=traffic)
    if "SIM_SEED" in os.environ:
        play(int(os.environ["SIM_SEED"]), kit)
        return
    # The other machines are dear, and have been watched for as long already.
    runs = int(os.environ.get("SIM_RUNS", "2000")) // (20 if traffic else 2)
    umpires = [play(seed, kit).parts["supervision"].umpire for seed in range(runs)]
    assert sum(umpire.restarts for umpire in umpires) > runs / 4
    codes = {end["code"] for umpire in umpires for end in umpire.ended.values()}
    assert {0, 3, 130, 139} <= codes


def test_a_seed_decides_everything() -> None:
    one, two = play(7), play(7)
    assert (one.entries, one.plane.dump()) == (two.entries, two.plane.dump())
    assert play(8).entries != one.entries


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_machine_is_found(name: str) -> None:
    found = (violation for seed in range(400) if (violation := _violation(seed, MUTANTS[name])))
    assert "SIM_SEED=" in next(found, "nothing found")


def _violation(seed: int, kit: Kit) -> str | None:
    try:
        play(seed, kit)
    except Violation as violation:
        return str(violation)
    return None


class _Counter:
    """A machine that others could add: counts, and knows nothing else."""

    def __init__(self) -> None:
        self.count = 0
        self.heard = 0

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        if message["op"] == "member":
            self.heard += 1
            return []
        self.count += 1
        return [] if call is None else [Reply(call, self.count)]

    def tick(self, now: float) -> list[Effect]:
        return []

    def deadline(self) -> float | None:
        return None

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        return []

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        return []

    def why(self, call: Call) -> str | None:
        return None

    def dump(self) -> dict[str, int]:
        return {"count": self.count, "heard": self.heard}

    def load(self, state: dict[str, int]) -> None:
        self.count, self.heard = state["count"], state["heard"]


def test_other_machines_can_take_part() -> None:
    seen: list[Effect] = []

    def act(world: World) -> None:
        world.agents[0].client.ask("counter", {"op": "count"}, lambda _: None)

    def check(world: World, effects: list[Effect]) -> None:
        seen.extend(effects)

    extension = Extension("counter", _Counter, act, check, listens=True)
    world = play(3, Kit(extensions=(extension,)))
    state = world.plane.dump()["machines"]["counter"]
    assert state["count"] > 0
    assert state["heard"] > 0
    assert len(seen) > world.entries / 4

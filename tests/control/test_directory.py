"""Names and their owners."""

from __future__ import annotations

import pytest

from runtime.control.directory import NameDirectory
from runtime.errors import MisuseError
from runtime.machine import Call, Machine, Reply
from tests.contracts.machine_contract import MachineContract, Step, ask


class TestDirectory(MachineContract):
    def make(self) -> Machine:
        return NameDirectory()

    def script(self) -> list[Step]:
        return [
            ask(0, "a.0", 1, "lookup", name="q"),
            ask(1, "b.0", 1, "register", name="q", value=1),
            ask(2, "c.0", 1, "register", name="q", value=2),
            ask(2, "c.0", 2, "unregister", name="q"),
            ask(3, "c.0", 3, "lookup", name="r"),
            ask(4, "c.0", 4, "names"),
            ask(5, "b.0", 2, "unregister", name="q"),
            ask(6, "a.0", 2, "lookup", name="q"),
        ]


def _register(machine: NameDirectory, owner: str, number: int, value: object = 1) -> object:
    message = {"op": "register", "name": "q", "value": value}
    return machine.handle(message, Call(owner, number), 0)


def test_a_name_waits_for_its_owner() -> None:
    machine = NameDirectory()
    assert machine.handle({"op": "lookup", "name": "q"}, Call("c.0", 1), 0) == []
    assert machine.why(Call("c.0", 1)) == "waiting for somebody to own the name 'q'"
    assert _register(machine, "o.0", 1, "here") == [
        Reply(Call("o.0", 1), {}),
        Reply(Call("c.0", 1), {"owner": "o.0", "value": "here"}),
    ]


def test_a_second_living_owner_is_refused() -> None:
    machine = NameDirectory()
    _register(machine, "o.0", 1)
    with pytest.raises(MisuseError, match=r"'q' is owned by o.0, which is alive"):
        _register(machine, "p.0", 1)
    with pytest.raises(MisuseError, match=r"p.0 cannot give back 'q': o.0 owns it"):
        machine.handle({"op": "unregister", "name": "q"}, Call("p.0", 2), 0)


def test_the_owner_may_say_it_again_and_change_its_value() -> None:
    machine = NameDirectory()
    _register(machine, "o.0", 1, 1)
    _register(machine, "o.0", 2, 2)
    assert machine.dump()["names"]["q"]["value"] == 2


def test_a_name_is_free_when_its_owner_is_lost_or_gives_it_back() -> None:
    machine = NameDirectory()
    _register(machine, "o.0", 1)
    machine.lost("o.0", "SIGKILL", 0)
    _register(machine, "p.0", 1)
    machine.handle({"op": "unregister", "name": "q"}, Call("p.0", 2), 0)
    assert _register(machine, "o.1", 1) == [Reply(Call("o.1", 1), {})]

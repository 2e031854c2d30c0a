"""Keys, versions, expiry, watches. The whole story stands in `cases/kv.txt`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.control.kv import Kv
from runtime.errors import VersionConflict
from runtime.machine import Call, Machine, Reply
from tests.contracts.machine_contract import MachineContract, Step, ask


class TestKv(MachineContract):
    def make(self) -> Machine:
        return Kv()

    def script(self) -> list[Step]:
        return [
            ask(0, "a.0", 1, "watch", key="k", since=0),
            ask(1, "a.0", 2, "put", key="k", value=[b"1"], ttl_s=5),
            ask(1, "b.0", 1, "watch", key="k", since=1),
            ask(2, "b.0", 2, "put", key="l", value="x", if_version=0),
            ask(2, "b.0", 3, "put", key="l", value="y", if_version=0),
            ask(3, "b.0", 4, "watch", key="l", since=2),
            ask(7, "b.0", 5, "get", key="k"),
            ask(8, "b.0", 6, "delete", key="l"),
            ask(8, "b.0", 7, "keys"),
            ask(9, "b.0", 8, "watch", key="k", since=0),
        ]


def _do(machine: Kv, op: str, now: float = 0, **fields: Any) -> Any:
    (effect, *_) = machine.handle({"op": op, **fields}, Call("c", 0), now)
    assert isinstance(effect, Reply)
    return effect.value


_OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "delete", "get"]),
        st.sampled_from("ab"),
        st.none() | st.integers(0, 6),
        st.none() | st.floats(0.1, 3),
        st.floats(0, 2),
    ),
    max_size=30,
)


@given(_OPERATIONS)
def test_it_does_what_a_dictionary_with_versions_does(operations: list[Any]) -> None:
    machine, model, version, now = Kv(), {}, 0, 0.0
    for op, key, wanted, ttl_s, passes in operations:
        now += passes
        model = {k: entry for k, entry in model.items() if entry[2] is None or entry[2] > now}
        found = model.get(key, (None, 0, None))
        more = {"if_version": wanted} if op != "get" else {}
        if op != "get" and wanted not in (None, found[1]):
            with pytest.raises(VersionConflict):
                _do(machine, op, now, key=key, value=version, ttl_s=ttl_s, **more)
            continue
        answer = _do(machine, op, now, key=key, value=version, ttl_s=ttl_s, **more)
        if op == "get":
            assert (answer["value"], answer["version"]) == found[:2]
        elif op == "put":
            model[key] = (version, version + 1, None if ttl_s is None else now + ttl_s)
            version += 1
            assert answer == {"version": version}
        else:
            assert answer == {"deleted": found[1] > 0}
            model.pop(key, None)


def test_a_put_renews_or_lifts_the_expiry() -> None:
    machine = Kv()
    _do(machine, "put", key="k", value=1, ttl_s=5)
    _do(machine, "put", 4, key="k", value=1, ttl_s=5)
    assert machine.deadline() == 9
    _do(machine, "put", 8, key="k", value=1)
    assert machine.deadline() is None
    assert _do(machine, "get", 100, key="k")["version"] == 3


def test_putting_nothing_is_putting_something() -> None:
    machine = Kv()
    _do(machine, "put", key="k", value=None)
    assert _do(machine, "get", key="k") == {"value": None, "version": 1, "lease": None}

"""Names of the job, each owned by one living process: a pure machine.

A queue's owner registers its name here; its clients look it up and wait until it is there. A name is
given back when its owner is lost, and may then be owned by another.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from runtime.control.messages import Operation, asked, call_from, call_state, operation, text
from runtime.errors import MisuseError
from runtime.machine import Call, Effect, Message, Reply


@dataclass(slots=True)
class _Name:
    owner: str
    value: Any


class NameDirectory:
    """The machine "directory".

    Operations: register{name, value} -> {} (a second living owner: `MisuseError`), unregister{name} ->
    {}, lookup{name} -> {"owner", "value"} (waits until the name is there), names{} -> [names].
    """

    def __init__(self) -> None:
        self._names: dict[str, _Name] = {}
        self._lookups: dict[Call, str] = {}
        self._operations: dict[str, Operation] = {
            "register": self._register,
            "unregister": self._unregister,
            "lookup": self._lookup,
            "names": self._list,
        }

    # -- the machine --------------------------------------------------------------------------

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return operation("directory", self._operations, message)(message, call, now)

    def tick(self, now: float) -> list[Effect]:
        return []

    def deadline(self) -> float | None:
        return None

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        self._lookups.pop(call, None)
        return []

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        self._names = {name: item for name, item in self._names.items() if item.owner != peer}
        self._lookups = {call: name for call, name in self._lookups.items() if call.client != peer}
        return []

    def why(self, call: Call) -> str | None:
        name = self._lookups.get(call)
        return None if name is None else f"waiting for somebody to own the name {name!r}"

    def dump(self) -> dict[str, Any]:
        return {
            "names": {name: asdict(item) for name, item in self._names.items()},
            "lookups": [[call_state(call), name] for call, name in self._lookups.items()],
        }

    def load(self, state: dict[str, Any]) -> None:
        self._names = {name: _Name(**item) for name, item in state["names"].items()}
        self._lookups = {call_from(call): name for call, name in state["lookups"]}

    # -- operations ---------------------------------------------------------------------------

    def _register(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, name = asked(message, call), text(message, "name")
        taken = self._names.get(name)
        if taken is not None and taken.owner != call.client:
            raise MisuseError(f"the name {name!r} is owned by {taken.owner}, which is alive")
        self._names[name] = _Name(call.client, message.get("value"))
        waiting = [call for call, wanted in self._lookups.items() if wanted == name]
        for waiter in waiting:
            del self._lookups[waiter]
        return [Reply(call, {}), *(self._found(waiter, name) for waiter in waiting)]

    def _unregister(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, name = asked(message, call), text(message, "name")
        taken = self._names.get(name)
        if taken is not None and taken.owner != call.client:
            raise MisuseError(f"{call.client} cannot give back {name!r}: {taken.owner} owns it")
        self._names.pop(name, None)
        return [Reply(call, {})]

    def _lookup(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, name = asked(message, call), text(message, "name")
        if name in self._names:
            return [self._found(call, name)]
        self._lookups[call] = name
        return []

    def _list(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return [Reply(asked(message, call), sorted(self._names))]

    def _found(self, call: Call, name: str) -> Reply:
        item = self._names[name]
        return Reply(call, {"owner": item.owner, "value": item.value})

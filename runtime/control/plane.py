"""The control plane: machines that it does not know, one log of entries, answers given once.

Everything that happens to the plane is an `Entry`: a message, a tick, a caller that gave up, a process
that was lost. `apply` is the only way in, and what it does depends on nothing but the entries so far; so
the same entries on another voter give the same state, waiting callers included. With one voter an
entry is applied as soon as it is made (`handle`, `tick`, `cancelled`, `lost` make one each), and
there is nothing to keep of it.

A command carries a `Call`, (client, number), that stays the same when it is sent again. The plane
keeps each answer until the client no longer asks for it: every command brings the numbers that are
still `open` over there, and whatever is lower and not among them is forgotten and never run again.

What machines emit can concern other machines. Two kinds of events are handed on in the same entry:
"lost" (to `lost` of every machine) and "member" (as a message to those that listen). A process that
was lost is fenced: nothing that it says later is heard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from runtime.control.barrier import Barrier
from runtime.control.directory import NameDirectory
from runtime.control.kv import Kv
from runtime.control.membership import Membership
from runtime.control.messages import asked, error_from, error_state, listed, mapping, text, whole
from runtime.control.rendezvous import Rendezvous
from runtime.errors import MisuseError, RuntimeFault
from runtime.machine import Call, Effect, Emit, Fail, Machine, Message, Reply

_FENCED_KEPT = 4096
"""Lost processes that are remembered; the oldest are forgotten first."""


class Entry(NamedTuple):
    """One thing that happens to the plane, stamped with log time (seconds)."""

    kind: Literal["message", "tick", "cancelled", "lost"]
    now: float
    message: Message | None = None
    call: Call | None = None
    peer: str = ""
    cause: str = ""


@dataclass(slots=True)
class _Client:
    """What is owed to one client."""

    newest: int = -1
    open: set[int] = field(default_factory=set)
    """Of the numbers below `newest`, those that it still wants an answer to."""
    waiting: dict[int, str] = field(default_factory=dict)
    """Number of an unanswered command, and the machine that has it."""
    answers: dict[int, list[Any]] = field(default_factory=dict)
    """["value", value], ["error", state], or ["withdrawn"], by number."""

    def wants(self, number: int) -> bool:
        return number >= self.newest or number in self.open


def standard_machines(*, heartbeat_timeout: float = 10.0) -> dict[str, Machine]:
    """The machines that every job's control plane has."""
    return {
        "membership": Membership(heartbeat_timeout=heartbeat_timeout),
        "rendezvous": Rendezvous(),
        "barrier": Barrier(),
        "kv": Kv(),
        "directory": NameDirectory(),
    }


class Plane:
    """Composes machines and is one itself.

    Messages: ask{machine, message, open}, withdraw{id, open} -> {"why", "answer"}, why{id, open} ->
    {"why"}. `open`: numbers of the client's earlier commands that it has no answer to yet. A
    withdrawal that comes too late hands over the answer: a wait is either withdrawn or answered.
    """

    def __init__(
        self, machines: Mapping[str, Machine], *, listeners: Sequence[str] = ("barrier",)
    ) -> None:
        self._machines = dict(machines)
        self._listeners = [name for name in listeners if name in machines]
        self._clients: dict[str, _Client] = {}
        self._fenced: dict[str, str] = {}
        self._stamp = 0.0
        self._index = 0

    @property
    def machines(self) -> Mapping[str, Machine]:
        """The machines by name: to be read, never to be changed."""
        return self._machines

    def apply(self, entry: Entry) -> list[Effect]:
        """Take the next entry of the log. Log time never goes back."""
        self._stamp = now = max(self._stamp, entry.now)
        self._index += 1
        if entry.kind == "tick":
            return self._apply_tick(now)
        if entry.kind == "lost":
            return self._apply_lost(entry.peer, entry.cause, now)
        if entry.kind == "cancelled":
            assert entry.call is not None
            return self._apply_cancelled(entry.call, now)
        assert entry.message is not None
        return self._apply_message(entry.message, entry.call, now)

    # -- the machine --------------------------------------------------------------------------

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return self.apply(Entry("message", now, message, call))

    def tick(self, now: float) -> list[Effect]:
        return self.apply(Entry("tick", now))

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        return self.apply(Entry("cancelled", now, call=call))

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        return self.apply(Entry("lost", now, peer=peer, cause=cause))

    def deadline(self) -> float | None:
        deadlines = (machine.deadline() for machine in self._machines.values())
        return min((due for due in deadlines if due is not None), default=None)

    def why(self, call: Call) -> str | None:
        client = self._clients.get(call.client)
        name = client.waiting.get(call.id) if client else None
        return self._machines[name].why(call) if name else None

    def dump(self) -> dict[str, Any]:
        clients = {
            name: [client.newest, sorted(client.open), client.waiting, client.answers]
            for name, client in self._clients.items()
        }
        return {
            "stamp": self._stamp,
            "index": self._index,
            "clients": clients,
            "fenced": dict(self._fenced),
            "machines": {name: machine.dump() for name, machine in self._machines.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        self._stamp, self._index = state["stamp"], state["index"]
        self._fenced = dict(state["fenced"])
        self._clients = {}
        for name, (newest, still_open, waiting, answers) in state["clients"].items():
            kept = {number: list(answer) for number, answer in answers.items()}
            self._clients[name] = _Client(newest, set(still_open), dict(waiting), kept)
        for name, machine in self._machines.items():
            machine.load(state["machines"][name])

    # -- commands -----------------------------------------------------------------------------

    def _apply_message(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        if call is None:
            return self._run(message, None, now)
        if call.client in self._fenced:
            cause = self._fenced[call.client]
            return [
                Fail(
                    call, MisuseError(f"{call.client} was declared lost ({cause}); it is not heard")
                )
            ]
        client = self._clients.setdefault(call.client, _Client())
        effects = self._acknowledge(client, message, call, now)
        if not client.wants(call.id) or call.id in client.waiting:
            return effects
        if call.id in client.answers:
            return effects + _repeated(call, client.answers[call.id])
        effects += self._run(message, call, now)
        return effects

    def _acknowledge(
        self, client: _Client, message: Message, call: Call, now: float
    ) -> list[Effect]:
        """Forget what the client is through with, which it says with every new command."""
        if call.id <= client.newest:
            return []
        # Never open a number again: this command may be older than one that was sent anew with a
        # lower number, after an answer had come in between.
        numbers = [number for number in message.get("open", ()) if isinstance(number, int)]
        client.open = {number for number in numbers if client.wants(number)}
        client.newest = call.id
        client.answers = {n: answer for n, answer in client.answers.items() if client.wants(n)}
        effects: list[Effect] = []
        for number in [number for number in client.waiting if not client.wants(number)]:
            name = client.waiting.pop(number)
            cancelled = self._machines[name].cancelled(Call(call.client, number), now)
            effects += self._sift(cancelled, now)
        return effects

    def _run(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        try:
            if message.get("op") == "ask":
                name = text(message, "machine")
                if name not in self._machines:
                    raise MisuseError(
                        f"no machine {name!r}; there are {listed(sorted(self._machines))}"
                    )
                effects = self._machines[name].handle(mapping(message, "message"), call, now)
            else:
                name, effects = "", self._own(message, asked(message, call), now)
        except RuntimeFault as error:
            if call is None:
                return [Emit({"kind": "refused", "reason": error.reason})]
            name, effects = "", [Fail(call, error)]
        if call is not None:
            # Until an effect answers it; `_sift` takes it out again.
            self._clients[call.client].waiting[call.id] = name
        return self._sift(effects, now)

    def _own(self, message: Message, call: Call, now: float) -> list[Effect]:
        """The plane's own operations."""
        op, about = message.get("op"), Call(call.client, whole(message, "id"))
        if op == "why":
            return [Reply(call, {"why": self.why(about)})]
        if op != "withdraw":
            raise MisuseError(f"the plane has no operation {op!r}; it has ask, why, withdraw")
        why, answer = self.why(about), self._clients[call.client].answers.get(about.id)
        if answer is not None:
            return [Reply(call, {"why": why, "answer": answer})]
        withdrawn = self._apply_cancelled(about, now)
        return [*withdrawn, Reply(call, {"why": why, "answer": None})]

    # -- other entries ------------------------------------------------------------------------

    def _apply_tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for machine in self._machines.values():
            due = machine.deadline()
            if due is not None and due <= now:
                effects += self._sift(machine.tick(now), now)
        return effects

    def _apply_cancelled(self, call: Call, now: float) -> list[Effect]:
        if call.client in self._fenced:
            return []
        client = self._clients.setdefault(call.client, _Client())
        if not client.wants(call.id):
            return []
        name = client.waiting.pop(call.id, "")
        # Also when the command itself has not come yet: then it will find this.
        client.answers[call.id] = ["withdrawn"]
        return self._sift(self._machines[name].cancelled(call, now), now) if name else []

    def _apply_lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        if peer in self._fenced:
            return []
        self._fenced[peer] = cause
        if len(self._fenced) > _FENCED_KEPT:
            del self._fenced[next(iter(self._fenced))]
        self._clients.pop(peer, None)
        effects: list[Effect] = []
        for machine in self._machines.values():
            effects += self._sift(machine.lost(peer, cause, now), now)
        return effects

    # -- effects ------------------------------------------------------------------------------

    def _sift(self, effects: Iterable[Effect], now: float) -> list[Effect]:
        """Keep answers, hand events on to the machines they concern; return all that is to be done."""
        out: list[Effect] = []
        for effect in effects:
            match effect:
                case Reply(call, value):
                    if self._keep(call, ["value", value]):
                        out.append(effect)
                case Fail(call, error):
                    if self._keep(call, ["error", error_state(error)]):
                        out.append(effect)
                case Emit(event):
                    out.append(effect)
                    out += self._hand_on(event, now)
                case _:
                    out.append(effect)
        return out

    def _keep(self, call: Call, answer: list[Any]) -> bool:
        """Note an answer; False when nobody waits for it any more."""
        client = self._clients.get(call.client)
        if client is None or call.id not in client.waiting:
            return False
        del client.waiting[call.id]
        client.answers[call.id] = answer
        return True

    def _hand_on(self, event: Message, now: float) -> list[Effect]:
        if event.get("kind") == "lost":
            return self._apply_lost(str(event["peer"]), str(event["cause"]), now)
        effects: list[Effect] = []
        if event.get("kind") == "member":
            for name in self._listeners:
                told = self._machines[name].handle({"op": "member", **event}, None, now)
                effects += self._sift(told, now)
        return effects


def _repeated(call: Call, answer: list[Any]) -> list[Effect]:
    """The first answer, for a command that came again."""
    if answer[0] == "value":
        return [Reply(call, answer[1])]
    if answer[0] == "error":
        return [Fail(call, error_from(answer[1]))]
    return []

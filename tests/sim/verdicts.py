"""The rules that supervision must keep, whatever happens to a job: a model of what it was told and said.

The `Umpire` knows more than the machine: how each worker really came to its end. It keeps all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from runtime.machine import Message
from tests.sim.referee import demand

Directives = Sequence[tuple[str, Message]]


@dataclass(eq=False)
class End:
    """How one worker ended. Times are wall clock."""

    code: int = 0
    signal: int = 0
    at: float = 0.0
    error: dict[str, Any] = field(default_factory=dict)
    own: bool = False
    """It failed by itself: neither asked to nor because of another."""
    root: End | None = None
    """The end of another that it only followed from."""
    step: int | None = None
    died: float = 0.0
    seen: float = 0.0
    heard: bool = False
    in_time: bool = False
    """It failed before its role was asked to stop, as far as any clock can tell."""

    @property
    def well(self) -> bool:
        return self.code == self.signal == 0


@dataclass
class Seat:
    """One planned actor, as the machine must see it."""

    name: str
    role: dict[str, Any]
    agent: str
    incarnation: int = -1
    over: bool = True
    well: bool = False
    asked: bool = False
    failed: bool = False
    """It has failed, unasked, and was not started again."""
    lost: bool = False
    """It failed with its host, and that counts."""
    for_good: bool = False
    """Its failure was called final."""


class Umpire:
    """Told of all that happens to one job; raises `Violation`."""

    def __init__(self, roles: list[dict[str, Any]], gone: set[str], stubborn: bool) -> None:
        self.begun = False
        self.ended: dict[str, Message] = {}
        self.restarts = 0
        self._roles, self._gone, self._stubborn = roles, gone, stubborn
        self._seats = {
            actor["name"]: Seat(actor["name"], role, actor["agent"])
            for role in roles
            for actor in role["actors"]
        }
        self._attempts = {role["name"]: 0 for role in roles}
        self._marks: dict[str, float] = {}
        """By role: when the first failure of this attempt was seen."""
        self._ends: dict[tuple[str, int], End] = {}
        self._outside: int | None = None
        self._failed_before = False
        self._limit = inf
        self._won = False

    # -- what happens -------------------------------------------------------------------------

    def died(self, name: str, incarnation: int, end: End) -> None:
        """A process has really ended."""
        self._ends[name, incarnation] = end

    def heard(self, message: Message, now: float) -> None:
        """The machine has taken a message."""
        match message["op"]:
            case "begin":
                self.begun = True
                self._limit = now + message.get("timeout_s", inf)
            case "exited":
                seat = self._seats[message["name"]]
                if message["incarnation"] == seat.incarnation and not seat.over:
                    self._report(seat, self._ends[seat.name, seat.incarnation])
            case "stop" | "kill" if self._outside is None and not self.ended:
                self._outside, self._failed_before = message["code"], self._failing()

    def _report(self, seat: Seat, end: End) -> None:
        role = seat.role["name"]
        mark = self._marks.get(role)
        slack = 0.1 if end.signal not in (0, 15) and not end.error else 0.0
        when = end.at if end.error else end.seen
        end.in_time = mark is None or when < mark + slack
        seat.over, seat.well, end.heard = True, end.well, True
        if not end.well and not seat.asked:
            seat.failed = True
            self._marks.setdefault(role, end.seen)
        drivers = [seat for seat in self._seats.values() if seat.role["driver"]]
        if all(driver.well and driver.over for driver in drivers) and not self._failing():
            self._won = True

    def answered(self, name: str, incarnation: int, final: bool) -> None:
        """The machine has said whether this process is started again."""
        seat = self._seats[name]
        if final and seat.incarnation == incarnation and seat.over and not seat.well:
            seat.for_good = True

    def _hear_losses(self) -> None:
        for seat in self._seats.values():
            if seat.agent in self._gone and not seat.over:
                stopped = self._won or (self._outside is not None and not self._failed_before)
                counts = not (seat.asked and stopped)
                seat.over, seat.well, seat.lost = True, False, counts
                seat.failed = seat.failed or counts

    def _failing(self) -> bool:
        """Whether there is a failure that nothing can follow but the job's end."""
        return any(seat.failed and not self._restartable(seat) for seat in self._seats.values())

    def _restartable(self, seat: Seat) -> bool:
        role = seat.role
        mates = [s for s in self._seats.values() if s.role is role] if self._gang(role) else [seat]
        if self._stubborn or any(mate.agent in self._gone for mate in mates):
            return False  # may or may not be
        used = self._attempts[role["name"]] if self._gang(role) else seat.incarnation
        return bool(role["policy"] != "never" and used < role["max"])

    @staticmethod
    def _gang(role: dict[str, Any]) -> bool:
        return bool(role["policy"] == "gang")

    # -- what the machine says ----------------------------------------------------------------

    def judge(self, directives: Directives, now: float) -> None:
        """Check what came out of one entry."""
        if now >= self._limit and self._outside is None and not self.ended:
            self._outside, self._failed_before = 124, self._failing()
        self._hear_losses()
        self._judge_starts(directives)
        self._hear_losses()  # also of those that were started on a host that is gone
        for agent, message in directives:
            demand(agent not in self.ended, "said after the end:", message)
            match message["op"]:
                case "stop":
                    self._stopped(message["names"])
                case "kill":
                    living = [not self._seats[name].over for name in message["names"]]
                    demand(all(living), "kills the dead:", message)
                    for name in message["names"]:
                        self._seats[name].asked = True
                case "end":
                    self._ended(agent, message)
        alive = [seat.name for seat in self._seats.values() if not seat.over]
        stuck = self.begun and not alive and not self.ended
        demand(not stuck, "all have ended, and the job has not")

    def _judge_starts(self, directives: Directives) -> None:
        for role in self._roles:
            actors: dict[str, int] = {}
            attempts = set()
            for agent, message in directives:
                if message["op"] == "start" and message["role"] == role["name"]:
                    actors |= message["actors"]
                    attempts.add(message["attempt"])
                    strange = [n for n in message["actors"] if self._seats[n].agent != agent]
                    demand(not strange, strange, "are to be started by", agent)
            if actors:
                self._started(role, actors, attempts)

    def _started(self, role: dict[str, Any], actors: dict[str, int], attempts: set[int]) -> None:
        demand(not self.ended, "started after the end:", actors)
        demand(not self._won, "started when all was done:", actors)
        demand(self._outside is None, "started although the job was stopped:", actors)
        seats = [seat for seat in self._seats.values() if seat.role is role]
        first = all(seat.incarnation == -1 for seat in seats)
        for name, incarnation in actors.items():
            seat = self._seats[name]
            demand(seat.over, name, "was started twice at once")
            demand(incarnation == seat.incarnation + 1, name, "skips to", incarnation)
            demand(first or seat.agent not in self._gone, name, "was started on a lost host")
            demand(not seat.for_good, name, "was started although its end was final")
        if first or self._gang(role):
            demand(actors.keys() == {s.name for s in seats}, "a part of a gang starts:", actors)
        if not first:
            self._restarted(role, [self._seats[name] for name in actors])
        demand(attempts == {self._attempts[role["name"]]}, "attempts", attempts, "of", role)
        for name, incarnation in actors.items():
            seat = self._seats[name]
            seat.incarnation, seat.over, seat.well = incarnation, False, False
            seat.asked = seat.failed = False
        self._marks.pop(role["name"], None)

    def _restarted(self, role: dict[str, Any], seats: list[Seat]) -> None:
        self.restarts += 1
        demand(any(seat.failed for seat in seats), "nobody failed, and these start:", seats)
        demand(role["policy"] != "never", role["name"], "is never to be restarted")
        others = [s for s in self._seats.values() if s.failed and s.role is not role]
        doomed = [s for s in others if not self._stubborn and not self._restartable(s)]
        demand(not doomed, role["name"], "restarts although the job has failed by", doomed)
        if self._gang(role):
            self._attempts[role["name"]] += 1
            used = self._attempts[role["name"]]
        else:
            used = max(seat.incarnation for seat in seats) + 1
        demand(used <= role["max"], role["name"], "is restarted too often:", used)

    def _stopped(self, names: list[str]) -> None:
        general = self._won or self._outside is not None or self._failing()
        for name in names:
            seat = self._seats[name]
            demand(not seat.over, name, "is asked to stop after its end")
            demand(not seat.asked, name, "is asked to stop twice")
            mates = [s for s in self._seats.values() if s.role is seat.role]
            gang = self._gang(seat.role) and any(mate.failed for mate in mates)
            demand(general or gang, name, "is asked to stop for nothing")
            seat.asked = True

    # -- the verdict --------------------------------------------------------------------------

    def _ended(self, agent: str, message: Message) -> None:
        alive = [seat.name for seat in self._seats.values() if not seat.over]
        demand(not alive, "ended before", alive)
        self.ended[agent] = message
        drivers = [seat for seat in self._seats.values() if seat.role["driver"]]
        code, first = message["code"], message["first"]
        if self._won:
            demand(code == 0 or code == self._outside, "all drivers are done:", message)
        elif code == 0:
            demand(all(driver.well for driver in drivers), "a driver is not done:", message)
            demand(not any(driver.asked for driver in drivers), "drivers were stopped:", message)
        if code not in (0, self._outside):
            demand(first is not None, "failed by nothing:", message)
        if first is not None:
            self._first(first, message)

    def _first(self, first: Message, message: Message) -> None:
        lost = [seat.name for seat in self._seats.values() if seat.lost]
        demand(not lost or first["code"] == 69, first, "though the hosts are lost of", lost)
        number = first["signal"]
        demand(message["code"] == (128 + number if number else first["code"] or 1), message)
        end = self._ends.get((first["name"], first["incarnation"]))
        if first["code"] == 69:
            seat = self._seats[first["name"]]
            demand(seat.agent in self._gone, first, "on a host that is here")
            demand(seat.failed, first, "was asked to stop before its host was lost")
            return
        demand(end is not None, first, "has not ended")
        assert end is not None
        demand((end.code, end.signal) == (first["code"], number), first, "did not end so:", end)
        demand(end.own or end.root is not None, first, "was asked to stop, and is called the first")
        root, known = end, True
        while root.root is not None and known:
            root = root.root
            # Of what one does who was asked to stop nothing is kept, so nobody can look behind it.
            known = root.heard and root.in_time
        demand(end.own or not known, first, "followed from another:", root)

    def finish(self) -> None:
        """At the end of the schedule."""
        demand(self.begun, "the job never began")
        demand(bool(self.ended), "the job never ended", self._seats)
        codes = {message["code"] for message in self.ended.values()}
        demand(len(codes) == 1, "ended with", codes)

"""A simulated job around one real plane: one seed decides everything that happens.

Agents start processes, beat, and report deaths; processes join, ask, give up, run out of time, leave, die
and are started again. Between them and the plane lies a network that delays, reorders, doubles and
loses messages, also those of processes that are dead by now. Clients number, repeat and acknowledge
their commands as `control.asking` does. A twin of the plane, which is written down and read back
at random moments, must do the same as the plane at every step.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from random import Random
from typing import Any

import msgpack

from runtime.control.messages import error_state
from runtime.control.plane import Entry, Plane, standard_machines
from runtime.machine import Call, Effect, Emit, Fail, Machine, Message, Reply, Send
from tests.sim.referee import HEARTBEAT_TIMEOUT, Referee, Violation, Watched, demand

Done = Callable[[Any], None]


@dataclass(frozen=True)
class Extension:
    """Another pure machine in the simulated plane.

    `make` builds one; `act` is called at random moments and makes traffic (`world.agents`, `world.later`,
    `Client.ask`); `check` is called with the effects of every entry and raises `Violation`. An extension
    may keep something of its own in each world: `begin` makes it, it lies in `world.parts[name]`. `heard` is called
    with every message that the machine took, before `check`; `finish` when the schedule is over.
    """

    name: str
    make: Callable[[], Machine]
    act: Callable[[World], None]
    check: Callable[[World, list[Effect]], None] = lambda world, effects: None
    listens: bool = False
    begin: Callable[[World], Any] = lambda world: None
    heard: Callable[[World, Message], None] = lambda world, message: None
    finish: Callable[[World], None] = lambda world: None


@dataclass(frozen=True)
class Kit:
    """What a world is made of; mutants replace parts of it."""

    machines: Callable[[], dict[str, Machine]] = lambda: standard_machines(
        heartbeat_timeout=HEARTBEAT_TIMEOUT
    )
    plane: type[Plane] = Plane
    extensions: tuple[Extension, ...] = ()
    traffic: bool = True
    """Whether processes use the standard machines; without, agents only beat."""
    agents: int = 2
    """One holds the plane; the next dies with its host; any others are cut off from the plane for a while."""
    settle: float = 3.5
    """Seconds in which everything comes to rest once there are no more faults."""


class World:
    """One schedule. `run` raises `Violation` where something went wrong."""

    def __init__(self, seed: int, kit: Kit | None = None) -> None:
        self.random = Random(seed)
        self.kit = kit or Kit()
        self.now = 0.0
        self.entries = 0
        self.quiet = False
        """No more faults and no new work: the end is near."""
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self.referee = Referee(lambda: self.entries % 64 == 0)
        self.plane = self._plane(watched=True)
        self.twin = self._plane(watched=False)
        self.clients: dict[str, Client] = {}
        self.cuts: dict[str, float] = {}
        """By process: until when nothing goes from it to the plane or back."""
        self.agents = [Agent(self, number) for number in range(self.kit.agents)]
        self._tick_at: float | None = None
        self.parts = {extension.name: extension.begin(self) for extension in self.kit.extensions}
        for extension in self.kit.extensions:
            self.referee.ears[extension.name] = partial(extension.heard, self)

    def _plane(self, watched: bool) -> Plane:
        machines = self.kit.machines()
        machines |= {extension.name: extension.make() for extension in self.kit.extensions}
        if watched:
            machines = {n: Watched(n, machine, self.referee) for n, machine in machines.items()}
        listeners = [extension.name for extension in self.kit.extensions if extension.listens]
        return self.kit.plane(machines, listeners=["barrier", *listeners])

    # -- time ---------------------------------------------------------------------------------

    def later(self, delay: float, action: Callable[..., None], *args: Any) -> None:
        """Do something `delay` seconds from now."""
        self._sequence += 1
        heapq.heappush(self._queue, (self.now + delay, self._sequence, action, args))

    def chance(self, probability: float) -> bool:
        """Draw; never while the world is quiet."""
        return not self.quiet and self.random.random() < probability

    def run(self, duration: float = 3.0) -> None:
        """Play the schedule to its end, then check that nothing is left over."""
        for agent in self.agents:
            agent.begin()
        self._until(duration)
        self.quiet = True
        self._until(duration + self.kit.settle)
        self._check_reasons()
        for extension in self.kit.extensions:
            extension.finish(self)
        for client in list(self.clients.values()):
            client.alive = False
            self.enter(Entry("lost", self.now, peer=client.peer, cause="the end"))
        self._check_empty()

    def _until(self, end: float) -> None:
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action, args = heapq.heappop(self._queue)
            action(*args)
        self.now = end

    # -- the plane ----------------------------------------------------------------------------

    def enter(self, entry: Entry) -> None:
        """Apply an entry to both planes, compare, deliver what comes out."""
        self.entries += 1
        if self.random.random() < 0.02:
            state = msgpack.unpackb(msgpack.packb(self.twin.dump()), strict_map_key=False)
            self.twin = self._plane(watched=False)
            self.twin.load(state)
        effects = self.plane.apply(entry)
        twins = self.twin.apply(entry)
        if effects != twins:
            pairs = zip_longest(_plain(effects), _plain(twins))
            apart = next((pair for pair in pairs if pair[0] != pair[1]), None)
            demand(apart is None, entry, "twins differ:", apart)
        self.referee.at_rest(self.now)
        for extension in self.kit.extensions:
            extension.check(self, effects)
        for effect in effects:
            self._deliver(effect)
        self._arm()

    def _arm(self) -> None:
        due = self.plane.deadline()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self.later(max(0.0, due - self.now), self._tick, due)

    def _tick(self, due: float) -> None:
        if due != self._tick_at:
            return
        self._tick_at = None
        actual = self.plane.deadline()
        if actual is not None and actual <= self.now:
            self.enter(Entry("tick", self.now))
        else:
            self._arm()

    def _deliver(self, effect: Effect) -> None:
        match effect:
            case Reply(call, value):
                self._travel(call.client, self._answer, call, ["value", value])
            case Fail(call, error):
                self._travel(call.client, self._answer, call, ["error", error_state(error)])
            case Send() | Emit():
                pass

    def _answer(self, call: Call, answer: list[Any]) -> None:
        if call.client in self.clients:
            self.clients[call.client].answered(call.id, answer)

    # -- the network --------------------------------------------------------------------------

    def send(self, message: Message, call: Call) -> None:
        """A client's command on its way to the plane."""
        self._travel(call.client, self._arrived, message, call)

    def cancel(self, call: Call) -> None:
        entered = lambda: self.enter(Entry("cancelled", self.now, call=call))  # noqa: E731
        self._travel(call.client, entered)

    def _arrived(self, message: Message, call: Call) -> None:
        self.enter(Entry("message", self.now, message, call))

    def held_up(self, peer: str) -> float:
        """For how long what is sent to or by `peer` lies before a cut."""
        return max(0.0, self.cuts.get(peer, 0.0) - self.now)

    def _travel(self, peer: str, action: Callable[..., None], *args: Any) -> None:
        if self.chance(0.04):
            return
        for _ in range(2 if self.chance(0.04) else 1):
            slow = self.chance(0.05)
            delay = self.random.uniform(0.5, 3.0) if slow else self.random.random() * 0.05
            self.later(self.held_up(peer) + delay, action, *args)

    # -- the end ------------------------------------------------------------------------------

    def _check_reasons(self) -> None:
        heard = [c for c in self.clients.values() if c.alive and c.peer not in self.referee.gone]
        for client in heard:
            for number in client.open:
                call = Call(client.peer, number)
                waits = call in self.referee.waiting
                demand(not waits or bool(self.plane.why(call)), call, "waits without a reason")
                answered = not waits and call in self.referee.executed
                demand(not answered, call, "was answered and never heard of it")

    def _check_empty(self) -> None:
        state = self.plane.dump()
        demand(state["clients"] == {}, "clients are left:", state["clients"])
        machines = state["machines"]
        for machine, kept in {
            "membership": "waits",
            "barrier": "arrived",
            "kv": "watches",
            "directory": "lookups",
            "rendezvous": "joins",
        }.items():
            demand(not machines[machine][kept], machine, "still has", kept, machines[machine][kept])
        demand(not machines["directory"]["names"], "names are left")


class Client:
    """Numbers, repeats, withdraws and acknowledges commands, as `control.asking` does."""

    def __init__(self, world: World, peer: str) -> None:
        self.world, self.peer, self.alive = world, peer, True
        self.last = 0
        self.open: dict[int, Done] = {}
        self.first: dict[int, list[Any]] = {}
        world.clients[peer] = self

    def ask(self, machine: str, message: Message, done: Done, timeout: float | None = None) -> int:
        number = self._number(done)
        self._send(number, {"op": "ask", "machine": machine, "message": message})
        if timeout is not None:
            self.world.later(timeout, self._time_is_up, number)
        return number

    def give_up(self, number: int) -> None:
        """The caller was cancelled."""
        if self.alive and self.open.pop(number, None) is not None:
            self.world.cancel(Call(self.peer, number))

    def answered(self, number: int, answer: list[Any]) -> None:
        if not self.alive:
            return
        first = self.first.setdefault(number, answer)
        fenced = self.peer in self.world.referee.gone
        demand(fenced or first == answer, self.peer, number, "was answered", first, "then", answer)
        done = self.open.pop(number, None)
        if done is not None:
            done(answer)

    def _number(self, done: Done) -> int:
        self.last += 1
        self.open[self.last] = done
        return self.last

    def _send(self, number: int, command: dict[str, Any], again: float = 1.0) -> None:
        if not self.alive or number not in self.open:
            return
        still_open = [other for other in self.open if other < number]
        self.world.send({**command, "open": still_open}, Call(self.peer, number))
        # Once more, if no answer comes.
        self.world.later(again, self._send, number, command, min(2 * again, 2.0))

    def _time_is_up(self, number: int) -> None:
        if not self.alive or number not in self.open:
            return

        def heard(answer: Any) -> None:
            # A process that was given up although it lives is fenced, and gets an error for all.
            reply = answer[1] if answer[0] == "value" else {"answer": answer}
            if number in self.open:
                if reply["answer"] is not None:
                    self.answered(number, reply["answer"])
                else:
                    del self.open[number]
                    self.first.setdefault(number, ["withdrawn"])

        self._send(self._number(heard), {"op": "withdraw", "id": number})


class Agent:
    """Starts processes on its host, beats, reports deaths; takes part in the rendezvous."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.client = Client(world, f"agent-{number}.x")
        self.actors = [(f"{role}-{number}", role) for role in ("a", "b")]
        if number == 0:
            self.actors.append(("a-9", "a"))
        self.processes: dict[str, Process] = {}
        self.incarnations: dict[str, int] = {}
        self.slots = world.random.randint(1, 3)
        self.round = 0
        self.answered = 0.0
        self.cut_off = False
        """It has heard nothing of the plane for so long that it ended its workers."""

    def begin(self) -> None:
        self._beat()
        if self.number > 1:
            self.world.later(self.world.random.uniform(0.5, 8), self._cut)
        if self.world.kit.traffic:
            self._use_machines()
        if self.number == 1:
            self.world.later(self.world.random.uniform(0.5, 8), self._die)
        for extension in self.world.kit.extensions:
            self.world.later(self.world.random.random() * 5, self._extend, extension)

    def _use_machines(self) -> None:
        plan = [
            {"name": name, "role": role, "rank": int(name[-1]), "host": f"host-{self.number}"}
            for name, role in self.actors
        ]
        self._ask("membership", {"op": "declare", "actors": plan}, self._declared)
        rendezvous = {"op": "open", "role": "a", "min": 1, "max": 2, "last_call_s": 0.5}
        self._ask("rendezvous", rendezvous, lambda _: self._join())

    def _extend(self, extension: Extension) -> None:
        if self.client.alive and not self.world.quiet:
            extension.act(self.world)
            self.world.later(self.world.random.random() * 5, self._extend, extension)

    def _ask(self, machine: str, message: Message, done: Done = lambda _: None) -> None:
        self.client.ask(machine, message, done)

    def _declared(self, _: Any) -> None:
        for name, _role in self.actors:
            self.start(name)

    def _cut(self) -> None:
        if not self.world.quiet:
            self.world.cuts[self.client.peer] = self.world.now + self.world.random.uniform(0.2, 5.0)

    def _beat(self) -> None:
        self.cut_off = self.cut_off or self.world.now - self.answered > HEARTBEAT_TIMEOUT
        if self.client.alive and not self.cut_off:
            self._ask("membership", {"op": "heartbeat"}, self._heard)
            self.world.later(1.0, self._beat)

    def _heard(self, _: Any) -> None:
        self.answered = self.world.now

    def _join(self) -> None:
        if not self.client.alive or self.world.quiet:
            return
        random = self.world.random
        message = {
            "op": "join",
            "role": "a",
            "round": self.round,
            "node": f"host-{self.number}",
            "slots": self.slots,
            "addr": f"10.0.0.{self.number}",
            "port": random.randint(1024, 65535),
            "timeout_s": random.choice([1.0, 30.0]),
        }
        number = self.client.ask("rendezvous", message, self._joined)
        if self.world.chance(0.4):
            self.world.later(random.random() * 0.5, self.client.give_up, number)
            self.world.later(random.random() * 3, self._join)

    def _joined(self, answer: Any) -> None:
        if answer[0] == "value" and self.world.chance(0.7):
            self.round = answer[1]["round"] + self.world.random.randint(0, 1)
        self.world.later(self.world.random.random() * 3, self._join)

    def start(self, name: str) -> None:
        if not self.client.alive or self.world.quiet:
            return
        incarnation = self.incarnations[name] = self.incarnations.get(name, -1) + 1
        peer = f"{name}.{incarnation}"
        message = {"op": "starting", "name": name, "incarnation": incarnation, "peer": peer}
        self._ask("membership", {**message, "host": f"host-{self.number}", "pid": incarnation + 1})
        process = self.processes[name] = Process(self.world, self, name, incarnation, peer)
        self.world.later(self.world.random.random() * 0.3, process.begin)

    def died(self, process: Process, cause: str) -> None:
        """A child has ended: say so, and perhaps start it again without waiting for the answer."""
        if not self.client.alive:
            return
        final = process.incarnation >= 2 or self.world.chance(0.2)
        report = {
            "op": "exited",
            **process.who,
            "cause": cause,
            "code": 0 if cause == "exit 0" else 1,
        }
        self._ask("membership", {**report, "final": final})
        if not final:
            self.world.later(self.world.random.random(), self.start, process.name)

    def _die(self) -> None:
        """The host is gone: nobody says anything any more."""
        if not self.world.quiet:
            self.client.alive = False
            for process in self.processes.values():
                process.client.alive = False


class Process:
    """One incarnation of an actor, doing what users do."""

    def __init__(self, world: World, agent: Agent, name: str, incarnation: int, peer: str) -> None:
        self.world, self.agent, self.name, self.incarnation = world, agent, name, incarnation
        self.client = Client(world, peer)
        self.who = {"name": name, "incarnation": incarnation, "peer": peer}

    def begin(self) -> None:
        if not self.client.alive:
            return
        self.client.ask("membership", {"op": "join", **self.who, "address": "mem://x"}, self._act)
        if self.world.chance(0.5):
            self.world.later(self.world.random.expovariate(0.4), self._die)
        self.world.later(self.world.random.random(), self._act, None)

    def _die(self) -> None:
        if self.client.alive and not self.world.quiet:
            random = self.world.random
            if self.world.chance(0.3):
                self.client.ask("membership", {"op": "leave", **self.who}, lambda _: None)
            self.client.alive = False
            cause = random.choice(["SIGKILL", "exit 1", "exit 0"])
            self.world.later(random.random() * 0.2, self.agent.died, self, cause)

    def _act(self, _: Any) -> None:
        """Ask something; the answer leads to the next question."""
        if not self.client.alive or self.world.quiet or len(self.client.open) > 2:
            return
        random = self.world.random
        machine, message = self._question()
        timeout = random.random() * 3 if random.random() < 0.5 else None
        number = self.client.ask(machine, message, self._then, timeout)
        if random.random() < 0.15:
            self.world.later(random.random(), self.client.give_up, number)
        self.world.later(random.expovariate(1.0), self._act, None)

    def _then(self, answer: Any) -> None:
        self.world.later(self.world.random.random() * 0.5, self._act, None)

    def _question(self) -> tuple[str, dict[str, Any]]:
        random = self.world.random
        kind = random.random()
        if kind < 0.45:
            scope = {"role": "*"} if random.random() < 0.2 else {}
            return "barrier", {"op": "arrive", "name": random.choice("xy"), **scope}
        key = random.choice("kl")
        if kind < 0.55:
            put = {"op": "put", "key": key, "value": random.randint(0, 99)}
            if random.random() < 0.5:
                put["if_version"] = random.choice([0, self.world.referee.version])
            if random.random() < 0.3:
                put["ttl_s"] = random.uniform(0.1, 3)
            return "kv", put
        if kind < 0.65:
            return "kv", {"op": random.choice(["get", "delete"]), "key": key}
        if kind < 0.72:
            return "kv", {
                "op": "watch",
                "key": key,
                "since": random.choice([0, self.world.referee.version]),
            }
        if kind < 0.82:
            name = random.choice(["a-0", "a-1", "b-0"])
            other = f"{name}.{random.randint(0, 2)}"
            ask = (
                {"op": "resolve", "name": name}
                if random.random() < 0.6
                else {"op": "fate", "peer": other}
            )
            return "membership", ask
        if kind < 0.87:
            return "membership", {"op": "watch", "since": random.randint(0, 20)}
        if random.random() < 0.5:
            return "directory", {"op": "register", "name": key, "value": self.incarnation}
        return "directory", {"op": "lookup", "name": key}


def _plain(effects: Sequence[Effect]) -> list[Any]:
    """Effects such that two errors that say the same are equal."""
    return [
        (effect.call, error_state(effect.error)) if isinstance(effect, Fail) else effect
        for effect in effects
    ]


def play(seed: int, kit: Kit | None = None) -> World:
    """One whole schedule; a violation names its seed."""
    world = World(seed, kit)
    try:
        world.run()
    except Violation as violation:
        raise Violation(f"SIM_SEED={seed} at {world.now:.3f} s: {violation}") from violation
    except Exception as error:
        raise Violation(f"SIM_SEED={seed} at {world.now:.3f} s: {error!r}") from error
    return world

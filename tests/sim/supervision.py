"""A simulated job under supervision: agents that obey directives, workers that end in all sorts of ways.

What really happens is decided here and known for certain: who failed by itself, who only followed, who was
asked to stop. `tests.sim.verdicts` compares the machine's decisions with it. Directives reach an agent late and
sometimes twice, but in their order; reports travel as all commands do, so they come late, repeated,
and in any order. What a lost agent had not told yet is never told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.cluster.restart import Supervision
from runtime.machine import Effect, Machine, Message, Send
from tests.sim.referee import demand
from tests.sim.verdicts import End, Umpire
from tests.sim.world import Agent, Extension, Kit, World

NAME = "supervision"
_EPOCH = 1000.0
"""Wall clock at the start; another clock than the log's."""


@dataclass(eq=False)
class Worker:
    """One incarnation of an actor."""

    name: str
    incarnation: int
    agent: Agent
    driver: bool
    asked: bool = False
    """The stop has reached it."""
    ending: bool = False
    """It has raised, and is on its way out."""
    alive: bool = True


@dataclass
class Post:
    """An agent's directives on their way, and the workers that it has."""

    agent: Agent
    queue: deque[Message] = field(default_factory=deque)
    workers: dict[str, Worker] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)
    over: bool = False


class Job:
    """Everything that is simulated of one job."""

    def __init__(self, world: World) -> None:
        self.world, self.random = world, world.random
        self.posts = {agent.client.peer: Post(agent) for agent in world.agents}
        self.stubborn = self.random.random() < 0.2
        self.roles: list[dict[str, Any]] = []
        self.drivers: set[str] = set()
        self.umpire = Umpire([], world.referee.gone, self.stubborn)
        world.later(self.random.random(), self._begin)

    def _plan(self, agents: list[str]) -> list[dict[str, Any]]:
        random = self.random
        roles = []
        for number, name in enumerate(random.sample(["w", "w-1", "judge"], random.randint(1, 3))):
            actors = [
                {"name": f"{name}-{i}", "rank": i, "agent": random.choice(agents), "host": "h"}
                for i in range(random.randint(1, 3))
            ]
            policy = random.choice(["gang", "gang", "one", "never"])
            settings = {"policy": policy, "max": random.randint(0, 3)}
            driver = number == 0 or random.random() < 0.3
            roles.append({"name": name, **settings, "driver": driver, "actors": actors})
        random.shuffle(roles)
        return roles

    def _begin(self) -> None:
        random, agents = self.random, self.world.agents
        if any(agent.client.alive and not agent.client.first for agent in agents):
            self.world.later(0.1, self._begin)  # one has not said that it is there
            return
        self.roles = self._plan([agent.client.peer for agent in agents if agent.client.first])
        self.drivers = {a["name"] for r in self.roles if r["driver"] for a in r["actors"]}
        self.umpire = Umpire(self.roles, self.world.referee.gone, self.stubborn)
        begin: dict[str, Any] = {"op": "begin", "roles": self.roles}
        begin["agents"] = [agent.client.peer for agent in agents if agent.client.first]
        begin["stop_timeout_s"] = random.uniform(0.5, 2.0)
        begin["restart_timeout_s"] = random.uniform(0.3, 1.0)
        if random.random() < 0.2:
            begin["timeout_s"] = random.uniform(0.5, 8.0)
        self._tell(self.world.agents[0], begin)

    def _tell(
        self, agent: Agent, message: Message, done: Callable[[Any], None] = lambda _: None
    ) -> None:
        agent.client.ask(NAME, message, done)

    def interfere(self) -> None:
        """Somebody outside stops the job, or kills it."""
        chance = self.random.random()
        op = "stop" if chance < 0.12 else "kill" if chance < 0.2 else ""
        if op and self.umpire.begun:
            outside = {"op": op, "reason": "Ctrl-C", "code": 130}
            self.world.later(self.random.random() * 0.5, self._tell, self.world.agents[0], outside)

    @property
    def wall(self) -> float:
        return _EPOCH + self.world.now

    # -- directives ---------------------------------------------------------------------------

    def check(self, effects: list[Effect]) -> None:
        """Judge what the machine says, then let it travel."""
        ours = [e for e in effects if isinstance(e, Send) and e.message["kind"] == "directive"]
        self.umpire.judge([(e.to, e.message) for e in ours], self.world.now)
        for effect in ours:
            for _ in range(2 if self.world.chance(0.1) else 1):
                self.posts[effect.to].queue.append(effect.message)
                delay = self.world.held_up(effect.to) + self.random.random() * 0.2
                self.world.later(delay, self._obey, self.posts[effect.to])

    def _up(self, agent: Agent) -> bool:
        gone = agent.cut_off or agent.client.peer in self.world.referee.gone
        return agent.client.alive and not gone

    def _obey(self, post: Post) -> None:
        message = post.queue.popleft()
        if not self._up(post.agent):
            post.workers.clear()
            return
        match message["op"]:
            case "start":
                demand(not post.over, "started after the end:", message)
                for name, incarnation in message["actors"].items():
                    self._start(post, name, incarnation)
            case "stop":
                for worker in self._named(post, message):
                    self._ask_to_stop(worker, message["grace_s"])
            case "kill":
                for worker in self._named(post, message):
                    worker.asked = True
                    self._dies(worker, End(signal=9))
            case "end":
                demand(not post.workers, "the job ended before", list(post.workers))
                post.over = True

    def _named(self, post: Post, message: Message) -> list[Worker]:
        return [post.workers[name] for name in message["names"] if name in post.workers]

    def _start(self, post: Post, name: str, incarnation: int) -> None:
        if post.newest.get(name, -1) >= incarnation:
            return  # the directive came twice
        demand(name not in post.workers, name, "was started twice at once")
        post.newest[name] = incarnation
        worker = post.workers[name] = Worker(name, incarnation, post.agent, name in self.drivers)
        if self.world.chance(0.03):
            self._dies(worker, End(127, own=True))
        elif worker.driver or self.random.random() < 0.6:
            life = min(self.random.expovariate(0.8), 3.0)
            self.world.later(life * (0.1 if self.world.quiet else 1), self._lives, worker)

    # -- how workers end ----------------------------------------------------------------------

    def _lives(self, worker: Worker) -> None:
        """A worker comes to its end without anybody's doing."""
        if worker.asked or worker.ending or not worker.alive:
            return
        if not self.world.chance(0.55):
            self._dies(worker, End())
            return
        match self.random.randint(0, 3):
            case 0 | 1:
                self._raises(worker, "ValueError", "bad")
            case 2:
                self._dies(worker, End(signal=self.random.choice([9, 11, 15]), own=True))
            case _:
                self._dies(worker, End(3, own=True))

    def _raises(self, worker: Worker, kind: str, text: str, root: End | None = None) -> None:
        """It writes its error down now, and exits a little later."""
        if worker.ending or worker.asked or not worker.alive:
            return
        worker.ending = True
        number = 0 if self.stubborn else self.random.randint(0, 9)
        error = {"type": kind, "message": text, "traceback": f"line {number}"}
        end = End(1, at=self.wall, error=error, own=root is None, root=root)
        end.step = 7 if self.stubborn else None
        self.world.later(self.random.random() * 0.2, self._dies, worker, end)

    def _ask_to_stop(self, worker: Worker, grace_s: float) -> None:
        if worker.asked:
            return
        worker.asked = True
        self.world.later(grace_s, self._dies, worker, End(signal=9))
        if worker.ending or self.random.random() < 0.3:
            return  # does not listen
        interrupted = {"type": "KeyboardInterrupt", "message": "", "traceback": ""}
        how = [End(signal=15), End(143), End(), End(1, at=self.wall, error=interrupted)]
        self.world.later(
            self.random.random() * grace_s, self._dies, worker, self.random.choice(how)
        )

    def _dies(self, worker: Worker, end: End) -> None:
        if not worker.alive:
            return
        worker.alive = False
        if not self._up(worker.agent):
            return
        self.posts[worker.agent.client.peer].workers.pop(worker.name, None)
        end.died, end.seen = self.wall, self.wall + self.random.random() * 0.04
        end.at = end.at or end.seen
        self.umpire.died(worker.name, worker.incarnation, end)
        if end.own or end.root:
            self._others_suffer(worker, end)
        for _ in range(2 if self.world.chance(0.05) else 1):
            self.world.later(self.random.uniform(0.04, 0.1), self._reports, worker, end)

    def _others_suffer(self, worker: Worker, end: End) -> None:
        for post in self.posts.values():
            for other in post.workers.values():
                if self.world.chance(0.15):
                    text = f"{worker.name} on here is gone: {end.signal or end.code}"
                    kind = "runtime.errors.PeerLostError"
                    delay = self.random.random() * 0.3
                    self.world.later(delay, self._raises, other, kind, text, end)

    def _reports(self, worker: Worker, end: End) -> None:
        if not self._up(worker.agent):
            return
        report = {
            "op": "exited",
            "name": worker.name,
            "incarnation": worker.incarnation,
            "pid": 7,
            "code": end.code,
            "signal": end.signal,
            "cause": f"signal {end.signal}" if end.signal else f"exit {end.code}",
            "at": end.at,
            "seen": end.seen,
            "error": end.error,
            "step": end.step,
        }

        def done(answer: Any) -> None:
            if answer[0] == "value":
                final = answer[1]["final"]
                self.umpire.answered(worker.name, worker.incarnation, final)

        self._tell(worker.agent, report, done)

    # -- the end ------------------------------------------------------------------------------

    def finish(self) -> None:
        """The job must have ended by now, for everybody."""
        self.umpire.finish()
        used = {actor["agent"] for role in self.roles for actor in role["actors"]}
        for post in (self.posts[peer] for peer in used):
            demand(post.over or not self._up(post.agent), post.agent.client.peer, "never heard")


def _job(world: World) -> Job:
    job = world.parts[NAME]
    assert isinstance(job, Job)
    return job


def supervised(make: Callable[[], Machine] = Supervision, *, traffic: bool = False) -> Kit:
    """A world with one job; with `traffic` the other machines are used at the same time."""
    extension = Extension(
        NAME,
        make,
        act=lambda world: _job(world).interfere(),
        check=lambda world, effects: _job(world).check(effects),
        begin=Job,
        heard=lambda world, message: _job(world).umpire.heard(message, world.now),
        finish=lambda world: _job(world).finish(),
    )
    agents = 2 if traffic else 4
    return Kit(extensions=(extension,), traffic=traffic, agents=agents, settle=14.0)

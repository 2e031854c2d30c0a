"""One seeded history of a queue: a job on a memory network, and all that goes wrong in it.

Producers put numbered items, consumers get them, plainly and on lease; gets are cancelled and time out, links
break, consumers and producers die, and in some histories the owner does. `play` runs one and checks what came
of it. Time is not real: a history takes some milliseconds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import looptime

from runtime.data.queue import DataQueue, Leased
from runtime.errors import Closed, LeaseLost, RuntimeFault, Timeout
from runtime.peer import context
from runtime.transport.memory import NetworkSettings
from tests.control import cluster

Item = tuple[int, int]

_LIMIT_S = 300.0


@dataclass
class Record:
    """What everybody saw."""

    acknowledged: set[Item] = field(default_factory=set)
    refused: set[Item] = field(default_factory=set)
    plain: list[Item] = field(default_factory=list)
    had: dict[str, set[Item]] = field(default_factory=dict)
    killed: set[str] = field(default_factory=set)
    settled: list[Item] = field(default_factory=list)
    batches: list[list[Item]] = field(default_factory=list)
    owners: int = 1


@dataclass
class Plan:
    """What a seed decides beforehand."""

    random: Random
    producers: int
    consumers: int
    items: int
    size: int
    lease_s: float | None
    loss: float
    delay: tuple[float, float]
    kills_owner: bool

    @classmethod
    def of(cls, seed: int) -> Plan:
        random = Random(seed)
        return cls(
            random,
            producers=random.randint(1, 3),
            consumers=random.randint(1, 3),
            items=random.randint(5, 30),
            size=random.choice([1, 2, 5, 20, 200]),
            lease_s=random.choice([None, 0.5]),
            loss=random.choice([0.0, 0.0, 0.01, 0.05]),
            delay=random.choice([(0.0, 0.0), (0.0, 0.01), (0.001, 0.1)]),
            kills_owner=random.random() < 0.2,
        )


class History:
    """A job with its queue while it runs."""

    def __init__(self, plan: Plan, job: cluster.Job) -> None:
        self.plan, self.job, self.record = plan, job, Record()
        self.random = plan.random
        self.transports: dict[str, Any] = {}

    def queue(self, worker: cluster.Worker, *, owner: bool = False) -> DataQueue[Item]:
        """The queue as seen by one process."""
        loop = asyncio.get_running_loop()
        context.install(context.Context(loop, worker.endpoint, worker.client, worker.client))
        try:
            lease_s = self.plan.lease_s
            return DataQueue("q", is_master=owner, size=self.plan.size, lease_s=lease_s)
        finally:
            context.install(None)

    @asynccontextmanager
    async def process(self, name: str) -> AsyncIterator[cluster.Worker]:
        """A process of the job, which `kill` ends."""
        async with self.job.worker(name) as worker:
            self.transports[name] = worker.endpoint._transport
            try:
                yield worker
            finally:
                if name in self.record.killed:
                    await asyncio.sleep(self.plan.delay[1])
                    self.job.network.kill(worker.peer)
                    await self.job.exited(worker, "SIGKILL", -9, final=True)

    def kill(self, name: str, task: asyncio.Task[None]) -> None:
        """As SIGKILL does: what the kernel had is still delivered, nothing else leaves any more."""
        if name in self.record.killed:
            return
        self.record.killed.add(name)
        transport = self.transports.get(name)
        if transport is not None:
            transport._closed = True
            for link in list(transport.links):
                link.close()
        task.cancel()

    async def own(self, name: str, started: asyncio.Event) -> None:
        async with self.process(name) as worker:
            queue = self.queue(worker, owner=True)
            await queue.qsize_async()
            started.set()
            await asyncio.Event().wait()

    async def produce(self, number: int) -> None:
        async with self.process(f"producer-{number}") as worker:
            queue, sent = self.queue(worker), 0
            while sent < self.plan.items:
                count = min(self.random.randint(1, 4), self.plan.items - sent)
                batch = [(number, sent + place) for place in range(count)]
                sent += count
                await self._put(queue, batch)
                await asyncio.sleep(self.random.choice([0, 0, 0.02]))

    async def _put(self, queue: DataQueue[Item], batch: list[Item]) -> None:
        timeout = self.random.choice([None, None, 0.05, 0.5])
        try:
            await queue.put_async(*batch, timeout=timeout)
        except Timeout as error:
            self.record.acknowledged.update(batch[: error.taken])
            if self.record.owners == 1 and "went in" in str(error):
                self.record.refused.update(batch[error.taken :])
        else:
            self.record.acknowledged.update(batch)

    async def consume(self, number: int) -> None:
        name = f"consumer-{number}"
        async with self.process(name) as worker:
            queue = self.queue(worker)
            while True:
                lease = self.random.random() < 0.5
                try:
                    async with asyncio.timeout(self.random.choice([None, None, 0.001, 0.03, 0.2])):
                        got = await queue.get_async(
                            self.random.randint(1, 5),
                            self.random.choice([None, 0.05, 1.0]),
                            lease=lease,
                        )
                except Closed:
                    return
                except TimeoutError:
                    continue
                await self._deal_with(name, got)

    async def _deal_with(self, name: str, got: list[Any]) -> None:
        if not isinstance(got[0], Leased):
            self.record.plain += got
            self.record.had.setdefault(name, set()).update(got)
            self.record.batches.append(got)
            return
        self.record.batches.append([leased.value for leased in got])
        for leased in got:
            if self.random.random() < 0.3:
                await asyncio.sleep(self.random.choice([0.01, 1.0]))
            with suppress(LeaseLost):
                if self.random.random() < 0.7:
                    await leased.ack_async()
                    self.record.settled.append(leased.value)
                else:
                    await leased.nack_async()

    async def drain(self) -> None:
        """Take what is left, until nothing comes back any more."""
        async with self.process("drain-0") as worker:
            queue = self.queue(worker)
            await queue.close_async()
            with suppress(Closed):
                while True:
                    got = await queue.get_async(100, 60.0)
                    self.record.plain += got
                    self.record.batches.append(got)


async def _run(plan: Plan) -> Record:
    roles = [
        ("owner", 2),
        ("producer", plan.producers),
        ("consumer", plan.consumers),
        ("drain", 1),
    ]
    settings = NetworkSettings(delay_s=plan.delay, loss=plan.loss)
    async with AsyncExitStack() as stack:
        job = await stack.enter_async_context(
            cluster.job(cluster.actors(*roles), settings=settings)
        )
        history = History(plan, job)
        await _play(history, plan)
        return history.record


async def _play(history: History, plan: Plan) -> None:
    record, random = history.record, plan.random
    async with asyncio.TaskGroup() as group:
        started = asyncio.Event()
        late = random.random() < 0.3  # clients may be there before the owner
        owner = None if late else group.create_task(history.own("owner-0", started))
        producers = {
            f"producer-{n}": group.create_task(history.produce(n)) for n in range(plan.producers)
        }
        consumers = {
            f"consumer-{n}": group.create_task(history.consume(n)) for n in range(plan.consumers)
        }
        if owner is None:
            await asyncio.sleep(0.3)
            owner = group.create_task(history.own("owner-0", started))
        await started.wait()
        for _ in range(random.choice([0, 0, 1, 2])):
            await asyncio.sleep(random.random() * 0.5)
            victim, task = random.choice([*producers.items(), *consumers.items()])
            if not task.done():
                history.kill(victim, task)
        if plan.kills_owner:
            await asyncio.sleep(random.random() * 0.5)
            record.owners = 2
            history.kill("owner-0", owner)
            await asyncio.wait({owner})
            owner = group.create_task(history.own("owner-1", asyncio.Event()))
        if record.killed >= consumers.keys():
            for name, task in producers.items():
                history.kill(name, task)  # nobody would make room for them
        await asyncio.wait(producers.values())
        await history.drain()
        await asyncio.wait(consumers.values())
        owner.cancel()


def check(record: Record, plan: Plan) -> None:
    """What must hold whatever happened."""
    for batch in record.batches:
        for producer in {producer for producer, _ in batch}:
            own = [number for other, number in batch if other == producer]
            assert own == sorted(own), f"out of order: {batch}"
    if record.owners > 1:
        return
    times = Counter(record.plain + record.settled)
    twice = {item for item, count in times.items() if count > 1}
    lost = record.acknowledged - times.keys()
    if plan.loss:  # whoever lost its connection and then died could not say what it had to say
        for name in record.killed:
            twice -= record.had.get(name, set())
            lost = {item for item in lost if f"producer-{item[0]}" != name}
    assert not twice, f"delivered twice: {sorted(twice)}"
    assert not record.refused & times.keys(), "said not to be in, yet delivered"
    # A consumer that died may have had one batch, and not come to note it.
    dead = sum(name.startswith("consumer") for name in record.killed)
    assert len(lost) <= 5 * dead, f"lost: {sorted(lost)}"


def play(seed: int) -> Record:
    """Run the history of one seed; raises with the seed in its text when a rule is broken."""
    # Times are sums of drawn delays: each is a time of its own, none may be rounded to just before it.
    real = asyncio.new_event_loop()
    loop = looptime.patch_event_loop(real, start=0, resolution=2.0**-60, _enabled=True)
    plan = Plan.of(seed)

    async def bounded() -> Record:
        async with asyncio.timeout(_LIMIT_S):
            return await _run(plan)

    try:
        record = loop.run_until_complete(bounded())
        check(record, plan)
    except (AssertionError, RuntimeFault, TimeoutError, ExceptionGroup) as error:
        raise AssertionError(f"QUEUE_SEED={seed}: {error!r}") from error
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    return record

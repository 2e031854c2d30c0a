"""Services: nothing outlives them, nothing ends in them unseen."""

from __future__ import annotations

import asyncio
import logging
from random import Random

import pytest

from runtime.aio import Backoff, Service, background
from runtime.errors import Closed, MisuseError, RuntimeFault

pytestmark = pytest.mark.looptime


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _raise_after(seconds: float, error: Exception) -> None:
    await asyncio.sleep(seconds)
    raise error


class _Recorder(Service):
    def __init__(self, **settings: float) -> None:
        super().__init__("recorder", **settings)
        self.calls: list[str] = []

    async def _on_start(self) -> None:
        self.calls.append("start")

    async def _on_close(self) -> None:
        self.calls.append("close")


async def test_a_service_starts_once_and_closes_once() -> None:
    service = _Recorder()
    await service.start()
    await service.start()
    assert service.running
    await asyncio.gather(service.close(), service.close())
    await service.close()
    assert not service.running
    assert service.calls == ["start", "close"]


async def test_a_service_that_was_never_started_closes() -> None:
    service = _Recorder()
    await service.close()
    assert service.calls == []
    await service.wait()


async def test_a_closed_service_cannot_be_started_again() -> None:
    service = _Recorder()
    await service.close()
    with pytest.raises(MisuseError, match="make a new one"):
        await service.start()


async def test_a_failing_start_closes_what_was_begun() -> None:
    class Broken(_Recorder):
        async def _on_start(self) -> None:
            self.spawn(_for_ever(), "forever")
            raise OSError("no such address")

    service = Broken()
    with pytest.raises(OSError, match="no such address"):
        await service.start()
    assert service.calls == ["close"]
    assert not service.running


async def test_tasks_end_with_their_service_even_before_their_first_step() -> None:
    async with Service("s") as service:
        task = service.serve(_for_ever(), "forever")
    assert task.cancelled()
    assert task.get_name() == "s/forever"


async def test_a_task_may_end_when_it_was_spawned_to_end() -> None:
    async def seven() -> int:
        return 7

    async with Service("s") as service:
        assert await service.spawn(seven(), "seven") == 7
        assert service.running


async def test_the_block_is_cancelled_and_gets_the_error_of_a_task_that_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(KeyError, match="lost"):  # noqa: PT012
        async with Service("s") as service:
            service.spawn(_raise_after(3, KeyError("lost")), "loser")
            await _for_ever()
    assert "s/loser failed: KeyError" in caplog.text
    assert asyncio.current_task().cancelling() == 0


async def test_an_error_of_the_block_itself_comes_through_as_it_is() -> None:
    with pytest.raises(ValueError, match="mine"):  # noqa: PT012 - the block is what is tested
        async with Service("s") as service:
            service.serve(_for_ever(), "forever")
            raise ValueError("mine")


async def test_a_block_cancelled_from_outside_stays_cancelled() -> None:
    async def body() -> None:
        async with Service("s") as service:
            service.serve(_for_ever(), "forever")
            await _for_ever()

    task = asyncio.get_running_loop().create_task(body())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_should_not_end_fails_its_service_by_ending() -> None:
    service = Service("s")
    await service.start()
    service.serve(asyncio.sleep(2), "short")
    with pytest.raises(RuntimeFault, match="s/short ended although"):
        await service.wait()
    assert not service.running
    await service.close()


async def test_one_failure_stops_the_other_tasks_and_close_still_runs() -> None:
    service = _Recorder()
    await service.start()
    other = service.serve(_for_ever(), "other")
    service.spawn(_raise_after(1, OSError("gone")), "failing")
    with pytest.raises(OSError, match="gone"):
        await service.wait()
    assert other.cancelled()
    with pytest.raises(Closed, match="late cannot be started"):
        service.spawn(_for_ever(), "late")
    await service.close()
    assert service.calls == ["start", "close"]


async def test_a_graceful_end_that_takes_too_long_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    class Slow(_Recorder):
        async def _on_close(self) -> None:
            await asyncio.sleep(100)

    service = Slow(close_timeout=2)
    await service.start()
    before = asyncio.get_running_loop().time()
    await service.close()
    assert asyncio.get_running_loop().time() - before == pytest.approx(2)
    assert "did not close within 2 s" in caplog.text


async def test_a_task_that_will_not_stop_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def stubborn() -> None:
        try:
            await _for_ever()
        except asyncio.CancelledError:
            await asyncio.sleep(50)

    service = Service("s", close_timeout=1)
    await service.start()
    service.spawn(stubborn(), "stubborn")
    await asyncio.sleep(0)
    await service.close()
    assert "do not stop: s/stubborn" in caplog.text
    await service.wait()


async def test_what_a_task_raises_while_it_is_stopped_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def clumsy() -> None:
        try:
            await _for_ever()
        finally:
            raise OSError("disk full")

    async with Service("s") as service:
        service.spawn(clumsy(), "clumsy")
        await asyncio.sleep(0)
    assert "disk full" in caplog.text


async def test_a_cancelled_close_still_ends_the_tasks() -> None:
    class Slow(_Recorder):
        async def _on_close(self) -> None:
            await asyncio.sleep(100)

    service = Slow(close_timeout=200)
    await service.start()
    task = service.serve(_for_ever(), "forever")
    closing = asyncio.get_running_loop().create_task(service.close())
    await asyncio.sleep(1)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert task.cancelled()
    await service.close()


async def test_background_work_ends_with_its_block() -> None:
    async with background(_for_ever(), "beside") as task:
        assert task.get_name() == "beside"
    assert task.cancelled()


async def test_failing_background_work_ends_its_block() -> None:
    with pytest.raises(OSError, match="gone"):
        async with background(_raise_after(1, OSError("gone")), "beside"):
            await _for_ever()


async def test_an_error_beside_background_work_is_no_group() -> None:
    with pytest.raises(ValueError, match="mine"):
        async with background(_for_ever(), "beside"):
            raise ValueError("mine")


def test_backoff_doubles_up_to_its_limit_and_begins_again() -> None:
    backoff = Backoff(Random(1), first=1, limit=4)
    waits = [backoff.next() for _ in range(5)]
    for wait, whole in zip(waits, [1, 2, 4, 4, 4], strict=True):
        assert whole / 2 <= wait <= whole
    backoff.reset()
    assert backoff.next() <= 1


async def test_backoff_waits_what_it_draws() -> None:
    drawn = Backoff(Random(3), first=8, limit=8).next()
    loop = asyncio.get_running_loop()
    before = loop.time()
    await Backoff(Random(3), first=8, limit=8).wait()
    assert loop.time() - before == pytest.approx(drawn)


@pytest.mark.parametrize("settings", [{"first": 0}, {"first": 3, "limit": 2}, {"factor": 0.5}])
def test_backoff_refuses_what_cannot_work(settings: dict[str, float]) -> None:
    with pytest.raises(MisuseError, match="allowed are"):
        Backoff(Random(0), **settings)

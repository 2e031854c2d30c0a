"""Typed stubs: what calling one does for each `how`, and what providers are held to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from runtime.errors import CallGroupError, MisuseError, Timeout
from runtime.peer.future import Future
from runtime.peer.group import RoleGroup
from runtime.peer.method import method_of, rpc
from runtime.peer.sequence import FutureSequence
from runtime.peer.stub import remote
from tests.peer.support import World, settle
from tests.peer.workers import blocking, worker


@remote("w")
def who() -> int:
    """Which rank."""
    raise AssertionError("the body of a stub is never run")


@remote("w", how="rank0")
def plain(x: int, *, y: int = 0) -> int: ...


@remote("w", how="any")
async def hang() -> None: ...


@remote("w", how="batch")
def double(rows: list[int], note: str = "") -> list[int]: ...


async def test_a_stub_gives_what_its_how_gives(job: World) -> None:
    async def doubled(rows: list[int], note: str = "") -> list[int]:
        return [2 * row for row in rows]

    for rank in range(3):
        worker(job, rank).export("double", doubled)
    assert await blocking(who) == [0, 1, 2]
    assert await blocking(lambda: plain(3, y=4)) == 7
    found = await blocking(double, [1, 2, 3, 4], "text")
    assert type(found) is FutureSequence
    assert await found == [2, 4, 6, 8]
    assert isinstance(who.future(), Future)
    assert await who.future() == [0, 1, 2]
    assert await double.future([5]) == [10]
    assert (who.__name__, who.__doc__) == ("who", "Which rank.")
    assert repr(double) == "<stub double of role 'w', how='batch'>"


async def test_an_async_stub_is_awaited_and_takes_options(job: World) -> None:
    with pytest.raises(Timeout, match=r"hang\(\)"):
        await hang.options(timeout=0.05)()
    future = hang()
    await settle()
    future.cancel()

    @remote("w")
    async def odd_fails() -> int: ...

    with pytest.raises(CallGroupError):
        await odd_fails()
    assert [type(r) for r in await odd_fails.options(return_exceptions=True)()][::2] == [int, int]


async def test_a_blocking_stub_on_the_loop_sends_nothing(job: World) -> None:
    with pytest.raises(MisuseError, match=r"use `await plain\.future\(\.\.\.\)`"):
        plain(3)
    await settle()
    assert job._open[0].statistics().calls_out == 0


async def test_arguments_that_do_not_fit_are_refused_here(job: World) -> None:
    with pytest.raises(
        MisuseError, match=r"plain\(\): missing .*'x'; its signature is plain\(x: .*, \*, y: "
    ):
        plain.future(y=3)  # type: ignore[call-arg]
    with pytest.raises(MisuseError, match="none can be cut"):
        double.future("text")  # type: ignore[arg-type]
    await settle()
    assert job._open[0].statistics().calls_out == 0


async def test_a_stub_is_a_method_that_groups_can_call(job: World) -> None:
    assert await RoleGroup("w").call(who) == [0, 1, 2]
    assert await RoleGroup("w")[1].call(plain, 1) == 101


async def test_stubs_follow_the_node_of_their_process(job: World) -> None:
    assert await who.future() == [0, 1, 2]
    job.install(await job.start("other-0"))
    assert await who.future() == [0, 1, 2]
    assert job._open[-1].statistics().calls_out == 3


def test_a_provider_takes_the_name_of_its_stub() -> None:
    @rpc(plain)
    def other_name(x: int, *, y: int = 0) -> int:
        return x + y

    class Provider:
        @rpc(double, concurrency=2)
        async def method(self, rows: list[int], note: str = "", extra: int = 1) -> list[int]:
            return rows

    assert method_of(other_name) == ("plain", False, None, True, True)
    assert method_of(Provider.method) == ("double", False, 2, True, True)


def _fewer(x: int) -> None: ...
def _more(x: int, z: int, *, y: int = 0) -> None: ...
def _renamed(z: int, *, y: int = 0) -> None: ...
def _needed(x: int, *, y: int) -> None: ...
def _no_name(x: int, /, *, y: int = 0) -> None: ...


@pytest.mark.parametrize("provider", [_fewer, _more, _renamed, _needed, _no_name])
def test_a_provider_of_another_signature_is_refused_naming_both(
    provider: Callable[..., Any],
) -> None:
    with pytest.raises(
        MisuseError,
        match=rf"@rpc\(plain\): tests\.peer\.test_stub\.{provider.__name__}\(.*"
        r"its stub tests\.peer\.test_stub\.plain\(x: 'int', \*, y: ",
    ):
        rpc(plain)(provider)


def test_parameters_in_another_order_are_another_signature() -> None:
    @remote("w")
    def move(source: str, target: str) -> None: ...

    def swapped(target: str, source: str) -> None: ...

    def open_ended(*args: Any, **kwargs: Any) -> None: ...

    with pytest.raises(MisuseError, match="swapped"):
        rpc(move)(swapped)
    assert method_of(rpc(move)(open_ended)) is not None

    @remote("w")
    def many(*parts: str) -> None: ...

    with pytest.raises(MisuseError, match="does not take what its stub"):
        rpc(many)(swapped)
    assert method_of(rpc(many)(open_ended)) is not None


def test_what_makes_no_stub_is_refused() -> None:
    with pytest.raises(
        MisuseError, match=r"how='bach'.*did you mean 'batch'.*call, rank0, batch, any"
    ):
        remote("w", how="bach")  # type: ignore[call-overload]
    with pytest.raises(MisuseError, match="say the role"):
        remote(who)  # type: ignore[call-overload]


async def test_outside_of_a_job_a_stub_says_how_to_start_one() -> None:
    with pytest.raises(MisuseError, match=r"runtime\.launch"):
        await asyncio.to_thread(who)

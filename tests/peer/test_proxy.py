"""Proxies: an object over there, called like one here; and exporting."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runtime.errors import MisuseError, NotExposedError, Timeout
from runtime.peer import context
from runtime.peer.endpoint import Endpoint
from runtime.peer.group import RoleGroup
from runtime.peer.method import rpc
from runtime.peer.proxy import create_rpc_proxy, export_rpc_instance, export_rpc_method
from tests.peer.support import World, echo, settle
from tests.peer.workers import blocking


class Counter:
    """Exported by a worker, called through a proxy."""

    def __init__(self, total: int = 0) -> None:
        self.total = total

    @rpc
    def add(self, n: int, *, twice: bool = False) -> int:
        self.total += n * (2 if twice else 1)
        return self.total

    @rpc("current")
    async def value(self) -> int:
        return self.total

    @rpc
    async def options(self) -> str:
        return "a user's own"

    def secret(self) -> int:
        return 0


async def serve_counter(job: World, namespace: str | None) -> Endpoint:
    worker = job._open[1]
    worker.export_instance(namespace, Counter())
    return worker


@pytest.mark.parametrize("namespace", ["counter", None, ""])
@pytest.mark.parametrize("owner", ["w-0", "w", "actor", "info"])
async def test_a_proxy_blocks_or_is_awaited_as_its_methods_do(
    job: World, namespace: str | None, owner: Any
) -> None:
    await serve_counter(job, namespace)
    given = {"actor": RoleGroup("w")[0], "info": RoleGroup("w")[0].info}.get(owner, owner)
    proxy = create_rpc_proxy(given, namespace, Counter)
    assert await blocking(lambda: proxy.add(2, twice=True)) == 4
    assert await proxy.value() == 4
    assert await proxy.options() == "a user's own"
    assert "Counter in w-0" in repr(proxy)


async def test_a_blocking_method_on_the_loop_sends_nothing(job: World) -> None:
    worker = await serve_counter(job, "c")
    with pytest.raises(MisuseError, match=r"await RoleActor\.call\('c\.add', \.\.\.\)"):
        create_rpc_proxy("w", "c", Counter).add(1)
    await settle()
    assert worker.statistics().calls_in == 0


async def test_a_proxy_takes_options(job: World) -> None:
    class Slow:
        @rpc
        async def hang(self) -> None:
            await asyncio.Event().wait()

    job._open[1].export_instance("slow", Slow())
    proxy: Any = create_rpc_proxy("w-0", "slow", Slow)
    with pytest.raises(Timeout, match=r"slow\.hang"):
        await proxy.options(timeout=0.05).hang()


async def test_what_a_proxy_does_not_have_is_told(job: World) -> None:
    await serve_counter(job, "c")
    proxy: Any = create_rpc_proxy("w", "c", Counter)
    with pytest.raises(
        NotExposedError, match=r"Counter\.ad is not .*did you mean 'add'.*add, options"
    ):
        _ = proxy.ad
    with pytest.raises(AttributeError):
        _ = proxy.__deepcopy__
    with pytest.raises(MisuseError, match="no method marked"):
        create_rpc_proxy("w", "c", World)
    with pytest.raises(MisuseError, match=r"no actor 'w-7'.*w-0, w-1, w-2"):
        create_rpc_proxy("w-7", "c", Counter)


async def test_functions_and_instances_are_exported_by_the_running_node(job: World) -> None:
    me = context.current().endpoint
    counter = Counter(5)
    export_rpc_instance("mine", counter)
    export_rpc_instance("mine", counter)
    export_rpc_method("echo", echo)
    export_rpc_method("echo", echo)
    assert me.exported() == ["echo", "mine.add", "mine.current", "mine.options"]
    with pytest.raises(MisuseError, match=r"'mine\.add' already"):
        export_rpc_instance("mine", Counter())
    with pytest.raises(MisuseError, match="no method marked"):
        export_rpc_instance("x", object())
    assert await job._open[1].call("me-0", "mine.current") == 5


async def test_declared_functions_are_exposed_by_the_node_that_is_installed(job: World) -> None:
    from runtime.peer import method as methods

    before = list(methods._declared.functions)
    try:

        @rpc("declared", export=True)
        async def declared() -> str:
            return "found"

        assert await job._open[1].call("me-0", "declared") == "found"
    finally:
        methods._declared.functions[:] = before


async def test_only_marked_functions_have_a_name_of_their_own(job: World) -> None:
    with pytest.raises(MisuseError, match="not marked with @rpc"):
        context.current().endpoint.export_function(echo)

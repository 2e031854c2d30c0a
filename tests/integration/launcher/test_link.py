"""A link through a local process, as `ssh` is one."""

from __future__ import annotations

import asyncio
import sys

from runtime.launcher import spawn
from runtime.launcher.channel import Kind
from runtime.launcher.link import AgentLink
from runtime.launcher.plan import Host


async def test_what_another_host_says_cannot_steer_our_terminal() -> None:
    script = r"printf 'first\n\033[2Jno \033]0;x\a\tway\n\n' >&2"
    link = await AgentLink.through(Host("h1", local=False), ["sh", "-c", script])
    await link.ended(5)
    await link.close()
    assert link.stderr == ("first", "no  ]0;x way")


async def test_an_agent_whose_job_does_not_come_in_time_ends() -> None:
    argv = [sys.executable, "-c", spawn.guarded_agent(1)]
    link = await AgentLink.through(Host("h1", local=False), argv)
    link.channel.send_message(Kind.COMMAND, {"op": "greet"})
    async with asyncio.timeout(20):
        hello = await link.channel.receive()
        assert hello is not None
        assert hello.message()["event"] == "hello"
        assert await link.channel.receive() is None
    assert await link.ended(5) == spawn.Exit()
    await link.close()


async def test_an_idle_agent_waits_for_as_long_as_its_link_lasts() -> None:
    argv = [sys.executable, "-c", spawn.guarded_agent(3)]
    link = await AgentLink.through(Host("h1", local=False), argv)
    link.channel.send_message(Kind.COMMAND, {"op": "greet"})
    link.channel.send_message(Kind.COMMAND, {"op": "idle"})
    await asyncio.wait({link.exit}, timeout=4)
    assert not link.exit.done()
    await link.close()
    assert link.exit.result() == spawn.Exit()

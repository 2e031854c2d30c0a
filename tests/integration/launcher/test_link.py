"""A link through a local process, as `ssh` is one."""

from __future__ import annotations

from runtime.launcher.link import AgentLink
from runtime.launcher.plan import Host


async def test_what_another_host_says_cannot_steer_our_terminal() -> None:
    script = r"printf 'first\n\033[2Jno \033]0;x\a\tway\n\n' >&2"
    link = await AgentLink.through(Host("h1", local=False), ["sh", "-c", script])
    await link.ended(5)
    await link.close()
    assert link.stderr == ("first", "no  ]0;x way")

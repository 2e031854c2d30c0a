"""The launcher's dialling as a program, to be run on a test host: `dial_program.py HOSTS SETTINGS [hold]`.

HOSTS is JSON, a list of the fields of each `Host`; SETTINGS those of `DialSettings`. Prints one line of JSON:
the agents' hellos or the failures, and the seconds that it took. With `hold` it then keeps the links until its
input ends, and prints a line for each link that ends before.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from runtime.launcher import spawn
from runtime.launcher.around import own_names
from runtime.launcher.dial import dial_all
from runtime.launcher.hosts import mark_local
from runtime.launcher.link import AgentLink, HostsFailed
from runtime.launcher.plan import Host
from runtime.launcher.ssh import DialSettings


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


async def watch(link: AgentLink) -> None:
    while await link.channel.receive() is not None:
        pass
    exit = await link.ended()
    say(ended=link.host.name, cause=exit.cause, words=link.last_words())


async def main() -> None:
    spawn.become_subreaper()
    hosts = mark_local([Host(**fields) for fields in json.loads(sys.argv[1])], own_names())
    settings = DialSettings(**{"python": sys.executable, "workdir": "/", **json.loads(sys.argv[2])})
    started = time.monotonic()
    try:
        links = await dial_all(hosts, settings)
    except HostsFailed as error:
        failures = {failure.host: failure.reason for failure in error.failures}
        say(failures=failures, code=error.code, seconds=time.monotonic() - started, text=str(error))
        return
    hellos = {
        link.host.name: {"pid": link.pid, **link.hello._asdict()} for link in links if link.hello
    }
    say(hellos=hellos, seconds=time.monotonic() - started)
    if sys.argv[3:] == ["hold"]:
        watches = [asyncio.get_running_loop().create_task(watch(link)) for link in links]
        await asyncio.to_thread(sys.stdin.read)
        for task in watches:
            task.cancel()
    for link in links:
        await link.close()


if __name__ == "__main__":
    asyncio.run(main())

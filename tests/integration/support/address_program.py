"""Dials the hosts that it is told, has addresses chosen for them, and prints which, or why not, as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from runtime.launcher.dial import dial_all
from runtime.launcher.link import HostsFailed
from runtime.launcher.plan import Host
from runtime.launcher.ssh import DialSettings
from runtime.launcher.survey import choose_addresses


async def main(names: list[str], iface: tuple[str, ...]) -> None:
    settings = DialSettings(python=sys.executable, workdir="/")
    links = await dial_all([Host(name, local=False) for name in names], settings)
    began = time.monotonic()
    try:
        chosen = await choose_addresses(links, iface)
        said = {"address": dict(chosen.address), "accept_from": chosen.accept_from}
    except HostsFailed as failed:
        said = {"failed": {failure.host: failure.reason for failure in failed.failures}}
    print(json.dumps({**said, "seconds": time.monotonic() - began}))
    for link in links:
        await link.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1].split(), tuple(sys.argv[2:])))

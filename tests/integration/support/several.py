"""A launch on several agents of this machine that pretend to be hosts: `-m tests.integration.support.several`.

PRETENDED_HOSTS is "name:slots,…"; each has an address of its own in 127.0.0.0/8 and a folder of its own. All but ssh
is as between hosts: TCP, keys, one agent each.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from runtime import launch
from runtime.config import read_config
from runtime.launcher import spawn
from runtime.launcher.addresses import Chosen
from runtime.launcher.around import look_around
from runtime.launcher.link import AgentLink
from runtime.launcher.options import LaunchOptions, parse_options
from runtime.launcher.plan import Host, Plan, make_plan
from runtime.launcher.prepare import job_from_options


def _plan(options: LaunchOptions) -> Plan:
    words = [word.partition(":") for word in os.environ["PRETENDED_HOSTS"].split(",")]
    hosts = tuple(Host(name, int(slots)) for name, _, slots in words)
    facts = look_around(options)
    return make_plan(options, hosts, job_from_options(options, hosts, facts), facts=facts)


async def _run(options: LaunchOptions, plan: Plan) -> int:
    links = [await AgentLink.of_agent(host, spawn.start_agent()) for host in plan.hosts]
    addresses = {host.name: f"127.0.0.{n}" for n, host in enumerate(plan.hosts, 2)}
    # Whoever connects from this machine comes from 127.0.0.1, wherever it goes.
    chosen = Chosen(addresses, dict.fromkeys(addresses, "lo"), ("127.0.0.1", *addresses.values()))
    common = launch._assignment(options, plan, read_config(options.config_file))
    common = replace(common, arena=common.arena or 0)
    return await launch._run(links, launch._assignments(common, links, chosen), False)


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv, os.environ)
    spawn.become_subreaper()
    return asyncio.run(_run(options, _plan(options)))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)

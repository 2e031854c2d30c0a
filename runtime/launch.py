"""`python -m runtime.launch`: from a command line to an exit code.

The agent is started first of all: its interpreter starts while this one imports and plans. Everything
that can be wrong with a launch is found before the agent hears of it. torch is never imported here.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # Before any other import: nobody wants to see the traceback of one after Ctrl-C.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.config import Config
    from runtime.launcher.addresses import Chosen
    from runtime.launcher.assignment import Assignment
    from runtime.launcher.link import AgentLink
    from runtime.launcher.options import LaunchOptions
    from runtime.launcher.output import OutputSettings
    from runtime.launcher.plan import Facts, Host, Plan
    from runtime.launcher.spawn import LocalAgent

USAGE = 2
_DEFAULT_LOG_DIR = "~/.runtime/logs"
_NO_AGENT_FOR = frozenset(
    ("-h", "--help", "--dry-run", "--dry_run", "--detach", "--hosts", "--hostfile", "-H")
)
"""Options with which none is started in advance. Where ssh is waited for, there is time for that later."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher with `argv` (default: the process's) and give the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _start(argv)
    except KeyboardInterrupt:  # before the job has begun
        return 130
    finally:
        # An agent without an assignment ends with its input, that is, with this process.
        sys.stderr.flush()


def _start(argv: Sequence[str]) -> int:
    from runtime.launcher import spawn

    given = {word.partition("=")[0] for word in argv}
    agent = None if _NO_AGENT_FOR & given else spawn.start_agent()
    spawn.become_subreaper()
    from runtime.errors import ConfigError  # after the agent has been started

    try:
        return _launch(argv, agent)
    except ConfigError as error:
        _complain(error)
        spawn.kill_descendants()  # the agent would go on importing for nothing
        return USAGE


def _detached_agent(job_id: str) -> LocalAgent:
    """An agent that holds nothing of this terminal, and has a guard, since we will not be there."""
    from runtime.launcher import jobs, spawn

    fd = jobs.open_log(job_id)
    try:
        return spawn.start_agent(spawn.guarded_agent(), fd)
    finally:
        os.close(fd)


def _complain(error: Exception) -> None:
    for line in str(error).splitlines():
        sys.stderr.write(f"runtime.launch: error: {line}\n")


def _launch(argv: Sequence[str], agent: LocalAgent | None) -> int:
    import asyncio

    from runtime.config import read_config
    from runtime.launcher import slurm
    from runtime.launcher.around import look_around
    from runtime.launcher.options import help_text, parse_options
    from runtime.launcher.plan import to_json, to_text
    from runtime.launcher.prepare import hosts_from_options, prepare
    from runtime.launcher.sources import FoundSources
    from runtime.launcher.spawn import start_agent

    options = parse_options(argv, os.environ)
    if options.help:
        sys.stdout.write(help_text())
        return 0
    config = read_config(options.config_file).louder(options.verbosity)
    facts = look_around(options)
    if slurm.is_follower(options, facts.env):
        return 0
    if slurm.is_to_submit(options, facts.env):
        from runtime.launcher.submit import submit

        sys.stdout.write(submit(options, argv, facts))
        return 0
    hosts = hosts_from_options(options, facts)
    if options.detach and not options.dry_run:
        agent = _detached_agent(options.job_id or facts.job_id)
    several = len(hosts) > 1 or not hosts[0].local
    if several and not options.dry_run:
        return asyncio.run(_launch_on(hosts, options, facts, config, agent))
    plan = prepare(options, facts, FoundSources(facts.cwd))
    if options.dry_run:
        sys.stdout.write(to_json(plan) + "\n" if options.json else to_text(plan))
        return 0
    assignment = _assignment(options, plan, config)
    quiet = options.verbosity < 0
    return asyncio.run(_launch_here(assignment, agent or start_agent(), quiet))


async def _launch_here(assignment: Assignment, agent: LocalAgent, quiet: bool) -> int:
    """A job on this machine alone."""
    from runtime.launcher.link import AgentLink

    link = await AgentLink.of_agent(assignment.plan.hosts[0], agent)
    return await _run([link], [assignment], quiet)


def _leave(number: int) -> None:
    """A signal while hosts are dialled: an ssh client whose host does not answer would stay for a while."""
    from runtime.launcher import spawn

    spawn.kill_descendants()
    os._exit(128 + number)


async def _launch_on(
    hosts: Sequence[Host],
    options: LaunchOptions,
    facts: Facts,
    config: Config,
    agent: LocalAgent | None,
) -> int:
    """A job on several hosts, or on another one: they are asked what they are before it is planned."""
    import asyncio
    from dataclasses import replace

    from runtime.launcher.channel import Kind
    from runtime.launcher.dial import dial_all
    from runtime.launcher.link import HostsFailed
    from runtime.launcher.prepare import dial_settings, prepare
    from runtime.launcher.sources import FoundSources
    from runtime.launcher.survey import choose_addresses

    for number in (signal.SIGINT, signal.SIGTERM):  # until the session takes them over
        asyncio.get_running_loop().add_signal_handler(number, _leave, number)
    settings = dial_settings(options, hosts, facts, config)
    try:
        if options.sync is not None:
            from runtime.launcher.sync import copy_to

            await asyncio.to_thread(copy_to, hosts, options.sync, settings)
        links = await dial_all(hosts, settings, agent)
        found = {
            link.host.name: (link.hello.cpu_count, link.hello.gpu_count)
            for link in links
            if link.hello is not None
        }
        facts = replace(facts, found=found)
        plan = prepare(options, facts, FoundSources(facts.cwd))
        planned = {host.name for host in plan.hosts}
        for link in links:  # the others stay idle: a link of the job may go through one of them
            if link.host.name not in planned:
                link.channel.send_message(Kind.COMMAND, {"op": "idle"})
        links = [link for link in links if link.host.name in planned]
        alone = len(links) == 1 and links[0].local  # else its control plane is asked from here, too
        chosen = None
        if not alone:
            chosen = await choose_addresses(links, options.iface, options.port_range)
    except HostsFailed as error:
        _complain(error)
        return error.code
    assignments = _assignments(_assignment(options, plan, config), links, chosen)
    return await _run(links, assignments, options.verbosity < 0)


async def _run(links: Sequence[AgentLink], assignments: Sequence[Assignment], quiet: bool) -> int:
    from runtime.launcher.report import exit_code
    from runtime.launcher.session import Session

    return exit_code(await Session(links, assignments, quiet=quiet).run())


def _assignments(
    common: Assignment, links: Sequence[AgentLink], chosen: Chosen | None
) -> list[Assignment]:
    """What each host is told. Keys and TCP are for jobs of several hosts only."""
    from dataclasses import replace

    from runtime.launcher.ssh import forwarded

    if chosen is not None:
        from runtime.transport.sockets import mint

        common = replace(common, accept_from=chosen.accept_from, security=mint())
    assignments = []
    for rank, link in enumerate(links):
        host = replace(common, host=link.host.name, node_rank=rank, clock_ahead_s=link.ahead_s)
        if chosen is not None:
            env = {**chosen.variables(link.host.name), **common.env}
            host = replace(host, address=chosen.address[link.host.name], env=env)
        if not link.local:  # its agent knows its own folders
            host = replace(host, job_dir="", env=forwarded(host.env))
        elif rank:
            host = replace(host, job_dir=_job_dir())
        assignments.append(host)
    return assignments


def _job_dir() -> str:
    from runtime.launcher.assignment import choose_job_dir

    return choose_job_dir(os.urandom(4).hex(), os.environ)


def _assignment(options: LaunchOptions, plan: Plan, settings: Config) -> Assignment:
    """What all hosts are told alike."""
    import pickle
    from dataclasses import replace

    from runtime.launcher.assignment import Assignment

    # Only workers open it: it may hold objects of the user's own classes.
    config: Any = pickle.dumps(plan.job.config, protocol=5)
    job = replace(plan.job, config=config)
    remote = any(not host.local for host in plan.hosts)
    log_dir = options.log_dir or _DEFAULT_LOG_DIR
    if options.log_dir or not remote:  # else each host's own home
        log_dir = os.path.abspath(os.path.expanduser(log_dir))
    env = dict(os.environ)
    if settings.source:  # theirs, too, whatever directory they start in
        env["RUNTIME_CONFIG"] = os.path.abspath(settings.source)
    return Assignment(
        plan=replace(plan, job=job),
        host=plan.hosts[0].name,
        job_dir=_job_dir(),
        log_dir=log_dir,
        workdir=os.getcwd(),
        env=env,
        settings=settings,
        output=_output_settings(options, plan),
        transport=options.transport,
        arena=options.arena,
        shutdown_timeout_s=options.shutdown_timeout,
        detached=options.detach,
        timeout_s=options.timeout,
        port_range=options.port_range,
        drain_timeout_s=options.drain_timeout,
    )


def _output_settings(options: LaunchOptions, plan: Plan) -> OutputSettings:
    from runtime.launcher.output import OutputSettings, shown_streams

    only = frozenset[int]() if options.detach else options.local_ranks_filter
    console = {
        rank: shown_streams(rank, options.redirects, options.tee, only)
        for rank in {launch.local_rank for launch in plan.launches}
    }
    return OutputSettings(
        console=console,
        prefix=options.log_prefix if options.tag_output else "",
        timestamp=options.timestamp,
        colour=sys.stdout.isatty() and sys.stderr.isatty() and "NO_COLOR" not in os.environ,
        several_hosts=len(plan.hosts) > 1,
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # The console's thread may sit in a terminal that was stopped: nobody waits for it.
    os._exit(code)

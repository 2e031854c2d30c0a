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
    from runtime.launcher.assignment import Assignment
    from runtime.launcher.options import LaunchOptions
    from runtime.launcher.output import OutputSettings
    from runtime.launcher.plan import Plan
    from runtime.launcher.spawn import LocalAgent

USAGE = 2
_DEFAULT_LOG_DIR = "~/.runtime/logs"
_NO_AGENT_FOR = frozenset(("-h", "--help", "--dry-run", "--dry_run"))


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

    agent = None if _NO_AGENT_FOR & set(argv) else spawn.start_agent()
    spawn.become_subreaper()
    from runtime.errors import ConfigError  # after the agent has been started

    try:
        return _launch(argv, agent)
    except ConfigError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"runtime.launch: error: {line}\n")
        return USAGE


def _launch(argv: Sequence[str], agent: LocalAgent | None) -> int:
    from runtime.config import read_config
    from runtime.launcher.around import look_around
    from runtime.launcher.options import help_text, parse_options
    from runtime.launcher.plan import to_json, to_text
    from runtime.launcher.prepare import prepare
    from runtime.launcher.sources import FoundSources
    from runtime.launcher.spawn import start_agent

    options = parse_options(argv, os.environ)
    if options.help:
        sys.stdout.write(help_text())
        return 0
    config = read_config(options.config_file).louder(options.verbosity)
    facts = look_around(options)
    plan = prepare(options, facts, FoundSources(facts.cwd))
    if options.dry_run:
        sys.stdout.write(to_json(plan) + "\n" if options.json else to_text(plan))
        return 0
    assignment = _assignment(options, plan, config)
    return _run(assignment, agent or start_agent(), options.verbosity < 0)


def _run(assignment: Assignment, agent: LocalAgent, quiet: bool) -> int:
    import asyncio

    from runtime.launcher.report import exit_code
    from runtime.launcher.session import Session

    async def session() -> int:
        return exit_code(await Session(agent, assignment, quiet=quiet).run())

    return asyncio.run(session())


def _assignment(options: LaunchOptions, plan: Plan, settings: Config) -> Assignment:
    import pickle
    from dataclasses import replace

    from runtime.launcher.assignment import Assignment, choose_job_dir

    # Only workers open it: it may hold objects of the user's own classes.
    config: Any = pickle.dumps(plan.job.config, protocol=5)
    job = replace(plan.job, config=config)
    log_dir = os.path.abspath(os.path.expanduser(options.log_dir or _DEFAULT_LOG_DIR))
    env = dict(os.environ)
    if settings.source:  # theirs, too, whatever directory they start in
        env["RUNTIME_CONFIG"] = os.path.abspath(settings.source)
    return Assignment(
        plan=replace(plan, job=job),
        host=plan.hosts[0].name,
        job_dir=choose_job_dir(os.urandom(4).hex(), os.environ),
        log_dir=log_dir,
        workdir=os.getcwd(),
        env=env,
        settings=settings,
        output=_output_settings(options, plan),
        transport=options.transport,
        arena=options.arena,
        shutdown_timeout_s=options.shutdown_timeout,
        timeout_s=options.timeout,
        port_range=options.port_range,
    )


def _output_settings(options: LaunchOptions, plan: Plan) -> OutputSettings:
    from runtime.launcher.output import OutputSettings, shown_streams

    console = {
        rank: shown_streams(rank, options.redirects, options.tee, options.local_ranks_filter)
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

"""The process above an agent that was started from another machine, for the case that it is killed.

On its own machine the launcher ends what a killed agent leaves. Elsewhere nobody would: this one waits for the
agent, ends whatever of the job has outlived it and removes the job's folder. It holds neither end of the
launcher's link, so that the link ends with the agent.
"""

from __future__ import annotations

import os
import signal
import sys

from runtime.launcher import spawn, zygote


def start_guarded() -> zygote.Started:
    """Go on as the child of a guard, which never returns from here; then start the first zygote. The agent
    writes its job's folder to `.guard`."""
    told, tell = os.pipe()
    agent = os.fork()
    if agent:
        os.close(tell)
        try:
            _watch(agent, told)
        finally:
            os._exit(1)
    os.close(told)
    return zygote.start_first()._replace(guard=tell)


def _watch(agent: int, told: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the agent's business
    spawn.become_subreaper()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    while True:
        pid, status = os.wait()
        if pid == agent:
            break
    exit = spawn.Exit.from_status(status)
    spawn.kill_descendants()
    os.set_blocking(told, False)
    if exit.signal:
        from runtime.launcher.assignment import remove_job_dir

        remove_job_dir(os.read(told, 4096).decode())
        sys.stderr.write(f"its agent was killed by {exit.cause}\n")
    os._exit(exit.shell_code)

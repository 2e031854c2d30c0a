"""The first words between the launcher and an agent: what is there, and does it fit?

Before anything starts, each host is asked what it is. All that does not fit comes out at once, a line for
each host. torch is not imported for this: its version stands in its metadata.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from runtime.errors import WireError
from runtime.launcher import spawn
from runtime.launcher.channel import Channel, Frame, Frames, Kind
from runtime.launcher.ssh import Failure
from runtime.wire.frames import VERSION


class Hello(NamedTuple):
    """What a host is. `torch` None: none there. `problems`: what it was asked for and lacks, in words.

    `addresses`: (interface, address) of each that others might reach. `ssh_client`: where ssh came from.
    `process`: its agent's pid and `ProcessInfo.started`. `clock`: its time, in seconds since the epoch.
    """

    hostname: str
    python: str
    torch: str | None
    runtime: str
    protocol: int
    cpu_count: int
    gpu_count: int
    addresses: tuple[tuple[str, str], ...] = ()
    problems: tuple[str, ...] = ()
    ssh_client: str = ""
    process: tuple[int, int] = (0, 0)
    clock: float = 0.0


def describe(asked: Mapping[str, Any]) -> Hello:
    """This host, and what of `asked` (`DialSettings.greeting`) it lacks."""
    from runtime.launcher import around  # a local agent of a one-host job is never asked

    return Hello(
        hostname=socket.gethostname(),
        python=sys.version.split()[0],
        torch=_torch_version(),
        runtime=sys.modules["runtime"].__version__,
        protocol=VERSION,
        cpu_count=len(os.sched_getaffinity(0)),
        gpu_count=around.gpu_count(),
        addresses=tuple(around.interfaces()),
        problems=tuple(_problems(asked)),
        ssh_client=os.environ.get("SSH_CONNECTION", "").partition(" ")[0],
        process=spawn.own_process(),
        clock=now(),
    )


def _torch_version() -> str | None:
    from importlib import metadata

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def _problems(asked: Mapping[str, Any]) -> list[str]:
    found = []
    workdir = asked.get("workdir", "")
    if workdir and (why := _lack(workdir, folder=True)):
        found.append(f"{why}: {workdir}")
    elif workdir and not os.access(workdir, os.X_OK):
        found.append(f"directory cannot be entered: {workdir}")
    for python in asked.get("python", ()):
        if shutil.which(python) is None:
            found.append(f"no interpreter {python}")
    for path in asked.get("paths", ()):
        if why := _lack(os.path.join(workdir, path)):
            found.append(f"{why}: {path}")
    return found


def _lack(path: str, *, folder: bool = False) -> str:
    """Why there is no such thing for us: in somebody's home, on a server that is gone. "" if there is."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return os.strerror(error.errno or 0).lower()
    return "no directory" if folder and not stat.S_ISDIR(mode) else ""


def read_hello(frame: Frame | None) -> Hello:
    """The answer to a greeting. Raises `WireError` when it is none."""
    message = {} if frame is None or frame.kind is not Kind.EVENT else frame.message()
    if message.pop("event", None) != "hello":
        raise WireError("no greeting", "the agent did not say what it is")
    try:
        hello = Hello(**message)
        addresses = tuple((str(name), str(address)) for name, address in hello.addresses)
        pid, started = map(int, hello.process)
        problems = tuple(map(str, hello.problems))
        return hello._replace(process=(pid, started), addresses=addresses, problems=problems)
    except (TypeError, ValueError) as error:
        raise WireError("no greeting", str(error)) from None


async def meet(channel: Channel, frame: Frame) -> tuple[Frames, Frame | None]:
    """The agent's side: answer if `frame`, its first, greets, and take part in a probe of addresses.

    Gives what to go on with: the channel, or one that dials others for the launcher besides; and the
    first frame that is about neither.
    """
    asked = frame.message()
    if asked["op"] != "greet":
        return channel, frame
    from runtime.launcher.relay import Relay  # it needs us

    relay = Relay(channel)
    await relay.start()
    relay.send_message(Kind.EVENT, {"event": "hello", **describe(asked)._asdict()})
    after = await relay.receive()
    if after is not None and after.kind is Kind.COMMAND and after.message()["op"] == "probe":
        from runtime.launcher import probe  # only where there are several hosts

        await probe.serve(after.message(), relay)
        after = await relay.receive()
    return relay, after


def now() -> float:
    """This host's clock: seconds since the epoch."""
    return datetime.now(UTC).timestamp()


def ahead_s(clock: float, asked: float, heard: float) -> float:
    """How far a clock is ahead (or, negative, behind) of ours at least, which was read between `asked` and
    `heard`: 0 where it may be right."""
    return min(0.0, clock - asked) + max(0.0, clock - heard)


def check(hellos: Mapping[str, Hello], own: Hello) -> list[Failure]:
    """What does not fit on each host (by name): versions other than the launcher's, things that lack, a machine
    that has another name, too.

    Where this machine has no torch, the hosts must agree among themselves.
    """
    torch = own.torch or next((hello.torch for hello in hellos.values() if hello.torch), None)
    wanted = own._replace(torch=torch)
    failures = []
    names: dict[tuple[object, ...], str] = {}
    for name, hello in hellos.items():
        problems = [*_unlike(hello, wanted), *hello.problems]
        first = names.setdefault((hello.hostname, *sorted(hello.addresses)), name)
        if hello.addresses and first != name:
            problems.append(f"it is the same machine as {first}: name it once")
        if problems:
            failures.append(Failure(name, "; ".join(problems)))
    return failures


def minor(version: str) -> str:
    """ "3.11" of "3.11.7"."""
    return ".".join(version.split(".")[:2])


def _unlike(hello: Hello, wanted: Hello) -> Sequence[str]:
    compared = (
        ("python", minor(hello.python), minor(wanted.python)),
        ("torch", hello.torch or "none", wanted.torch or "none"),
        ("runtime", hello.runtime, wanted.runtime),
        ("protocol version", str(hello.protocol), str(wanted.protocol)),
    )
    return [
        f"{what} {there} there, but {here} here" for what, there, here in compared if there != here
    ]

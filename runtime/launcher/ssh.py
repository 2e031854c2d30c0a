"""What is said to `ssh`, and what its answers mean: command lines, environment, reasons in one line.

The system's client does the work, so the user's configuration, keys and jump hosts count. There is no
terminal and no question: what a person would be asked is a failure with its reason. The remote login shell
(which may be csh or fish) gets one simple command; `sh` then starts the interpreter. Before that says the
marker line, whatever comes is noise of somebody's start-up files. Secrets are in no command line and no
variable: they follow on standard input, later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from runtime.launcher.plan import Host

LOST = 255
"""ssh's own exit code: the host was not reached, or the connection ended."""

_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_MARKER = "runtime-agent"


@dataclass(frozen=True)
class DialSettings:
    """How hosts are reached, and what must be there. Times are seconds.

    `python`: the interpreter of a host that names none. `workdir`, `pythons` and `paths` must exist on every
    host. `env`: what the interpreter there is started with, so that its workers can be forked from what starts
    first. `timeout_s`: by then all hosts have answered or are named. At most `at_once` hosts are dialled at
    once; with `tree_from` hosts or more, each of the first dials up to `fan_out` others, and so on.
    """

    python: str
    workdir: str
    pythons: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    carrier: Literal["ssh", "srun"] = "ssh"
    ssh_port: int | None = None
    ssh_config: str | None = None
    ssh_args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 30.0
    alive_interval_s: int = 5
    alive_count: int = 3
    at_once: int = 8
    tree_from: int = 32
    fan_out: int = 8

    @property
    def greeting(self) -> dict[str, Any]:
        """What an agent is asked at first."""
        return {
            "op": "greet",
            "workdir": self.workdir,
            "python": list(self.pythons),
            "paths": list(self.paths),
        }


def ssh_argv(host: Host, settings: DialSettings, command: str, connect_s: float) -> list[str]:
    """The local command that runs `command` on `host`; connecting may take `connect_s` seconds."""
    return [*ssh_words(host, settings, connect_s), "--", host.addr or host.name, command]


def ssh_words(host: Host, settings: DialSettings, connect_s: float) -> list[str]:
    """`ssh` and its options.

    ssh takes the first value that it hears: the user's `ssh_args` go before what may be chosen, and after
    what may not.
    """
    fixed = (
        "BatchMode=yes", "ControlMaster=no", "ControlPath=none", "RemoteCommand=none",
        "ClearAllForwardings=yes",
    )  # fmt: skip
    usual = (
        f"ServerAliveInterval={settings.alive_interval_s}",
        f"ServerAliveCountMax={settings.alive_count}",
        f"ConnectTimeout={max(1, int(connect_s))}",
    )
    argv = ["ssh", "-T", *(word for option in fixed for word in ("-o", option))]
    argv += settings.ssh_args
    argv += [word for option in usual for word in ("-o", option)]
    if settings.ssh_config is not None:
        argv += ["-F", settings.ssh_config]
    if (port := host.port or settings.ssh_port) is not None:
        argv += ["-p", str(port)]
    if host.user is not None:
        argv += ["-l", host.user]
    return argv


def remote_command(python: str, code: str, token: str, env: Iterable[tuple[str, str]] = ()) -> str:
    """What the login shell there is given: print the marker with the interpreter's version, run `code`; with
    the variables `env`."""
    import shlex  # one-host launches come here for the records only

    marked = f'import sys; print("{_MARKER} {token}", sys.version.split()[0], flush=True); {code}'
    # sh says "not found" as 127 and "not executable" as 126; other login shells have other numbers.
    given = [f"{name}={value}" for name, value in env]
    start = ["exec", "env", *given] if given else ["exec"]
    run = 'exec "$0" "$@"'
    if python.startswith("~/"):  # the home there
        run, python = 'exec "$HOME/$0" "$@"', python[2:]
    words = (*start, "sh", "-c", run, python, "-c", marked)
    return " ".join(map(shlex.quote, words))


def marked_version(line: bytes, token: str) -> str | None:
    """The interpreter's version, if this is the line with the marker (noise may stand before it)."""
    match = re.search(rf"{_MARKER} {token} (\S+)\s*$", line.decode(errors="replace"))
    return match[1] if match else None


# Environment

_FORWARDED = (
    "PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX",
)  # fmt: skip
_FORWARDED_PREFIXES = (
    "PYTHON", "CUDA", "TORCH", "PYTORCH", "NCCL", "UCX", "GLOO", "HF_", "HUGGINGFACE", "WANDB",
    "MLFLOW", "OMP_", "MKL_", "TOKENIZERS_", "RUNTIME_",
)  # fmt: skip
_OF_THIS_MACHINE = frozenset({"CUDA_VISIBLE_DEVICES"})


def forwarded(env: Mapping[str, str]) -> dict[str, str]:
    """Of this environment, what workers on other hosts get, too. `-x NAME` passes any other on.

    Which devices are visible is each host's own business.
    """
    return {
        name: value
        for name, value in env.items()
        if (name in _FORWARDED or name.startswith(_FORWARDED_PREFIXES))
        and name not in _OF_THIS_MACHINE
    }


# Reasons


class Failure(NamedTuple):
    """Why a host cannot be used, in one line. `unreachable`: we did not even get there."""

    host: str
    reason: str
    unreachable: bool = False


class LastWords(NamedTuple):
    """How ssh (or what it started) ended: its exit code, or the name of a signal; what it said at last."""

    code: int
    signal: str
    stderr: tuple[str, ...]
    noise: str = ""
    """The last line that the host printed before the marker."""


def why(host: str, words: LastWords, python: str, root: str) -> Failure:
    """Why no agent answered on `host`, where `python` was to run the package, which lies in `root` here."""
    last = _last_line(words.stderr)
    if words.signal:
        return Failure(host, f"ssh was ended by {words.signal}", True)
    if words.code == LOST:
        return Failure(host, _of_ssh(host, words.stderr), True)
    if words.code == _NOT_FOUND and "shared librar" not in last:
        return Failure(host, f"has no interpreter {python} (--python, or python= in the host file)")
    if words.code in (_NOT_FOUND, _NOT_EXECUTABLE):
        return Failure(host, f"cannot run its interpreter {python}: {last or 'not executable'}")
    if last.startswith("srun: "):
        return Failure(host, last.removeprefix("srun: ").removeprefix("error: "), True)
    if module := re.search(r"No module named '([\w.]+)'", last):
        where = f": neither in {root} nor installed" if module[1] == "runtime" else ""
        return Failure(host, f"has no package {module[1]}{where} for {python}")
    told = last or (f"it printed {words.noise!r}" if words.noise else "without a word")
    return Failure(host, f"its interpreter {python} ended with exit {words.code}: {told}")


_PATTERNS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one that is known here: another machine answers, or it was set up anew",
    ),
    (
        r"Host key verification failed",
        "its host key is not known here: run `ssh {host}` once, or add it to known_hosts",
    ),
    (
        r"(?P<told>(\S+: )?Permission denied \(.*\))",
        "no key opens it ({told}): use ssh-agent or a key without a passphrase",
    ),
)


_BUSY = r"kex_exchange_identification: |Connection (closed|reset) by "
_OF_A_JUMP = r"kex_exchange_identification: |stdio forwarding failed|.* UNKNOWN port 65535"
"""What ssh says, too, when a jump host is what failed: the line before says why."""


def _of_ssh(host: str, lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    for pattern, reason in _PATTERNS:
        if match := re.search(pattern, text):
            return reason.format(host=host, **match.groupdict())
    telling = [line for line in lines if not re.match(_OF_A_JUMP, line)]
    return _last_line(telling or lines).removeprefix("ssh: ") or "ssh gave up without a word"


def is_busy(failure: Failure) -> bool:
    """Whether the host, or a gateway, may just have too many logins at the moment (`MaxStartups` of its sshd)."""
    return failure.unreachable and re.match(_BUSY, failure.reason) is not None


def _last_line(lines: Sequence[str]) -> str:
    return next((line for line in reversed(lines) if line), "")

"""The table of the launcher's flags: how each is spelt, what its value may be, what it does.

Names are torchrun's first, then DeepSpeed's and mpirun's, then ours. The parser, the environment's
names, the suggestions for misspelt flags and `--help` (`options.py`) are all made from this table.
A flag whose subject is not built yet is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from runtime.job import ENV_NAME, IDENTITY_ENV


class Streams(NamedTuple):
    """Which output streams something applies to: 1 stdout, 2 stderr, 3 both, 0 none."""

    default: int = 0
    by_local_rank: Mapping[int, int] = {}

    def of(self, local_rank: int) -> int:
        """The streams of one worker."""
        return self.by_local_rank.get(local_rank, self.default)


# Values. Each takes the text and returns the value, or raises ValueError with what is allowed.


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text) if text.lstrip("-").isdecimal() and text.isascii() else None
        if value is None or value < low or (high is not None and value > high):
            upper = f" and at most {high}" if high is not None else ""
            raise ValueError(f"must be a whole number of at least {low}{upper}")
        return value

    return convert


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("must be a number of seconds, 0 or more")
    return value


_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _size(text: str) -> int:
    number = text.rstrip("KMGTiB")
    unit = text[len(number) :]
    if not (number.isascii() and number.isdecimal()) or unit not in _UNITS:
        raise ValueError("must be bytes, as a whole number, or with KiB, MiB, GiB or TiB after it")
    return int(number) * _UNITS[unit]


def _text(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("must not be empty")
    return text


def _path(text: str) -> str:
    import os

    return os.path.expanduser(_text(text))  # few shells do that after a "="


def _id(text: str) -> str:
    if not text.isascii() or not all(c.isalnum() or c in "._-" for c in text) or len(text) > 64:
        raise ValueError("must be at most 64 letters, digits, '.', '_' and '-'")
    if not text or text.startswith("."):
        raise ValueError("must not be empty or begin with a dot: it names a folder")
    return text


def _nnodes(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    try:
        bounds = _whole(1)(low), _whole(1)(high if colon else low)
    except ValueError:
        bounds = (0, 0)
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError("must be N or MIN:MAX, whole numbers with 1 <= MIN <= MAX")
    return bounds


def _nproc(text: str) -> int | str:
    if text in ("gpu", "cpu", "auto"):
        return text
    try:
        return _whole(1)(text)
    except ValueError as error:
        raise ValueError(f"{error}, or gpu, cpu or auto") from None


def _streams(text: str) -> Streams:
    allowed = "must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both), or LOCAL_RANK:STREAMS,…"
    if text in ("0", "1", "2", "3"):
        return Streams(int(text))
    chosen: dict[int, int] = {}
    for pair in text.split(","):
        rank, _, streams = pair.partition(":")
        if not (rank.isdecimal() and streams in ("0", "1", "2", "3")) or int(rank) in chosen:
            raise ValueError(allowed)
        chosen[int(rank)] = int(streams)
    return Streams(0, chosen)


def _ranks(text: str) -> frozenset[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError("must be local ranks with commas between, as 0,1")
    return frozenset(map(int, parts))


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(key.strip() and equals for key, equals, _ in pairs):
        raise ValueError("must be KEY=VALUE,KEY=VALUE")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _endpoint(text: str) -> str:
    host, colon, port = text.rpartition(":")
    host = host if colon else text
    if not host or (colon and not (port.isdecimal() and int(port) < 65536)):
        raise ValueError("must be HOST or HOST:PORT")
    return text


def _ifaces(text: str) -> tuple[str, ...]:
    wanted = tuple(word.strip() for word in text.split(","))
    for word in wanted:
        if not word:
            raise ValueError("must be interfaces, networks or addresses with commas between")
        if "/" in word:
            from ipaddress import ip_network

            ip_network(word, strict=False)  # says itself what is wrong
    return wanted


def _port_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) < 65536):
        raise ValueError("must be LOW:HIGH with 1 <= LOW <= HIGH <= 65535")
    return int(low), int(high)


def modules(text: str) -> tuple[str, ...]:
    """Module names with commas between."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(all(part.isidentifier() for part in name.split(".")) for name in names):
        raise ValueError("must be module names with commas between, or none")
    return names


def _command_words(text: str) -> tuple[str, ...]:
    import shlex

    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"must be words as a shell takes them ({error})") from None


def _one_of(*names: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text

    return convert


def _assignment(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    if not ENV_NAME.fullmatch(name):
        raise ValueError("must be NAME or NAME=VALUE")
    if name in IDENTITY_ENV:
        raise ValueError("the launcher sets that variable itself; it cannot be chosen")
    return name, value if equals else None


PREFIX_FIELDS = ("role", "rank", "local_rank", "host", "pid", "time")
"""What a `--log-prefix` may name."""


def _prefix(text: str) -> str:
    from string import Template

    template = Template(text)
    if not template.is_valid() or not set(template.get_identifiers()) <= set(PREFIX_FIELDS):
        names = " ".join(f"${{{name}}}" for name in PREFIX_FIELDS)
        raise ValueError(f"may name only {names} ($$ is a dollar sign)")
    return text


# Flags


class Flag(NamedTuple):
    """One flag. Without `convert` it is a switch, which sets `dest` to `const`."""

    names: str
    help: str
    metavar: str = ""
    convert: Callable[[str], Any] | None = None
    dest: str = ""
    const: Any = True
    many: bool = False

    @property
    def spellings(self) -> list[str]:
        return self.names.split()

    @property
    def long(self) -> list[str]:
        return [name for name in self.spellings if name.startswith("--")]

    @property
    def field(self) -> str:
        return self.dest or self.long[0][2:].replace("-", "_")


GROUPS: dict[str, tuple[Flag, ...]] = {
    "What runs": (
        Flag("-m --module", "the program is a module, as with python -m"),
        Flag("--entry", "a function or a class", "PKG.MOD:OBJ", _text, "entry_text"),
        Flag("--job", "a job of several roles", "FILE", _path, "job_file"),
        Flag("--no-python", "the program is an executable, not a Python script"),
        Flag("--python", "the interpreter of the workers (this one)", "PATH", _path),
        Flag("--workdir", "the directory that workers start in (this one)", "DIR", _path),
    ),
    "How many": (
        Flag("--nproc-per-node --num-gpus", "workers on a host (its slots, else 1)",
             "N|gpu|cpu|auto", _nproc),
        Flag("--nnodes --num-nodes", "hosts, or the fewest and most", "N|MIN:MAX", _nnodes),
        Flag("-n -np --np", "workers in all, instead of --nproc-per-node", "N", _whole(1), "total"),
        Flag("--role", "name of the role (default)", "NAME", _text),
        Flag("--standalone", "one host, with a rendezvous of its own"),
        Flag("--node-rank", "as torchrun's; the launcher starts all hosts itself", "N", _whole(0)),
    ),
    "Where": (
        Flag("--hosts", "hosts with their slots; gpu[01-04]:8 is four", "H1:8,H2:8", _text),
        Flag("-H --hostfile", "one host a line: host slots=8, host:8", "FILE", _path),
        Flag("-i --include", "only these hosts, or these slots of them", "H1@H2:0,2", _text),
        Flag("-e --exclude", "all but these", "H1@H2:0,2", _text),
        Flag("--launcher",
             "local: only this machine; ssh: each by ssh; slurm: by srun, and where there is no allocation submit",
             "local|ssh|slurm", _one_of("local", "ssh", "slurm")),
        Flag("--iface --local-addr",
             "interfaces, networks or addresses that hosts talk by (found by trying)",
             "NAME|CIDR|ADDR,…", _ifaces, "iface"),
        Flag("--connect-timeout", "every host must have answered by then (30)", "SECONDS", _seconds),
        Flag("--sync", "copy this directory's changed files to the hosts first", "DIR", _path),
        Flag("--ssh-port", "port of ssh on the hosts", "PORT", _whole(1, 65535)),
        Flag("--ssh-config", "ssh's configuration file, instead of the user's", "FILE", _path),
        Flag("--ssh-args", "more options of ssh: --ssh-args='-i KEY -J GATE'", "WORDS", _command_words),
        Flag("--slurm-args", "more options of sbatch: --slurm-args='-p gpu -t 4:00:00'", "WORDS",
             _command_words),
    ),
    "Rendezvous": (
        Flag("--rdzv-id --job-id", "id of the job (drawn)", "ID", _id, "job_id"),
        Flag("--master-addr", "address that rank 0 of a role listens on", "ADDR", _text),
        Flag("--master-port", "its port (a free one)", "PORT", _whole(0, 65535)),
        Flag("--port-range", "free ports are looked for here", "LOW:HIGH", _port_range),
        Flag("--rdzv-backend", "as torchrun's; nothing depends on it", "NAME",
             _one_of("c10d", "static", "etcd", "etcd-v2")),
        Flag("--rdzv-endpoint", "as torchrun's; nothing depends on it", "HOST:PORT",
             _endpoint),
        Flag("--rdzv-conf", "as torchrun's; nothing depends on it", "K=V,…", _pairs),
    ),
    "Environment of the workers": (
        Flag("-x --env", "set a variable, or pass this shell's on; repeatable", "NAME[=VALUE]",
             _assignment, many=True),
        Flag("--env-file", "variables from a file of NAME=VALUE lines; repeatable", "FILE", _path,
             "env_files", many=True),
        Flag("--init-process-group", "set up torch.distributed before a script runs"),
        Flag("--preload", "modules imported once, before workers are forked; none; repeatable",
             "MODULE,…", modules, many=True),
        Flag("--start-method", "how workers start (fork)", "fork|spawn", _one_of("fork", "spawn")),
    ),
    "Between processes": (
        Flag("--transport", "calls within a host: by the quickest way (auto), or all by ZeroMQ",
             "auto|zmq", _one_of("auto", "zmq")),
        Flag("--arena", "memory for large buffers between workers of a host, at most (a quarter); 0: none",
             "8GiB|512MiB|…", _size),
    ),
    "Output": (
        Flag("--log-dir", "where the log files go", "DIR", _path),
        Flag("-r --redirects", "streams that go to files only", "0-3|RANK:N,…", _streams),
        Flag("-t --tee", "streams that go to files and the console", "0-3|RANK:N,…", _streams),
        Flag("--local-ranks-filter", "only these local ranks on the console", "0,1", _ranks),
        Flag("--tag-output", "a prefix before each line on the console (default)"),
        Flag("--no-tag-output", "lines as they come", dest="tag_output", const=False),
        Flag("--timestamp --timestamp-output", "the time in the prefix", dest="timestamp"),
        Flag("--log-prefix", "another prefix, of " + " ".join(f"${{{n}}}" for n in PREFIX_FIELDS),
             "TEMPLATE", _prefix),
        Flag("-v --verbose", "say more of what the launcher does", dest="verbosity", const=1, many=True),
        Flag("-q --quiet", "say less", dest="verbosity", const=-1, many=True),
    ),
    "Failures and the end": (
        Flag("--max-restarts", "how often all workers start anew when one fails (0)", "N", _whole(0)),
        Flag("--monitor-interval", "as torchrun's; ends of workers are seen at once", "SECONDS",
             _seconds),
        Flag("--shutdown-timeout", "grace between the request to stop and the kill (10)", "SECONDS",
             _seconds),
        Flag("--timeout", "end the job after so long, with exit code 124", "SECONDS", _seconds),
        Flag("--drain-timeout", "how long a host outlives its workers while a save is written (60)",
             "SECONDS", _seconds),
    ),
    "The launcher itself": (
        Flag("--config", "settings (./runtime.toml, if there)", "FILE", _path, "config_file"),
        Flag("--detach", "leave the job running when the launcher has started it"),
        Flag("--dry-run", "print the plan and start nothing"),
        Flag("--json", "the plan as JSON"),
        Flag("-h --help", "this text"),
    ),
}  # fmt: skip
FLAGS = tuple(flag for group in GROUPS.values() for flag in group)
BY_NAME = {name: flag for flag in FLAGS for name in flag.spellings}

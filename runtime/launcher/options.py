"""The launcher's command line: argv and environment in, one frozen `LaunchOptions` out.

Which flags there are stands in the table of `flags.py`; here they are found on the command line, in
`RUNTIME_<FLAG>` or in `PET_<FLAG>` (in this order of precedence), and checked against each other. `-`
and `_` are alike. What follows the script, or a lone `--`, is the program's and is not looked at.

All mistakes come together in one `ConfigError`. Nothing here reads a file or prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from runtime.errors import ConfigError, nearest
from runtime.job import Entry, parse_entry
from runtime.launcher.flags import BY_NAME, FLAGS, GROUPS, Flag, Streams, modules


@dataclass(frozen=True)
class LaunchOptions:
    """What was asked for on the command line, converted and checked, with defaults filled in.

    Times are seconds. `entry` is None exactly with `job_file` (or `help`). None elsewhere means "not
    said": the plan decides.
    """

    help: bool = False
    entry: Entry | None = None
    job_file: str | None = None
    nnodes: tuple[int, int] | None = None
    nproc_per_node: int | Literal["gpu", "cpu", "auto"] | None = None
    total: int | None = None
    standalone: bool = False
    node_rank: int | None = None
    role: str = "default"
    max_restarts: int = 0
    monitor_interval: float = 0.1
    job_id: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    rdzv_backend: str | None = None
    rdzv_endpoint: str | None = None
    rdzv_conf: Mapping[str, str] = field(default_factory=dict)
    hosts: str | None = None
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    launcher: Literal["local", "ssh", "slurm"] | None = None
    iface: tuple[str, ...] = ()
    connect_timeout: float = 30.0
    sync: str | None = None
    ssh_port: int | None = None
    ssh_config: str | None = None
    ssh_args: tuple[str, ...] = ()
    slurm_args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    env_files: tuple[str, ...] = ()
    log_dir: str | None = None
    redirects: Streams | None = None
    tee: Streams | None = None
    local_ranks_filter: frozenset[int] | None = None
    tag_output: bool = True
    timestamp: bool = False
    log_prefix: str | None = None
    python: str | None = None
    workdir: str | None = None
    preload: tuple[str, ...] | None = None
    start_method: Literal["fork", "spawn"] | None = None
    init_process_group: bool = False
    transport: Literal["auto", "zmq"] = "auto"
    arena: int | None = None
    shutdown_timeout: float = 10.0
    timeout: float | None = None
    drain_timeout: float = 60.0
    port_range: tuple[int, int] | None = None
    config_file: str | None = None
    detach: bool = False
    dry_run: bool = False
    json: bool = False
    verbosity: int = 0


# Parsing


class _Given(NamedTuple):
    """One use of a flag: how it was written, and its text (None for a switch)."""

    flag: Flag
    written: str
    text: str | None


def parse_options(argv: Sequence[str], env: Mapping[str, str]) -> LaunchOptions:
    """Read the command line (without the program's name) and the environment's flags.

    Raises one `ConfigError` with a line for each thing that is wrong.
    """
    problems: list[str] = []
    given, program = _scan(argv, problems)
    if any(use.flag.field == "help" for use in given):
        return LaunchOptions(help=True)
    values = _values(given, problems)
    values |= _from_environment(values, program, env, problems)
    entry = _entry(values, program, problems)
    problems += _contradictions(values)
    if "env" in values:
        values["env"] = _assigned(values["env"], env, problems)
    if values.get("preload") == ("none",):
        values["preload"] = ()
    if problems:
        raise ConfigError("\n".join(problems))
    kept = {k: v for k, v in values.items() if k not in ("module", "no_python", "entry_text")}
    return LaunchOptions(entry=entry, **kept)


def _scan(argv: Sequence[str], problems: list[str]) -> tuple[list[_Given], list[str]]:
    """Split argv into uses of flags and the program's own words."""
    given: list[_Given] = []
    words = list(argv)
    while words:
        if words[0] == "--":
            return given, words[1:]
        if not words[0].startswith("-") or words[0] == "-":
            break
        word = words.pop(0)
        name, attached = _split(word)
        flag = BY_NAME.get(name)
        if flag is None:
            problems.append(f"{word}: unknown option{nearest(name, BY_NAME)}; --help lists all")
        elif flag.convert is None:
            given += _switches(flag, name, attached, problems)
        elif attached is not None:
            given.append(_Given(flag, name, attached))
        elif not words or words[0] == "--" or _split(words[0])[0] in BY_NAME:
            problems.append(f"{name}: needs a value, {flag.metavar}")
        else:
            given.append(_Given(flag, name, words.pop(0)))
    return given, words


def _split(word: str) -> tuple[str, str | None]:
    """A word of the command line as the name of a flag and the value attached to it."""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        return "--" + name[2:].replace("_", "-"), value if equals else None
    if word in BY_NAME or len(word) <= 2:
        return word, None
    return word[:2], word[2:].removeprefix("=")


def _switches(flag: Flag, name: str, attached: str | None, problems: list[str]) -> list[_Given]:
    """A switch, or a cluster of short ones as -qq."""
    if attached is None:
        return [_Given(flag, name, None)]
    cluster = [BY_NAME.get(f"-{letter}") for letter in attached]
    if name.startswith("--") or any(other is None or other.convert for other in cluster):
        problems.append(f"{name}: takes no value (found {attached!r})")
        return []
    return [_Given(other, name, None) for other in (flag, *cluster) if other is not None]


def _values(given: Sequence[_Given], problems: list[str]) -> dict[str, Any]:
    """The fields that these uses set; a flag that may be repeated gathers, of others the last wins."""
    values: dict[str, Any] = {}
    for flag, written, text in given:
        if flag.convert is None or text is None:
            values[flag.field] = _gathered(flag, values, flag.const)
            continue
        try:
            values[flag.field] = _gathered(flag, values, flag.convert(text))
        except ValueError as error:
            problems.append(f"{written} {text}".rstrip() + f": {error}")
    return values


def _gathered(flag: Flag, values: Mapping[str, Any], value: Any) -> Any:
    if not flag.many:
        return value
    if isinstance(value, int):
        return values.get(flag.field, 0) + value
    # A module list is a tuple already; an assignment is one item.
    items = value if flag.convert is modules else (value,)
    return (*values.get(flag.field, ()), *items)


def _assigned(
    pairs: Sequence[tuple[str, str | None]], env: Mapping[str, str], problems: list[str]
) -> dict[str, str]:
    """What `-x` says; a bare name passes this environment's value on."""
    assigned: dict[str, str] = {}
    for name, value in pairs:
        found = env.get(name) if value is None else value
        if found is None:
            problems.append(f"-x {name}: not set here; give it a value, -x {name}=VALUE")
        else:
            assigned[name] = found
    return assigned


# The environment

_WHAT_RUNS = ("module", "no_python", "entry_text", "job_file")
_EXCLUSIVE = (("include", "exclude"), ("hosts", "hostfile"), ("total", "nproc_per_node"))
_TRUTH = {
    "1": True, "true": True, "yes": True, "on": True,
    "0": False, "false": False, "no": False, "off": False,
}  # fmt: skip


def _from_environment(
    values: Mapping[str, Any], program: Sequence[str], env: Mapping[str, str], problems: list[str]
) -> dict[str, Any]:
    """Fields that the command line left open, from `RUNTIME_<FLAG>`, then `PET_<FLAG>`."""
    settled = set(values)
    for group in _EXCLUSIVE:
        settled |= set(group) if settled & set(group) else set()
    if settled & set(_WHAT_RUNS):
        settled |= set(_WHAT_RUNS)
    elif program:
        settled |= {"entry_text", "job_file"}
    if "job_file" in values:
        settled |= set(_NOT_WITH_JOB)
    # In a worker these two say who it is; they are no wish for a job that it starts itself.
    identity = {"RUNTIME_JOB_ID", "RUNTIME_ROLE"} if "RUNTIME_GLOBAL_RANK" in env else set()
    found: list[_Given] = []
    for flag in FLAGS:
        if flag.field in settled or flag.field == "help":
            continue
        names = [
            p + n[2:].replace("-", "_").upper() for p in ("RUNTIME_", "PET_") for n in flag.long
        ]
        name = next((n for n in names if n not in identity and env.get(n, "").strip()), None)
        if name is not None:
            found += _uses(flag, name, env, problems)
    return _values(found, problems)


def _uses(flag: Flag, name: str, env: Mapping[str, str], problems: list[str]) -> list[_Given]:
    """A variable as uses of its flag."""
    text = env[name].strip()
    if flag.convert is not None:
        words = _words(text) if flag.many else [text]
        if flag.field == "env":
            # RUNTIME_ENV=production is somebody else's: only names that are set are passed on.
            words = [word for word in words if "=" in word or word in env]
        return [_Given(flag, f"{name}:", word) for word in words]
    truth = _TRUTH.get(text.lower())
    if truth is None:
        problems.append(f"{name}: {text}: must be 1 or 0")
        return []
    if truth:
        return [_Given(flag, name, None)]
    return [] if flag.many else [_Given(flag._replace(const=not flag.const), name, None)]


def _words(text: str) -> list[str]:
    import shlex

    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


# What fits together

_NOT_WITH_JOB = {
    "nproc_per_node": "--nproc-per-node",
    "total": "-n",
    "role": "--role",
    "max_restarts": "--max-restarts",
    "init_process_group": "--init-process-group",
}


def _entry(values: Mapping[str, Any], program: list[str], problems: list[str]) -> Entry | None:
    """What is to run, said in one of four ways."""
    ways = [flag for key, flag in _WAYS.items() if key in values]
    if len(ways) > 1:
        problems.append(f"{' and '.join(ways)}: one of them, not both")
        return None
    if "job_file" in values or "entry_text" in values:
        if program:
            problems.append(f"{ways[0]}: takes no program beside it (found {' '.join(program)!r})")
        return None if "job_file" in values else _object(values["entry_text"], problems)
    if not program:
        if not problems:  # else an option that was not understood may have swallowed it
            problems.append(
                "nothing to run: give a script.py, -m MODULE, --entry PKG.MOD:OBJ or --job FILE"
            )
        return None
    target, args = program[0], tuple(program[1:])
    if not target:
        problems.append("the program's name is empty")
    if values.get("no_python"):
        return Entry("program", target, args)
    if not values.get("module"):
        return Entry("script", target, args)
    if not all(part.isidentifier() for part in target.split(".")):
        problems.append(f"-m {target}: must be the dotted name of a module")
    return Entry("module", target, args)


_WAYS = {"module": "-m", "no_python": "--no-python", "entry_text": "--entry", "job_file": "--job"}


def _object(text: str, problems: list[str]) -> Entry | None:
    try:
        entry = parse_entry(text)
    except ConfigError as error:
        problems.append(f"--entry: {error}")
        return None
    if entry.form != "object":
        problems.append(
            f"--entry {text}: must be PKG.MOD:OBJ; scripts and modules go without --entry"
        )
    return entry


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    found = []
    if "job_file" in values:
        found += [
            f"{flag}: says nothing with --job; the file says it for each role"
            for key, flag in _NOT_WITH_JOB.items()
            if key in values
        ]
    if "include" in values and "exclude" in values:
        found.append("--include and --exclude: one of them, not both")
    nnodes = values.get("nnodes", (1, 1))
    if values.get("standalone") and nnodes[1] > 1:
        found.append(f"--standalone: is one host, but --nnodes says {nnodes[1]}")
    if values.get("node_rank", 0) >= nnodes[1]:
        found.append(f"--node-rank {values['node_rank']}: must be less than --nnodes ({nnodes[1]})")
    if "log_prefix" in values and not values.get("tag_output", True):
        found.append("--log-prefix and --no-tag-output: one of them, not both")
    if values.get("json") and not values.get("dry_run"):
        found.append("--json: prints the plan, so it goes with --dry-run")
    if values.get("no_python") and (values.get("init_process_group") or "python" in values):
        found.append(
            "--no-python: no interpreter is involved, so neither --python nor "
            "--init-process-group can be given"
        )
    preload = values.get("preload", ())
    if "none" in preload and len(preload) > 1:
        found.append("--preload none: goes with no other module")
    return found


# Help

_USAGE = """\
usage: python -m runtime.launch [options] script.py [its arguments]
       python -m runtime.launch [options] -m pkg.mod [its arguments]
       python -m runtime.launch [options] --entry pkg.mod:function_or_class
       python -m runtime.launch [options] --job job.toml

Starts the workers of a job, watches them, and exits as they did. Options end
where the program begins. Each option is also read from RUNTIME_<OPTION>, then
from PET_<OPTION>; - and _ are alike.
"""


def help_text(width: int = 100) -> str:
    """What `--help` prints, for a terminal of `width` columns."""
    import textwrap

    width = max(60, width)
    indent = 30
    lines = [_USAGE.rstrip()]
    for title, flags in GROUPS.items():
        lines += ["", f"{title}:"]
        for flag in flags:
            head = f"  {', '.join(flag.spellings)} {flag.metavar}".rstrip()
            text = textwrap.wrap(flag.help, width - indent, break_long_words=False)
            if len(head) < indent:
                head, text = f"{head:<{indent}}{text[0]}", text[1:]
            lines += [head, *(" " * indent + line for line in text)]
    return "\n".join(lines) + "\n"

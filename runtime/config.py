"""Settings: frozen records, filled from a file and the environment.

Precedence, low to high: default, file, environment, argument. The file is `--config`, else
`RUNTIME_CONFIG`, else `./runtime.toml` if there is one; the variables are `RUNTIME_<SECTION>_<KEY>`.
Besides the launcher, this is the only module that reads the environment. An unknown key, or a value
that is not allowed, is a `ConfigError` that names file and key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.errors import ConfigError, nearest

DEFAULT_FILE = "runtime.toml"


@dataclass(frozen=True)
class Coordinator:
    """How the control plane tells the living from the dead. Milliseconds."""

    heartbeat_interval_ms: int = 1000
    heartbeat_timeout_ms: int = 30_000


@dataclass(frozen=True)
class Checkpoint:
    """Defaults of a `CheckpointManager`: save every n steps, keep the newest n, compress or not."""

    interval_steps: int = 1000
    keep_last_n: int = 5
    compression: str = "none"


@dataclass(frozen=True)
class LogSpec:
    """Which records are written: those of at least `level`, by logger name where `modules` says so."""

    level: int = 30
    modules: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Config:
    """All settings of a process. `source` is the file that they were read from, or ""."""

    coordinator: Coordinator = field(default_factory=Coordinator)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: LogSpec = field(default_factory=LogSpec)
    source: str = ""

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Config:
        """What the file says, over the defaults, below the environment. Raises `ConfigError`."""
        name = os.fspath(path)
        return load_config(_read(name), name, os.environ)

    def louder(self, steps: int) -> Config:
        """The same with the general log level `steps` lower (of `-v`), or higher if negative (of `-q`)."""
        level = min(50, max(10, self.log.level - 10 * steps))
        return replace(self, log=replace(self.log, level=level))


def read_config(path: str | None = None, env: Mapping[str, str] | None = None) -> Config:
    """The settings of this process: of the file `path`, else that of `RUNTIME_CONFIG`, else of
    `./runtime.toml` if there is one. Raises `ConfigError`."""
    env = os.environ if env is None else env
    name = path or env.get("RUNTIME_CONFIG") or ""
    if not name and not os.path.exists(DEFAULT_FILE):
        return load_config("", "", env)
    return load_config(_read(name or DEFAULT_FILE), name or DEFAULT_FILE, env)


def own_rank() -> int:
    """The rank of this process, as its launcher set it: `RANK`, else mpirun's or srun's; 0 outside of a job.
    Raises `ConfigError`."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        text = os.environ.get(name, "").strip()
        if text.isascii() and text.isdecimal():
            return int(text)
        if text:
            raise ConfigError(f"{name}={text!r} in the environment: must be a whole number from 0")
    return 0


def _read(name: str) -> str:
    try:
        with open(name, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"config file {name}: {reason}") from None


# What each key may hold. A converter takes what TOML gave, or a variable's text.


class _Variable(str):
    """Text of a variable: unlike a file's, it may mean a number."""

    __slots__ = ()


def _at_least(low: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, _Variable) and value.isdecimal():
            value = int(value)
        if type(value) is not int or value < low:
            raise ValueError(f"must be a whole number of at least {low}")
        return value

    return convert


def _one_of(*names: str) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return str(value)

    return convert


_SECTIONS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "coordinator": {
        "heartbeat_interval_ms": _at_least(1),
        "heartbeat_timeout_ms": _at_least(1),
    },
    "checkpoint": {
        "interval_steps": _at_least(1),
        "keep_last_n": _at_least(1),
        "compression": _one_of("none", "gzip", "zstd", "lz4"),
    },
}


def load_config(document: str, source: str, env: Mapping[str, str]) -> Config:
    """Settings from a file's text and an environment. Raises one `ConfigError` for all mistakes."""
    import tomllib  # only a process that reads settings needs it

    try:
        tables = tomllib.loads(document)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: this is not TOML: {error}") from None
    problems: list[str] = []
    values: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for section, table in tables.items():
        _take_section(section, table, source, values, problems)
    for section, keys in _SECTIONS.items():
        for key in keys:
            name = f"RUNTIME_{section}_{key}".upper()
            if env.get(name, "").strip():
                text = _Variable(env[name].strip())
                _take(keys[key], text, name, (values[section], key), problems)
    config = Config(
        Coordinator(**values["coordinator"]), Checkpoint(**values["checkpoint"]), source=source
    )
    problems += _contradictions(config)
    try:
        config = replace(config, log=parse_log_spec(env.get("RUNTIME_LOG", "")))
    except ConfigError as error:
        problems.append(error.reason)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _take_section(
    section: str,
    table: Any,
    source: str,
    values: dict[str, dict[str, Any]],
    problems: list[str],
) -> None:
    if section not in _SECTIONS:
        allowed = ", ".join(f"[{name}]" for name in _SECTIONS)
        problems.append(
            f"{source}: {section}: unknown section{nearest(section, _SECTIONS)}; "
            f"allowed are {allowed}"
        )
    elif not isinstance(table, dict):
        problems.append(f"{source}: {section}: must be a section, [{section}]")
    else:
        keys = _SECTIONS[section]
        for key, value in table.items():
            if key not in keys:
                problems.append(
                    f"{source}: [{section}] {key}: unknown key{nearest(key, keys)}; "
                    f"allowed are {', '.join(keys)}"
                )
            else:
                where = f"{source}: [{section}] {key}"
                _take(keys[key], value, where, (values[section], key), problems)


def _take(
    convert: Callable[[Any], Any],
    value: Any,
    where: str,
    target: tuple[dict[str, Any], str],
    problems: list[str],
) -> None:
    try:
        target[0][target[1]] = convert(value)
    except ValueError as error:
        problems.append(f"{where} = {value!r}: {error}")


def _contradictions(config: Config) -> list[str]:
    times = config.coordinator
    if times.heartbeat_timeout_ms >= 2 * times.heartbeat_interval_ms:
        return []
    return [
        f"{config.source or 'settings'}: [coordinator] heartbeat_timeout_ms = "
        f"{times.heartbeat_timeout_ms}: must be at least twice heartbeat_interval_ms "
        f"({times.heartbeat_interval_ms}), else one late heartbeat is a death"
    ]


# RUNTIME_LOG

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "warn": 30, "error": 40, "critical": 50}


def parse_log_spec(text: str) -> LogSpec:
    """Read "info,runtime.control=debug": a level for all, and levels by module. "" is warning.

    A module may leave the package's name out: "control" is "runtime.control". Raises `ConfigError`.
    """
    level = LogSpec().level
    modules: dict[str, int] = {}
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        name, equals, word = part.rpartition("=")
        found = _LEVELS.get(word.strip().lower())
        name = name.strip()
        if found is None or (equals and not name):
            allowed = ", ".join(name for name in _LEVELS if name != "warn")
            raise ConfigError(
                f"RUNTIME_LOG={text!r}: {part!r} is not LEVEL or MODULE=LEVEL; levels are {allowed}"
            )
        if not equals:
            level = found
        else:
            modules[name if name.partition(".")[0] == "runtime" else f"runtime.{name}"] = found
    return LogSpec(level, tuple(modules.items()))

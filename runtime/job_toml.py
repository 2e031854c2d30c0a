"""A `JobSpec` read from a `job.toml`, and written as one.

Says what each key may hold; whether the numbers fit each other is `job.validate`'s business. All
mistakes of a file come together in one `ConfigError`, each naming its key, what stands there and
what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args

from runtime.errors import ConfigError, nearest
from runtime.job import (
    ENTRY_FORMS,
    Entry,
    JobSpec,
    Kind,
    Policy,
    Resource,
    Restart,
    RoleSpec,
    job_problems,
    parse_entry,
    raise_together,
    role_problems,
)

# Reading. A converter returns the value or raises ValueError with what is allowed.

_Convert = Callable[[Any], Any]


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("must be a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("must be a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be text in quotes")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


def _numbers(value: Any) -> dict[str, float]:
    return {name: _number(amount) for name, amount in _table(value).items()}


def _one_of(kind: Any) -> _Convert:
    names = get_args(kind)

    def convert(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return convert


def _env(value: Any) -> dict[str, str]:
    bad = [name for name, text in _table(value).items() if not isinstance(text, str)]
    if bad:
        raise ValueError(f"values must be text in quotes ({', '.join(bad)})")
    return dict(value)


def _names(value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        raise ValueError("must be a list of names")
    return () if given == ["none"] else tuple(given)


def _nnodes(value: Any) -> tuple[int, int]:
    low, colon, high = str(value).partition(":")
    if isinstance(value, bool) or not low.isdecimal() or (colon and not high.isdecimal()):
        raise ValueError('must be a whole number or "MIN:MAX"')
    return int(low), int(high or low)


def _entry(value: Any) -> Entry:
    try:
        return parse_entry(_text(value))
    except ConfigError as error:
        raise ValueError(error.reason) from None


def _collocation(value: Any) -> tuple[frozenset[str], ...]:
    if not isinstance(value, list) or not all(isinstance(names, list) for names in value):
        raise ValueError('must be a list of lists of roles, as [["actor", "rollout"]]')
    return tuple(frozenset(_names(names)) for names in value)


_JOB_KEYS: dict[str, _Convert] = {
    "name": _text,
    "node_num": _whole,
    "device_per_node": _whole,
    "device_type": _one_of(Literal["CPU", "GPU"]),
    "dl_type": _one_of(Literal["PRE", "SFT", "RL", "MULTIMODAL"]),
    "stream_type": _one_of(Literal["task", "data"]),
    "collocation": _collocation,
    "config": _table,
    "global_env": _env,
    "roles": _table,
}
_ROLE_KEYS: dict[str, _Convert] = {
    "entry": _entry,
    "kind": _one_of(Kind),
    "total": _whole,
    "per_group": _whole,
    "driver": _truth,
    "env": _env,
    "resource": _table,
    "restart": _table,
    "nnodes": _nnodes,
    "nproc_per_node": _whole,
    "python": _text,
    "workdir": _text,
    "preload": _names,
    "start_method": _one_of(Literal["fork", "spawn"]),
    "comm_auto_setup_process_group": _truth,
    "comm_pre_check": _truth,
    "init_process_group": _truth,
    "group": _text,
}
_RESTART_KEYS: dict[str, _Convert] = {"policy": _one_of(Policy), "max": _whole}
_RESOURCE_KEYS: dict[str, _Convert] = {
    "cpu": _number,
    "memory": _number,
    "disk": _number,
    "accelerator": _number,
    "extra": _numbers,
}


def job_from_toml(text: str, source: str = "job.toml") -> JobSpec:
    """Read a `job.toml`. `source` is how messages call it, and where the job's default name is from.

    Raises one `ConfigError` with a line for every mistake: unknown keys, wrong types, missing
    entries, and what `validate` finds.
    """
    import tomllib

    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: this is not TOML: {error}") from None
    problems: list[str] = []
    values = _read(document, "", _JOB_KEYS, problems)
    roles: dict[str, RoleSpec] = {}
    doubtful: set[str] = set()
    for name, table in values.pop("roles", {}).items():
        before = len(problems)
        roles[name] = _role_from_toml(name, table, problems)
        if len(problems) > before:
            doubtful.add(name)
        else:
            problems += role_problems(roles[name])
    name = values.pop("name", source.rpartition("/")[2].removesuffix(".toml") or "job")
    collocations = values.pop("collocation", ())
    job = JobSpec(name, roles, collocations, **values)
    if roles or "roles" not in document:
        problems += job_problems(job, frozenset(doubtful))
    raise_together(problems, source)
    return job


def _read(
    table: Mapping[str, Any], where: str, keys: Mapping[str, _Convert], problems: list[str]
) -> dict[str, Any]:
    """The table's values converted; what is wrong goes to `problems`, and is left out."""
    values = {}
    for key, value in table.items():
        if key not in keys:
            problems.append(
                f"{where}{key}: unknown key{nearest(key, keys)}; allowed are {', '.join(keys)}"
            )
            continue
        try:
            values[key] = keys[key](value)
        except ValueError as error:
            problems.append(f"{where}{key} = {_shown(value)}: {error}")
    return values


def _shown(value: Any) -> str:
    try:
        text = _toml_value(value)
    except ConfigError:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _role_from_toml(name: str, table: Any, problems: list[str]) -> RoleSpec:
    where = f"roles.{name}."
    if not isinstance(table, dict):
        problems.append(f"roles.{name} = {_shown(table)}: must be a table, [roles.{name}]")
        table = {"entry": "unknown:unknown"}
    values = _read(table, where, _ROLE_KEYS, problems)
    if "entry" not in table:
        problems.append(f"{where}entry is missing: say {ENTRY_FORMS}")
    kind: Kind = values.pop("kind", "simple")
    entry = values.pop("entry", Entry("object", "unknown:unknown"))
    restart = _read(values.pop("restart", {}), f"{where}restart.", _RESTART_KEYS, problems)
    restart.setdefault("policy", "gang" if kind == "elastic" else "one")
    resource = _read(values.pop("resource", {}), f"{where}resource.", _RESOURCE_KEYS, problems)
    if kind == "elastic" and "total" not in values and "nproc_per_node" in values:
        values["total"] = values["nproc_per_node"] * values.get("nnodes", (1, 1))[1]
    return RoleSpec(
        name, kind, entry, restart=Restart(**restart), resource=Resource(**resource), **values
    )


# Writing


def job_to_toml(job: JobSpec) -> str:
    """The job as a file. Raises `ConfigError` for what TOML cannot say."""
    lines = [f"name = {_toml_value(job.name)}"]
    for key in ("node_num", "device_per_node", "device_type", "dl_type", "stream_type"):
        if (value := getattr(job, key)) is not None:
            lines.append(f"{key} = {_toml_value(value)}")
    if job.collocations:
        lines.append(f"collocation = {_toml_value([sorted(names) for names in job.collocations])}")
    for key in ("config", "global_env"):
        lines += ["", f"[{key}]"]
        lines += [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in getattr(job, key).items()]
    for role in job.roles.values():
        lines += ["", f"[roles.{_toml_key(role.name)}]"]
        lines += [f"{key} = {_toml_value(value)}" for key, value in _role_values(role).items()]
    return "\n".join(lines) + "\n"


def _role_values(role: RoleSpec) -> dict[str, Any]:
    """What a job.toml says about `role`: the needed keys, and those that differ from the default."""
    if role.entry.form == "program":
        raise ConfigError(
            f"role {role.name}: a job.toml has no notation for programs (--no-python)"
        )
    plain = RoleSpec(role.name, role.kind, role.entry)
    values = {"entry": str(role.entry), "kind": role.kind, "total": role.total}
    for item in fields(role):
        value = getattr(role, item.name)
        if (
            item.name in _ROLE_KEYS
            and item.name not in values
            and value != getattr(plain, item.name)
        ):
            values[item.name] = value
    values["restart"] = {"policy": role.restart.policy, "max": role.restart.max}
    if "nnodes" in values:
        values["nnodes"] = f"{role.nnodes[0]}:{role.nnodes[1]}"
    if role.resource != plain.resource:
        kept = {item.name: getattr(role.resource, item.name) for item in fields(role.resource)}
        values["resource"] = {key: value for key, value in kept.items() if value}
    return values


def _toml_key(key: Any) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", str(key)) else _toml_value(str(key))


def _toml_value(value: Any) -> str:
    import json

    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's notation is TOML's, apart from DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise ConfigError(f"TOML has no notation for {value!r} ({type(value).__name__})")

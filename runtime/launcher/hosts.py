"""Which hosts: `--hosts`, host files in three dialects, `--include` and `--exclude`.

All of them are text in, `Host` records out; reading the file is the caller's business. A name may be a
range as Slurm writes it (`gpu[01-04,07]`), an address (IPv6 in brackets) or localhost. What is wrong is
a `ConfigError` with the file and line, or the flag; all wrong lines of a file come together.

    worker-0 slots=8  # DeepSpeed, Open MPI       worker-2:8      # MPICH
    user@worker-3 slots=8 port=2222 addr=10.0.0.3 python=/opt/venv/bin/python role=rollout
    gpu[01-04,07] slots=8                         [fe80::1%ib0]:8
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from runtime.errors import ConfigError, nearest
from runtime.launcher.plan import Host

MAX_HOSTS = 16_384
"""More in one list is taken for a mistyped range."""

# Patterns are compiled when first used (and kept by `re`): most launches name no host.
_NAME = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_IPV6 = r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9_.-]+)?"
_WORD = (
    r"((?P<user>[^@:\[\]]+)@)?"
    r"(?P<name>\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[^\]]*)?\]|([^:\[\]]|\[[^\]:]*\])+)"
    r"(:(?P<slots>.*))?"
)
_RANGE = r"\[([^\]]*)\]"
_OUTSIDE_BRACKETS = r"(?![^\[]*\])"
_ALLOWED = "allowed are HOST, HOST:SLOTS and USER@HOST, with ranges as gpu[01-04,07]"


def parse_hosts(text: str, source: str = "--hosts") -> tuple[Host, ...]:
    """Read a list of hosts on one line: "h1:8,h2:8", "gpu[01-04]:8", "[fe80::1%ib0]:8,user@h2".

    `source` is how messages call the text. Raises `ConfigError`.
    """
    hosts: list[Host] = []
    words = [word.strip() for word in re.split("," + _OUTSIDE_BRACKETS, text)]
    seen: dict[str, int] = {}
    for number, word in enumerate(words, 1):
        try:
            if not word:
                raise ValueError("an empty name")
            found = _hosts_of_word(word)
        except ValueError as error:
            raise ConfigError(f"{source} {text!r}: {error}; {_ALLOWED}") from None
        for host in found:
            if host.name in seen:
                first = seen[host.name]
                raise ConfigError(
                    f"{source} {text!r}: {host.name} is named twice (items {first} and {number})"
                )
            seen[host.name] = number
        hosts += found
    _bounded(hosts, source)
    return tuple(hosts)


def parse_hostfile(text: str, source: str) -> tuple[Host, ...]:
    """Read a host file. Raises one `ConfigError` with file and line of everything that is wrong."""
    problems: list[str] = []
    hosts: list[Host] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if not words:
            continue
        try:
            found = _hosts_of_line(words)
        except ValueError as error:
            problems.append(f"{source}:{number}: {error} (in {line.strip()!r})")
            continue
        for host in found:
            if host.name in lines:
                problems.append(
                    f"{source}:{number}: {host.name} is named twice; first on line {lines[host.name]}"
                )
            lines.setdefault(host.name, number)
        hosts += found
    if not hosts and not problems:
        problems.append(f"{source}: no host in it; one host a line is needed, as: worker-0 slots=8")
    if problems:
        raise ConfigError("\n".join(problems))
    _bounded(hosts, source)
    return tuple(hosts)


def _bounded(hosts: Sequence[Host], source: str) -> None:
    if len(hosts) > MAX_HOSTS:
        raise ConfigError(f"{source}: {len(hosts)} hosts, but at most {MAX_HOSTS} are allowed")


def _hosts_of_word(word: str) -> list[Host]:
    """ "[user@]name[:slots]", the name maybe a range."""
    match = re.fullmatch(_WORD, word)
    if match is None:
        raise ValueError(f"{word!r} is no host")
    slots = _positive("slots", match["slots"]) if match["slots"] is not None else None
    name = match["name"]
    if name.startswith("[") and re.fullmatch(_IPV6, name[1:-1]):
        return [Host(name[1:-1], slots, user=match["user"])]
    names = expand_range(name)
    bad = next((name for name in names if not re.fullmatch(_NAME, name)), None)
    if bad is not None:
        raise ValueError(f"{bad!r} is no host name")
    return [Host(name, slots, user=match["user"]) for name in names]


def expand_range(text: str) -> list[str]:
    """Slurm's ranges: "gpu[01-03,07]" is gpu01, gpu02, gpu03, gpu07. Raises ValueError."""
    match = re.search(_RANGE, text)
    if match is None:
        return [text]
    before, after = text[: match.start()], expand_range(text[match.end() :])
    names: list[str] = []
    for part in match[1].split(","):
        low, dash, high = part.strip().partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
            raise ValueError(f"[{match[1]}] is no range")
        if (int(high) - int(low) + 1) * len(after) > MAX_HOSTS:
            raise ValueError(f"[{match[1]}] is more than {MAX_HOSTS} hosts")
        numbers = (str(number).zfill(len(low)) for number in range(int(low), int(high) + 1))
        names += [f"{before}{number}{rest}" for number in numbers for rest in after]
    return names


def _positive(key: str, text: str) -> int:
    if not (text.isdecimal() and text.isascii() and int(text) >= 1):
        raise ValueError(f"{key} must be a whole number of at least 1, not {text!r}")
    return int(text)


def _port(key: str, text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise ValueError(f"{key} must be from 1 to 65535, not {text!r}")
    return int(text)


def _address(key: str, text: str) -> str:
    if not re.fullmatch(f"{_NAME}|{_IPV6}", text):
        raise ValueError(f"{key} must be a host name or an address, not {text!r}")
    return text


def _word(key: str, text: str) -> str:
    if not text:
        raise ValueError(f"{key} is empty")
    return text


_KEYS: Mapping[str, Callable[[str, str], Any]] = {
    "slots": _positive,
    "max_slots": _positive,
    "port": _port,
    "addr": _address,
    "python": _word,
    "role": _word,
}


def _hosts_of_line(words: Sequence[str]) -> list[Host]:
    """One line of a host file, without its comment."""
    hosts = _hosts_of_word(words[0])
    values: dict[str, Any] = {}
    for word in words[1:]:
        key, equals, text = word.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in _KEYS:
            raise ValueError(f"{word!r}{nearest(key, _KEYS)}: allowed are {'=, '.join(_KEYS)}=")
        if key in values or (key == "slots" and hosts[0].slots is not None):
            raise ValueError(f"{key} is said twice")
        values[key] = _KEYS[key](key, text)
    if "addr" in values and len(hosts) > 1:
        raise ValueError("addr= cannot be one address for several hosts")
    # max_slots is Open MPI's limit on oversubscribing; a plan never puts more than slots on a host.
    values.pop("max_slots", None)
    return [replace(host, **values) for host in hosts]


# Selection


def select_hosts(
    hosts: Sequence[Host], include: str | None = None, exclude: str | None = None
) -> tuple[Host, ...]:
    """Apply `--include` or else `--exclude`: "h1@h2:0,2" is all of h1, and slots 0 and 2 of h2.

    A host of which only some slots are left has them in `devices`. Raises `ConfigError`.
    """
    if include is not None:
        chosen = _selection(include, hosts, "--include")
        picked = [_only(host, chosen[host.name]) for host in hosts if host.name in chosen]
    elif exclude is not None:
        chosen = _selection(exclude, hosts, "--exclude")
        picked = [left for host in hosts if (left := _without(host, chosen, exclude)) is not None]
    else:
        return tuple(hosts)
    if not picked:
        raise ConfigError(f"--exclude {exclude}: no host is left")
    return tuple(picked)


def _selection(text: str, hosts: Sequence[Host], flag: str) -> dict[str, frozenset[int] | None]:
    """By host, the slots named; None is all of it."""
    known = {host.name: host for host in hosts}
    chosen: dict[str, frozenset[int] | None] = {}
    for item in re.split("@" + _OUTSIDE_BRACKETS, text.strip()):
        try:
            names, slots = _selected(item)
        except ValueError:
            raise ConfigError(
                f"{flag} {text}: {item!r} is not HOST or HOST:SLOT,SLOT (as h1@h2:0,2)"
            ) from None
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{flag} {text}: no host is called {name!r}{nearest(name, known)}; "
                    f"the hosts are {', '.join(known)}"
                )
            if name in chosen:
                raise ConfigError(f"{flag} {text}: {name} is named twice")
            _check_slots(known[name], slots, f"{flag} {text}")
            chosen[name] = slots
    return chosen


def _selected(item: str) -> tuple[list[str], frozenset[int] | None]:
    """ "h2:0,2" as names and slots; ValueError if it is not of that form."""
    match = re.fullmatch(r"(?P<name>\[[^\]]*:[^\]]*\]|[^:]+)(:(?P<slots>\d+(,\d+)*))?", item)
    if match is None:
        raise ValueError(item)
    name = match["name"]
    names = [name[1:-1]] if ":" in name else expand_range(name)
    if not all(re.fullmatch(f"{_NAME}|{_IPV6}", name) for name in names):
        raise ValueError(item)
    return names, frozenset(map(int, match["slots"].split(","))) if match["slots"] else None


def _check_slots(host: Host, slots: frozenset[int] | None, where: str) -> None:
    if slots is None or host.slots is None:
        return
    if beyond := sorted(slot for slot in slots if slot >= host.slots):
        raise ConfigError(
            f"{where}: {host.name} has no slot {beyond[0]}; it has 0 to {host.slots - 1}"
        )


def _only(host: Host, slots: frozenset[int] | None) -> Host:
    if slots is None:
        return host
    return replace(host, slots=len(slots), devices=tuple(sorted(slots)))


def _without(
    host: Host, chosen: Mapping[str, frozenset[int] | None], text: str | None
) -> Host | None:
    if host.name not in chosen:
        return host
    slots = chosen[host.name]
    if slots is None:
        return None
    if host.slots is None:
        raise ConfigError(
            f"--exclude {text}: how many slots {host.name} has is not known; say slots="
        )
    left = frozenset(range(host.slots)) - slots
    return _only(host, left) if left else None


# This machine

_LOOPBACK = frozenset({"localhost", "localhost.localdomain", "ip6-localhost", "::1"})


def is_local(name: str, own_names: Iterable[str]) -> bool:
    """Whether `name` is this machine. `own_names`: its host names and addresses; a name without its
    domain counts, too."""
    wanted = name.lower()
    if wanted in _LOOPBACK or re.fullmatch(r"127(\.\d+){3}", wanted):
        return True
    own = {other.lower() for other in own_names}
    return wanted in own or wanted in {
        other.partition(".")[0] for other in own if not _is_address(other)
    }


def _is_address(name: str) -> bool:
    return ":" in name or re.fullmatch(r"\d+(\.\d+){3}", name) is not None


def mark_local(hosts: Sequence[Host], own_names: Iterable[str]) -> tuple[Host, ...]:
    """The hosts with `local` set. Two names of this machine are a `ConfigError`."""
    own = tuple(own_names)
    marked = tuple(
        replace(
            host,
            local=is_local(host.name, own) or (host.addr is not None and is_local(host.addr, own)),
        )
        for host in hosts
    )
    here = [host.name for host in marked if host.local]
    if len(here) > 1:
        raise ConfigError(f"hosts {' and '.join(here)} are both this machine: name it once")
    return marked

"""Which instance of which role goes to which host.

Elastic roles come first and fill hosts in their order, so that ranks of one host are neighbours. Simple
roles go, a group at a time, to the first host with free slots, else to the least crowded one of those whose
slots are not known, else to the least crowded of all: a slot is no core, and nothing is refused for having few. Members of a group share a host; group i of
collocated roles shares the host of the first of them, and takes no further slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from runtime.errors import ConfigError
from runtime.job import JobSpec, RoleSpec


class Room(NamedTuple):
    """A host as placement sees it. `slots` None: no limit is known. `role`: kept for that role."""

    name: str
    slots: int | None = None
    role: str | None = None

    @staticmethod
    def of_role(rooms: Sequence[Room], role: str) -> list[Room]:
        """The hosts that `role` may use: those kept for it if there are any, else those kept for none."""
        return [r for r in rooms if r.role == role] or [r for r in rooms if r.role is None]


def place(job: JobSpec, rooms: Sequence[Room]) -> dict[str, list[str]]:
    """The host of every rank of every role. Raises `ConfigError` when an elastic role does not fit."""
    used = {room.name: 0 for room in rooms}
    placed: dict[str, list[str]] = {}
    for role in sorted(job.roles.values(), key=lambda role: role.kind != "elastic"):
        allowed = Room.of_role(rooms, role.name)
        if not allowed:
            raise ConfigError(f"role {role.name}: every host is kept for another role")
        leader = _leader(job, role, placed)
        if leader is not None:
            first = job.roles[leader]
            placed[role.name] = _follow(role, placed[leader][:: first.per_group])
            continue
        if role.kind == "elastic":
            placed[role.name] = _fill(role, allowed, used)
        else:
            placed[role.name] = _spread(role, allowed, used)
        for host in placed[role.name]:
            used[host] += 1
    return placed


def _leader(job: JobSpec, role: RoleSpec, placed: Mapping[str, object]) -> str | None:
    """The collocated role that has been placed already."""
    together = next((names for names in job.collocations if role.name in names), frozenset())
    return next((name for name in job.roles if name in together and name in placed), None)


def _follow(role: RoleSpec, hosts: Sequence[str]) -> list[str]:
    return [host for host in hosts for _ in range(role.per_group)]


def _fill(role: RoleSpec, rooms: Sequence[Room], used: Mapping[str, int]) -> list[str]:
    """An elastic role: as many on each of its nodes as it says, or as there is room for."""
    cut = len(rooms) > role.nnodes[1]
    rooms = rooms[: role.nnodes[1]]
    free = [None if r.slots is None else max(0, r.slots - used[r.name]) for r in rooms]
    if role.nproc_per_node is not None:
        counts = [role.nproc_per_node] * len(rooms)
    elif all(slots is None for slots in free):
        counts = _evenly(role, len(rooms))
    else:
        counts = _by_slots(role, [role.total if slots is None else slots for slots in free])
    for room, slots, count in zip(rooms, free, counts, strict=True):
        if slots is not None and count > slots:
            raise ConfigError(
                f"role {role.name}: {count} workers do not fit on {room.name}, which has "
                f"{slots} of {room.slots} slots free"
            )
    if sum(counts) < role.total:
        detail = ", ".join(f"{room.name} {n}" for room, n in zip(rooms, counts, strict=True))
        raise ConfigError(
            f"role {role.name}: total = {role.total}, but the hosts have room for {sum(counts)} ({detail})"
            + (f"; nnodes = {role.nnodes[1]} keeps it off the others" if cut else "")
        )
    return [room.name for room, count in zip(rooms, counts, strict=True) for _ in range(count)]


def _evenly(role: RoleSpec, nodes: int) -> list[int]:
    groups, left = divmod(role.total // role.per_group, nodes)
    return [(groups + (node < left)) * role.per_group for node in range(nodes)]


def _by_slots(role: RoleSpec, free: Sequence[int]) -> list[int]:
    """Fill up host by host, whole groups only."""
    counts, left = [], role.total
    for slots in free:
        counts.append(min(left, slots - slots % role.per_group))
        left -= counts[-1]
    return counts


def _spread(role: RoleSpec, rooms: Sequence[Room], used: Mapping[str, int]) -> list[str]:
    """A simple role: each group where there is room first."""
    taken = dict(used)
    hosts: list[str] = []

    def free(room: Room) -> int:
        return (room.slots or 0) - taken[room.name]

    for _ in range(role.total // role.per_group):
        roomy = next((room for room in rooms if free(room) >= role.per_group), None)
        unknown = [room for room in rooms if room.slots is None]
        room = roomy or max(unknown or rooms, key=free)
        taken[room.name] += role.per_group
        hosts += [room.name] * role.per_group
    return hosts

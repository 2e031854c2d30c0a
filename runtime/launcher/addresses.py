"""Which address of each host the others are to use: what may be tried, who tries whom, and what follows.

An interface that is up says nothing about who can reach it (a docker bridge has the same address on every
host), so addresses are tried (`probe.py`) and this module decides: an address counts when every host that
tried it got through. Of those, the ones that the user's names stand for go first, then private before
public before link-local ones, IPv4 before IPv6; then the network that most hosts share; then the quickest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import NamedTuple

MOST_CANDIDATES = 16
"""So many addresses of one host are tried at most."""

MOST_PARTNERS = 16
"""So many other hosts each host tries at most: what is tried grows with the hosts, not with their square."""

_ALL_TRY = 4  # the first hosts are tried by everyone: the control plane is there
_NAMED = 3  # so many hosts are named in one reason
_MOST_FAILURES = 16  # where hardly anybody reaches anybody, these tell enough


class Candidate(NamedTuple):
    """An address of a host. `preferred`: the user's `addr=`, or what the host's name stands for."""

    address: str
    interface: str = ""
    preferred: bool = False


class Trial(NamedTuple):
    """What host `by` met at an address of `host`: the `seconds` to connect; None: not, for a `reason`."""

    by: str
    host: str
    address: str
    seconds: float | None
    reason: str = ""


@dataclass(frozen=True)
class Chosen:
    """By host name, the address for others and its interface. `accept_from`: where hosts come from.
    `wished`: the user has said which interfaces are to be used."""

    address: Mapping[str, str]
    interface: Mapping[str, str]
    accept_from: tuple[str, ...] = ()
    wished: bool = False

    def variables(self, host: str) -> dict[str, str]:
        """What tells torch's back-ends of it. Gloo would else go by the host's name; NCCL looks for itself
        and may use several interfaces, so only a wish goes before that."""
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")[: 1 + self.wished]
        return dict.fromkeys(names, self.interface[host])


def candidates(
    found: Iterable[tuple[str, str]], named: Collection[str] = (), iface: Sequence[str] = ()
) -> tuple[Candidate, ...]:
    """What to try of a host that has `found`, pairs of (interface, address).

    `named` are addresses that its name stands for; of `iface` (`--iface`: names of interfaces, networks,
    addresses) one must fit, if any is given.
    """
    fitting = [
        Candidate(address, interface, address in named)
        for interface, address in found
        if not iface or any(_fits(interface, address, wanted) for wanted in iface)
    ]
    fitting.sort(key=_kind)
    return tuple(fitting[:MOST_CANDIDATES])


def _fits(interface: str, address: str, wanted: str) -> bool:
    if "/" in wanted:
        return ip_address(address) in ip_network(wanted, strict=False)
    return wanted in (interface, address)


def _kind(candidate: Candidate) -> tuple[bool, int, int]:
    """The best kind is the least."""
    ip = ip_address(candidate.address)
    return not candidate.preferred, 2 if ip.is_link_local else int(ip.is_global), ip.version


def partners(count: int) -> list[tuple[int, ...]]:
    """Whom each of `count` hosts tries: all others, or the first few and its next neighbours."""
    found = []
    for mine in range(count):
        after = [(mine + step) % count for step in range(1, min(count, MOST_PARTNERS + 1))]
        chosen = dict.fromkeys([*(i for i in range(min(count, _ALL_TRY)) if i != mine), *after])
        found.append(tuple(chosen)[:MOST_PARTNERS])
    return found


def choose(
    known: Mapping[str, Sequence[Candidate]], trials: Sequence[Trial]
) -> tuple[dict[str, Candidate], list[tuple[str, str]]]:
    """A candidate for every host; or none, and (host, reason) for what keeps the hosts apart.

    `known`: what was tried, by host. The other hosts follow the first one into its network.
    """
    missed = [trial for trial in trials if trial.seconds is None]
    bad = {(trial.host, trial.address) for trial in missed}
    good = {
        host: _best([each for each in mine if (host, each.address) not in bad])
        for host, mine in known.items()
    }
    if not all(good.values()):
        return {}, _failures(known, missed)
    slowest: dict[tuple[str, str], float] = {}
    for trial in trials:
        key = trial.host, trial.address
        slowest[key] = max(slowest.get(key, 0.0), trial.seconds or 0.0)
    (first, *others), some = good, [*good.values()][1 : MOST_PARTNERS + 1]

    def choice(host: str, among: Sequence[Sequence[Candidate]]) -> Candidate:
        def worth(mine: Candidate) -> tuple[float, float]:
            kinship = sum(max(_kinship(mine, other) for other in theirs) for theirs in among)
            return kinship, -slowest.get((host, mine.address), 0.0)

        return max(good[host], key=worth)

    leading = choice(first, some)
    return {first: leading, **{host: choice(host, [[leading]]) for host in others}}, []


def _best(reached: Sequence[Candidate]) -> list[Candidate]:
    """Those of the best kind. They are in order."""
    return [each for each in reached if _kind(each) == _kind(reached[0])]


def _kinship(one: Candidate, other: Candidate) -> float:
    """How much of two addresses is alike from the left, 0 to 1: more within a network than between."""
    mine, theirs = ip_address(one.address), ip_address(other.address)
    if mine.version != theirs.version:
        return 0.0
    return 1 - (int(mine) ^ int(theirs)).bit_length() / mine.max_prefixlen


# Why not


def _failures(
    known: Mapping[str, Sequence[Candidate]], missed: Sequence[Trial]
) -> list[tuple[str, str]]:
    """Few hosts that explain it all: one that is cut off is named, not everybody who misses it."""
    misses = Counter((trial.by, trial.host) for trial in missed)
    apart = {pair for pair, count in misses.items() if count == len(known[pair[1]])}
    if not apart:  # everybody is reached somewhere, but not all at one address
        return [
            (host, "no address of it is reached by all: " + _why(host, known, missed, who=True))
            for host, mine in known.items()
            if {each.address for each in mine} == {t.address for t in missed if t.host == host}
        ]
    failures: list[tuple[str, str]] = []
    order = {host: number for number, host in enumerate(known)}
    while apart and len(failures) < _MOST_FAILURES:
        counts = Counter(host for pair in apart for host in pair)
        host = max(counts, key=lambda name: (counts[name], order[name]))
        failures.append((host, _apart(host, apart, known, missed)))
        apart = {pair for pair in apart if host not in pair}
    return sorted(failures, key=lambda failure: order[failure[0]])


def _apart(
    host: str,
    apart: Collection[tuple[str, str]],
    known: Mapping[str, Sequence[Candidate]],
    missed: Sequence[Trial],
) -> str:
    order = list(known)
    by = sorted((by for by, other in apart if other == host), key=order.index)
    of = sorted((other for by, other in apart if by == host), key=order.index)
    words = []
    if by:
        mine = [trial for trial in missed if trial.host == host and (trial.by, host) in apart]
        words.append(f"{_names(by)} cannot reach it ({_why(host, known, mine)})")
    if of:
        mine = [trial for trial in missed if trial.by == host]
        where = "" if by else f" ({_why(of[0], known, mine)})"
        words.append(f"it cannot reach {_names(of)}{where}")
    return "; ".join(words)


def _why(
    host: str,
    known: Mapping[str, Sequence[Candidate]],
    missed: Sequence[Trial],
    *,
    who: bool = False,
) -> str:
    """ "10.0.0.3 (eth0): no route to host, 172.17.0.1 (docker0): …"; with `who`, from which hosts."""
    words = []
    for each in known[host]:
        mine = [t for t in missed if (t.host, t.address) == (host, each.address)]
        if mine:
            where = f"{each.address} ({each.interface})" if each.interface else each.address
            where += f" from {_names([t.by for t in mine])}" if who else ""
            words.append(f"{where}: {mine[0].reason}")
    return ", ".join(words)


def _names(hosts: Sequence[str]) -> str:
    more = len(hosts) - _NAMED
    return ", ".join(hosts[:_NAMED]) + (f" and {more} others" if more > 0 else "")

"""The launcher's part in choosing an address for each host: all agents listen, all try, then it is decided.

The first try is short and nearly always enough. Only where it leaves a host without an address, or without
the one that its name stands for, what was not reached is tried again with more patience. Every step has its
time limit, so the whole takes three seconds at worst where all agents answer. Who tries whom and what follows is `addresses.py`'s.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from runtime.errors import WireError
from runtime.launcher.addresses import Candidate, Chosen, Trial, candidates, choose, partners
from runtime.launcher.channel import Kind
from runtime.launcher.link import AgentLink, HostsFailed
from runtime.launcher.ssh import Failure

_PATIENCE_S = (0.3, 1.7)
_REPLY_S = 5.0
_RESOLVE_S = 1.0
_SECRET_BYTES = 32


async def choose_addresses(
    links: Sequence[AgentLink],
    iface: Sequence[str] = (),
    port_range: tuple[int, int] | None = None,
) -> Chosen:
    """The address of each host that all others reach. Nothing else may use the links meanwhile.

    `iface`: names of interfaces, networks or addresses that hosts are to talk by; () is any. `port_range`
    (lowest, highest): where they listen meanwhile. Raises `HostsFailed`: hosts with no address of `--iface`, or none that the others reach.
    """
    survey = _Survey(links, iface, port_range)
    chosen = await survey.run()
    return Chosen(
        {host: candidate.address for host, candidate in chosen.items()},
        {host: candidate.interface for host, candidate in chosen.items()},
        _sources(links),
        wished=bool(iface),
    )


def _sources(links: Iterable[AgentLink]) -> tuple[str, ...]:
    """Every address that a host of the job, or the launcher, may come from."""
    found: dict[str, None] = {}
    for link in links:
        assert link.hello is not None  # else there was no greeting
        found |= dict.fromkeys(address for _, address in link.hello.addresses)
        with suppress(ValueError):  # "", or "UNKNOWN" of an sshd that was reached by a pipe
            found |= dict.fromkeys(filter(ip_address, [link.hello.ssh_client]))
    return tuple(found)


class _Survey:
    def __init__(
        self,
        links: Sequence[AgentLink],
        iface: Sequence[str],
        port_range: tuple[int, int] | None,
    ) -> None:
        self._links = {link.host.name: link for link in links}
        self._iface, self._port_range = iface, port_range
        self._secrets = {host: os.urandom(_SECRET_BYTES) for host in self._links}
        self._known: dict[str, Sequence[Candidate]] = {}
        self._ports: dict[tuple[str, str], int] = {}
        self._trials: dict[tuple[str, str, str], Trial] = {}

    async def run(self) -> dict[str, Candidate]:
        await self._find_candidates()
        if len(self._links) == 1:  # there is nobody to try
            return choose(self._known, ())[0]
        await self._listen()
        for patience in _PATIENCE_S:
            await self._try(patience)
            chosen, failures = choose(self._known, list(self._trials.values()))
            if not failures and all(self._as_named(host, chosen[host]) for host in chosen):
                break
        for link in self._links.values():
            link.channel.send_message(Kind.COMMAND, {"op": "probed"})
        _refuse(failures)
        return chosen

    def _as_named(self, host: str, chosen: Candidate) -> bool:
        """Whether a host got an address that it is named by, if it has one."""
        return chosen.preferred or not any(other.preferred for other in self._known[host])

    async def _find_candidates(self) -> None:
        named = await _all({host: _resolved(link) for host, link in self._links.items()})
        failures = []
        for host, link in self._links.items():
            assert link.hello is not None
            found, iface = link.hello.addresses, self._iface
            self._known[host] = candidates(found, named[host], iface)
            if not self._known[host]:
                has = ", ".join(f"{address} ({name})" for name, address in found) or "none at all"
                wanted = f" of --iface {','.join(iface)}" if iface else ""
                failures.append((host, f"no address{wanted}; it has {has}"))
        _refuse(failures, unreachable=False)

    async def _listen(self) -> None:
        replies = await self._ask(
            {
                host: {
                    "op": "probe",
                    "secret": self._secrets[host],
                    "addresses": [candidate.address for candidate in mine],
                    "ports": self._port_range,
                }
                for host, mine in self._known.items()
            },
            "probing",
            _REPLY_S,
        )
        failures = []
        for host, reply in replies.items():
            self._ports |= {(host, address): port for address, port in reply["opened"].items()}
            self._known[host] = [c for c in self._known[host] if c.address in reply["opened"]]
            if not self._known[host]:
                why = ", ".join(f"{address}: {why}" for address, why in reply["refused"].items())
                failures.append((host, f"cannot listen on any of its addresses ({why})"))
        _refuse(failures)

    async def _try(self, patience: float) -> None:
        """Every host tries those of its partners' addresses that it has not reached yet."""
        hosts = list(self._links)
        reached = {key for key, trial in self._trials.items() if trial.seconds is not None}
        messages = {}
        for by, others in zip(hosts, partners(len(hosts)), strict=True):
            targets = [
                (host, each.address, self._ports[host, each.address], self._secrets[host])
                for host in map(hosts.__getitem__, others)
                for each in self._known[host]
                if (by, host, each.address) not in reached
            ]
            if targets:
                messages[by] = {"op": "try", "targets": targets, "patience": patience}
        replies = await self._ask(messages, "tried", patience + _REPLY_S)
        for by, reply in replies.items():
            for host, address, seconds, reason in reply["trials"]:
                self._trials[by, host, address] = Trial(by, host, address, seconds, reason)

    async def _ask(
        self, messages: Mapping[str, dict[str, Any]], event: str, patience: float
    ) -> dict[str, Mapping[str, Any]]:
        """The reply of every host that got a message."""
        for host, message in messages.items():
            self._links[host].channel.send_message(Kind.COMMAND, message)
        replies = await _all(
            {host: _reply(self._links[host], event, patience) for host in messages}
        )
        _refuse([(host, reply) for host, reply in replies.items() if isinstance(reply, str)])
        return {host: reply for host, reply in replies.items() if not isinstance(reply, str)}


async def _reply(link: AgentLink, event: str, patience: float) -> Mapping[str, Any] | str:
    """What the agent answers; or why it does not."""
    try:
        async with asyncio.timeout(patience):
            while (frame := await link.channel.receive()) is not None:
                if frame.kind is Kind.EVENT and (message := frame.message()).get("event") == event:
                    return message
    except TimeoutError:
        return f"its agent gave no answer within {patience:g} s{link.via}"
    except WireError as error:
        return str(error)
    return f"its agent ended: {link.last_words()}"


async def _resolved(link: AgentLink) -> frozenset[str]:
    """The addresses that the host's `addr=`, or else its name, stands for here."""
    loop = asyncio.get_running_loop()
    with suppress(OSError, UnicodeError, TimeoutError):  # an alias of ssh, or a resolver that hangs
        async with asyncio.timeout(_RESOLVE_S):
            found = await loop.getaddrinfo(link.host.addr or link.host.name, None)
            return frozenset(str(where[0]) for *_, where in found)
    return frozenset()


async def _all(work: Mapping[str, Awaitable[Any]]) -> dict[str, Any]:
    """Await all at once; by key."""
    return dict(zip(work, await asyncio.gather(*work.values()), strict=True))


def _refuse(failures: Sequence[tuple[str, str]], *, unreachable: bool = True) -> None:
    if failures:
        raise HostsFailed.of([Failure(host, reason, unreachable) for host, reason in failures])

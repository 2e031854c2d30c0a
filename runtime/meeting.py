"""How the ranks of somebody else's job find each other: once, at torch's own store, before there is any node.

A store outlives the ranks that meet there (torchrun's survives restarts), so a key that was read may be of
processes long dead; and a restart has no number that all ranks know: torchrun counts for each node by itself. Hence
each rank writes its record, with a token of its own, over what stands there; rank 0 answers each token it finds under
that token; who is alive then says so under the token of rank 0, which is the name of the round. Nothing else is ever
read under a name that an earlier round could have used.

Only public keys and addresses go through the store: it is as open as torch leaves it.
"""

from __future__ import annotations

import importlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from runtime.errors import RendezvousError
from runtime.launcher.torchrun import Outer

T = TypeVar("T")

_POLL_S = 0.02
_SLOW_POLL_S = 0.25
_PROBE_S = 1.0
_CONNECT_S = 20.0
"""Torch looks up the names of addresses, which a resolver that does not answer makes slow."""
_VERDICT_S = 3.0
_SHOWN = 16


class Meeting:
    """One round of all ranks. Every wait ends by `timeout` seconds after the start (for ranks other than 0 a little
    later, since rank 0 knows who is missing), or by a signal. All its errors are `RendezvousError`."""

    def __init__(self, outer: Outer, timeout: float) -> None:
        """Open the store, or serve it. Blocks until rank 0, or torchrun, does."""
        _distributed()  # the first import may take seconds, which are not the others' fault
        self._outer, self._timeout = outer, timeout
        self._deadline = time.monotonic() + timeout + (_VERDICT_S if outer.rank else 0.0)
        self._prefix = f"runtime/{outer.run_id}/"
        self._round = ""
        self.way = (outer.place.hosts[0],) * 2
        """Our address on the way to the store's host, and that host's, of any but who serves it."""
        self._store = self._connect() if outer.rank or outer.place.served else self._serve()
        """Of rank 0 it is the server, too: it is kept as long as the script's own groups may use it."""

    # -- the round ----------------------------------------------------------------------------

    def gather(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What all ranks said of themselves, by rank."""
        token = secrets.token_hex(8)
        rank = self._outer.rank
        record = json.dumps({**mine, "token": token})
        self._ask(self._store.set, f"{self._prefix}rank/{rank}", record)
        if rank == 0:
            self._round = token
            self._call_all(record)
        else:
            no_call = "rank 0 has not called runtime.init()"
            self._round = self._wait(lambda: self._read(f"called/{token}", no_call))
            self.put(f"here/{token}", "1")
        found: list[dict[str, Any]] = self.get("roster", "rank 0 has not gathered all ranks")
        return found

    def put(self, name: str, value: Any) -> None:
        """Say something to the others of this round (what JSON knows)."""
        self._ask(self._store.set, f"{self._prefix}{self._round}/{name}", json.dumps(value))

    def get(self, name: str, otherwise: str) -> Any:
        """What was put; waits for it. `otherwise` says what is wrong when nobody does. An {"error": text} of
        another rank is raised."""
        return self._wait(lambda: self.look(name, otherwise))

    def look(self, name: str, otherwise: str) -> Any:
        """As `get`, without waiting: None when nobody has put it so far."""
        value = json.loads(self._read(f"{self._round}/{name}", otherwise) or "null")
        if isinstance(value, dict) and "error" in value:
            raise RendezvousError(value["error"], value.get("missing", ()))
        return value

    def finish(self) -> None:
        """Say that we have read what there was to read."""
        self._ask(self._store.add, f"{self._prefix}{self._round}/finished", 1)

    def linger(self) -> None:
        """For who is about to end: the store ends with the one that serves it, which others may still have to read.
        A few seconds at most, no errors."""
        serves = self._outer.rank == 0 and not self._outer.place.served
        self._deadline = time.monotonic() + _VERDICT_S
        count = partial(self._store.add, f"{self._prefix}{self._round}/finished", 0)
        with suppress(RendezvousError):
            while serves and self._ask(count) < self._outer.world_size:
                if time.monotonic() > self._deadline:
                    break
                time.sleep(_POLL_S)

    def _call_all(self, record: str) -> None:
        """Of rank 0: until every rank has answered."""
        found: dict[int, dict[str, Any]] = {0: json.loads(record)}
        called: dict[int, str] = {}
        missing = list(range(1, self._outer.world_size))

        def all_there() -> bool | None:
            late = time.monotonic() > self._deadline
            self._ask(self._call_missing, missing, called, found)
            return True if late or not missing else None

        self._wait(all_there)
        everyone = [found.get(rank) for rank in range(self._outer.world_size)]
        self.put("roster", self._verdict(missing) if missing else everyone)

    def _call_missing(
        self, missing: list[int], called: dict[int, str], found: dict[int, dict[str, Any]]
    ) -> None:
        """Those who answered meanwhile leave `missing`."""
        for rank in missing.copy():
            key = f"{self._prefix}rank/{rank}"
            if not self._store.check([key]):
                continue
            record = json.loads(self._store.get(key))
            token = record["token"]
            if called.get(rank) != token:
                called[rank] = token
                self._store.set(f"{self._prefix}called/{token}", self._round)
            if self._store.check([f"{self._prefix}{self._round}/here/{token}"]):
                found[rank] = record
                missing.remove(rank)

    def _verdict(self, missing: list[int]) -> dict[str, Any]:
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        who = f"rank {shown} has" if len(missing) == 1 else f"ranks {shown} have"
        text = (
            f"{who} not called runtime.init() within {self._timeout:g} s (all {self._outer.world_size} "
            f"ranks of {self._outer.launcher} job {self._outer.run_id} must)"
        )
        return {"error": text, "missing": [f"rank {rank}" for rank in missing]}

    # -- the store ----------------------------------------------------------------------------

    def _wait(self, look: Callable[[], T | None]) -> T:
        """Not inside of torch: that handles no signals, and says something on stderr each time."""
        pause = _POLL_S
        while (found := look()) is None:
            time.sleep(pause)
            pause = min(_SLOW_POLL_S, pause * 1.2)
        return found

    def _read(self, name: str, otherwise: str) -> str | None:
        """What stands there. Raises when nothing does and it is too late."""
        late = time.monotonic() > self._deadline
        key = self._prefix + name
        text = self._ask(lambda: self._store.get(key) if self._store.check([key]) else None)
        if text is None and late:
            raise RendezvousError(f"{otherwise} within {self._timeout:g} s")
        return None if text is None else str(text, "utf-8")

    def _ask(self, work: Callable[..., T], *args: Any) -> T:
        """Talk to the store, until the end of all waits at most."""
        try:
            return _aside(max(self._deadline - time.monotonic(), 0.0) + _VERDICT_S, work, *args)
        except (RuntimeError, TimeoutError) as error:
            place = f"{self.way[1]}:{self._store.port}"
            why = str(error) or "no answer"
            raise RendezvousError(
                f"the store of the job's ranks at {place} was lost: {why}"
            ) from error

    def _serve(self) -> Any:
        dist = _distributed()

        place = self._outer.place
        problem = ""
        for port in place.ports:
            try:
                # Several of one process share it: that of the script's own `init_process_group` is another.
                store = dist.TCPStore(
                    place.hosts[0], port, is_master=True, multi_tenant=True, wait_for_workers=False
                )
            except dist.DistNetworkError as error:
                problem = str(error).partition("\n")[0]
                continue
            store.set(self._sign, "1")
            return store
        raise RendezvousError(f"rank 0 cannot serve a store for the job's ranks: {problem}")

    def _connect(self) -> Any:
        """A client of the store, at the first of the places where it is ours."""
        place = self._outer.place
        # An address that leads nowhere takes its second at one port before another one has its turn.
        places = [(host, port) for port in place.ports for host in place.hosts]
        problem = ""
        while True:
            for host, port in places:
                try:
                    self.way = _way_to(host, port)
                except OSError as error:
                    problem = error.strerror or str(error)
                    continue
                problem = "what answers there is no store of this job"
                store = _client(self.way[1], port)
                with suppress(RuntimeError):  # it has gone since
                    if store is not None and (place.served or store.check([self._sign])):
                        return store
            if time.monotonic() > self._deadline:
                ports = ", ".join(map(str, place.ports))
                who = "torchrun does not serve" if place.served else "rank 0 does not serve"
                raise RendezvousError(
                    f"{who} a store at {', '.join(place.hosts)}, port {ports}, within {self._timeout:g} s: {problem}"
                )
            time.sleep(_SLOW_POLL_S)

    @property
    def _sign(self) -> str:
        """A key that only a store of this very job has."""
        return f"runtime/{self._outer.run_id}/{self._outer.launcher}"


def _distributed() -> Any:
    """Imported late, and not typed: torch declares its stores nowhere."""
    return importlib.import_module("torch.distributed")


def _way_to(host: str, port: int) -> tuple[str, str]:
    """Both ends of a connection. Torch would wait, with words on stderr, where nobody listens yet."""
    with socket.create_connection((host, port), _PROBE_S) as probe:
        return str(probe.getsockname()[0]), str(probe.getpeername()[0])


def _client(host: str, port: int) -> Any:
    """None where whoever listens is no store."""
    limit = timedelta(seconds=_CONNECT_S)
    connect = partial(_distributed().TCPStore, host, port, is_master=False, wait_for_workers=False)
    with suppress(RuntimeError, TimeoutError):
        return _aside(2 * _CONNECT_S, partial(connect, timeout=limit))
    return None


def _aside(limit: float, work: Callable[..., T], *args: Any) -> T:
    """Torch waits without a limit for the answer of a store, and who answers may be none or have lost its power:
    on a thread. Raises `TimeoutError` after `limit` seconds."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*args))
        except Exception as error:  # noqa: BLE001 - it is the result
            future.set_exception(error)

    threading.Thread(target=run, name="runtime-store", daemon=True).start()
    return future.result(limit)

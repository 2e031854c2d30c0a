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
from contextlib import suppress
from datetime import timedelta
from typing import Any

from runtime.errors import RendezvousError
from runtime.launcher.torchrun import Outer

_POLL_S = 0.02
_SLOW_POLL_S = 0.25
_PROBE_S = 1.0
_CONNECT_S = 3.0
_VERDICT_S = 3.0
_SHOWN = 16


class Meeting:
    """One round of all ranks. Every wait ends by `timeout` seconds after the start (for ranks other than 0 a little
    later, since rank 0 knows who is missing). All its errors are `RendezvousError`."""

    def __init__(self, outer: Outer, timeout: float) -> None:
        """Open the store, or serve it. Blocks until rank 0, or torchrun, does."""
        _distributed()  # the first import may take seconds, which are not the others' fault
        self._outer, self._timeout = outer, timeout
        self._deadline = time.monotonic() + timeout + (_VERDICT_S if outer.rank else 0.0)
        self._prefix = f"runtime/{outer.run_id}/"
        self._round = ""
        self._store = self._connect() if outer.rank or outer.place.served else self._serve()
        """Of rank 0 it is the server, too: it is kept as long as the script's own groups may use it."""

    # -- the round ----------------------------------------------------------------------------

    def gather(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What all ranks said of themselves, by rank."""
        token = secrets.token_hex(8)
        rank = self._outer.rank
        record = json.dumps({**mine, "token": token})
        try:
            self._store.set(f"{self._prefix}rank/{rank}", record)
            if rank == 0:
                self._round = token
                self._call_all(record)
            else:
                self._round = self._wait(f"called/{token}", "rank 0 has not called runtime.init()")
                self.put(f"here/{token}", "1")
        except RuntimeError as error:  # torch's own
            raise self._lost(error) from error
        found: list[dict[str, Any]] = self.get("roster", "rank 0 has not gathered all ranks")
        return found

    def put(self, name: str, value: Any) -> None:
        """Say something to the others of this round (what JSON knows)."""
        try:
            self._store.set(f"{self._prefix}{self._round}/{name}", json.dumps(value))
        except RuntimeError as error:
            raise self._lost(error) from error

    def get(self, name: str, otherwise: str) -> Any:
        """What was put; waits for it. `otherwise` says what is wrong when nobody does. An {"error": text} of
        another rank is raised."""
        try:
            value = json.loads(self._wait(f"{self._round}/{name}", otherwise))
        except RuntimeError as error:
            raise self._lost(error) from error
        if isinstance(value, dict) and "error" in value:
            raise RendezvousError(value["error"], value.get("missing", ()))
        return value

    def _call_all(self, record: str) -> None:
        """Of rank 0: until every rank has answered."""
        found = {0: json.loads(record)}
        called: dict[int, str] = {}
        pause = _POLL_S
        while missing := [r for r in range(self._outer.world_size) if r not in found]:
            late = time.monotonic() > self._deadline
            for rank in missing:
                self._call(rank, called, found)
            if late and (missing := [rank for rank in missing if rank not in found]):
                self.put("roster", self._verdict(missing))
                return
            time.sleep(pause)
            pause = min(_SLOW_POLL_S, pause * 1.2)
        self.put("roster", [found[rank] for rank in range(self._outer.world_size)])

    def _call(self, rank: int, called: dict[int, str], found: dict[int, dict[str, Any]]) -> None:
        key = f"{self._prefix}rank/{rank}"
        if not self._store.check([key]):
            return
        record = json.loads(self._store.get(key))
        token = record["token"]
        if called.get(rank) != token:
            called[rank] = token
            self._store.set(f"{self._prefix}called/{token}", self._round)
        if self._store.check([f"{self._prefix}{self._round}/here/{token}"]):
            found[rank] = record

    def _verdict(self, missing: list[int]) -> dict[str, Any]:
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        who = f"rank {shown} has" if len(missing) == 1 else f"ranks {shown} have"
        text = (
            f"{who} not called runtime.init() within {self._timeout:g} s (all {self._outer.world_size} "
            f"ranks of {self._outer.launcher} job {self._outer.run_id} must)"
        )
        return {"error": text, "missing": [f"rank {rank}" for rank in missing]}

    # -- the store ----------------------------------------------------------------------------

    def _wait(self, name: str, otherwise: str) -> str:
        key = self._prefix + name
        left = max(0.01, self._deadline - time.monotonic())
        try:
            self._store.wait([key], timedelta(seconds=left))
        except RuntimeError as error:
            if time.monotonic() < self._deadline - 0.05:
                raise
            raise RendezvousError(f"{otherwise} within {self._timeout:g} s") from error
        return str(self._store.get(key), "utf-8")

    def _lost(self, error: RuntimeError) -> RendezvousError:
        place = f"{self._outer.place.host}:{self._outer.place.ports[0]}"
        return RendezvousError(f"the store of the job's ranks at {place} was lost: {error}")

    def _serve(self) -> Any:
        dist = _distributed()

        place = self._outer.place
        problem = ""
        for port in place.ports:
            try:
                # Several of one process share it: that of the script's own `init_process_group` is another.
                store = dist.TCPStore(
                    place.host, port, is_master=True, multi_tenant=True, wait_for_workers=False
                )
            except dist.DistNetworkError as error:
                problem = str(error).partition("\n")[0]
                continue
            store.set(self._sign, "1")
            return store
        raise RendezvousError(f"rank 0 cannot serve a store for the job's ranks: {problem}")

    def _connect(self) -> Any:
        """A client of the store, at the first of the ports where it is ours."""
        place = self._outer.place
        while True:
            for port in place.ports:
                store = _client(place.host, port) if _listens(place.host, port) else None
                with suppress(RuntimeError):  # it has gone since
                    if store is not None and (place.served or store.check([self._sign])):
                        return store
            if time.monotonic() > self._deadline:
                where = ", ".join(map(str, place.ports))
                who = "torchrun does not serve" if place.served else "rank 0 does not serve"
                raise RendezvousError(
                    f"{who} a store at {place.host}, port {where}, within {self._timeout:g} s"
                )
            time.sleep(_SLOW_POLL_S)

    @property
    def _sign(self) -> str:
        """A key that only a store of this very job has."""
        return f"runtime/{self._outer.run_id}/{self._outer.launcher}"


def _distributed() -> Any:
    """Imported late, and not typed: torch declares its stores nowhere."""
    return importlib.import_module("torch.distributed")


def _listens(host: str, port: int) -> bool:
    """Torch would wait, with words on stderr, where nobody listens yet."""
    try:
        with socket.create_connection((host, port), _PROBE_S):
            return True
    except OSError:
        return False


def _client(host: str, port: int) -> Any:
    """Whoever listens may be no store: torch waits for its answer without a limit, so it does in a thread."""
    found: list[Any] = []
    dist = _distributed()

    def connect() -> None:
        try:
            limit = timedelta(seconds=_CONNECT_S)
            store = dist.TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=limit
            )
        except RuntimeError:
            return
        found.append(store)

    thread = threading.Thread(target=connect, name="runtime-store", daemon=True)
    thread.start()
    thread.join(2 * _CONNECT_S)
    return found[0] if found else None

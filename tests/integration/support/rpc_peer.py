"""A process with an endpoint on real sockets: `python rpc_peer.py DIRECTORY NAME INCARNATION`.

It listens at "ipc://DIRECTORY/NAME.INCARNATION", says "ready", and ends when its standard input does. Who is
where is a file: "DIRECTORY/NAME" holds the incarnation that runs now.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.job import ActorInfo
from runtime.peer import context
from runtime.peer.actor import RoleActor
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.peer.method import rpc
from runtime.transport.sockets import SocketTransport


class FileDirectory:
    """Finds actors "p-<rank>" by the files in a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def roles(self) -> Mapping[str, list[ActorInfo]]:
        return {"p": [ActorInfo(f"p-{rank}", "p", rank) for rank in range(10)]}

    async def resolve(self, name: str) -> PeerAddress:
        while True:
            try:
                incarnation = (self.folder / name).read_text()
            except FileNotFoundError:
                await asyncio.sleep(0.01)
                continue
            peer = f"{name}.{incarnation}"
            return PeerAddress(peer, f"ipc://{self.folder}/{peer}", "p", int(name[2:]))

    async def fate(self, peer: str) -> str | None:
        await asyncio.sleep(0.05)
        return "SIGKILL" if (self.folder / f"{peer}.dead").exists() else None


class Server:
    """What each process exposes."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @rpc
    async def echo(self, value: Any) -> Any:
        return value

    @rpc
    def plain(self, value: Any) -> Any:
        return value

    @rpc
    def note(self, number: int, load: bytes) -> int:
        self.events.append(str(number))
        return number

    @rpc
    async def hang(self, name: str) -> None:
        self.events.append(f"start {name}")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.events.append(f"cancelled {name}")
            raise

    @rpc
    async def seen(self) -> list[str]:
        return list(self.events)

    @rpc
    async def pid(self) -> int:
        return os.getpid()

    @rpc
    def pass_on(self, path: list[str]) -> int:
        """Call `pass_on` of the first of `path` with the rest of it, and wait."""
        if not path:
            return 0
        here = context.current()
        info = here.directory.roles()["p"][int(path[0][2:])]
        return 1 + int(RoleActor(info, here.endpoint).call("pass_on", path[1:]).result(20))

    @rpc
    async def ask_many(self, target: str, count: int, at_once: int) -> str:
        """Make `count` calls of `target`, `at_once` at a time; each must get its own answer."""
        endpoint, wrong = context.current().endpoint, 0
        numbers = iter(range(count))

        async def some() -> None:
            nonlocal wrong
            for number in numbers:
                value = [endpoint.peer, number]
                wrong += await endpoint.call(target, "echo", (value,)) != value

        await asyncio.gather(*(some() for _ in range(at_once)))
        return f"{wrong} wrong"


async def serve(folder: Path, name: str, incarnation: str) -> None:
    peer = f"{name}.{incarnation}"
    directory = FileDirectory(folder)
    transport = SocketTransport(peer, f"ipc://{folder}/{peer}")
    async with Endpoint(transport, directory=directory, role="p", rank=int(name[2:])) as endpoint:
        endpoint.export_instance(None, Server())
        context.install(context.Context(asyncio.get_running_loop(), endpoint, directory))
        (folder / name).write_text(incarnation)
        print("ready", flush=True)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait_for_end() -> None:
            sys.stdin.read()
            loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=wait_for_end, daemon=True).start()
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))

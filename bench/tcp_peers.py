"""Two processes as on two hosts: our endpoints, ZeroMQ over TCP loopback.

`python -m bench.tcp_peers SIDE KIND DIRECTORY`: SIDE is serve or call, KIND `small` (64 bytes there and
back, with deadlines) or a number of MiB (arrays of that size as the argument, see `bench.tensor`). The
caller is a coroutine on the endpoint's loop. With `-curve` behind the kind the connection is encrypted, as it always is
in a job.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from pathlib import Path

from bench import timing
from bench.rpc_job import LIMIT_S
from bench.tensor_job import Sink, argument_figures
from bench.timing import PAYLOAD
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.transport.sockets import SocketSettings, SocketTransport, mint

SERVER, CALLER = "server-0.00000001", "caller-0.00000002"


async def echo(payload: bytes) -> bytes:
    return payload


def transport(peer: str, kind: str, directory: Path) -> SocketTransport:
    settings = SocketSettings(insecure=True)
    if kind.endswith("-curve"):
        keys = directory / "keys"
        if peer == SERVER:
            keys.write_bytes(pickle.dumps(mint()))
        settings = SocketSettings(security=pickle.loads(keys.read_bytes()))
    return SocketTransport(peer, "tcp://127.0.0.1:0", settings)


async def serve(kind: str, directory: Path) -> None:
    async with Endpoint(transport(SERVER, kind, directory), role="server", rank=0) as endpoint:
        endpoint.export("echo", echo)
        endpoint.export_instance(None, Sink())
        (directory / "address").write_text(endpoint.address.address)
        await timing.until_figures(directory)


async def call(kind: str, directory: Path) -> dict[str, float]:
    server = PeerAddress(SERVER, (directory / "address").read_text(), "server", 0)
    async with Endpoint(transport(CALLER, kind, directory), role="caller", rank=0) as endpoint:
        size = kind.removesuffix("-curve")
        if size == "small":
            return await timing.timed(
                lambda: endpoint.call(server, "echo", (PAYLOAD,), timeout=LIMIT_S)
            )
        await endpoint.call(server, "echo", (PAYLOAD,))
        return await argument_figures(
            lambda method, array: endpoint.call(server, method, (array,)), int(size) * timing.MIB
        )


if __name__ == "__main__":
    folder = Path(sys.argv[3])
    if sys.argv[1] == "serve":
        asyncio.run(serve(sys.argv[2], folder))
    else:
        timing.write_figures(asyncio.run(call(sys.argv[2], folder)), folder)

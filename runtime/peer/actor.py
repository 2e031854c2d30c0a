"""One member of a role, and calling it.

A member is known by name, from the plan: it need not run yet, and after a restart the same object
reaches the new process. Arguments are encoded on the caller's thread, so that what cannot be sent is
refused before anything is; the calls themselves are made on the peer loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from runtime.job import ActorInfo
from runtime.peer import context, gather
from runtime.peer.calls import DEFAULT, CallOptions, Outgoing
from runtime.peer.endpoint import PING, Endpoint
from runtime.peer.feed import Feed, Source, Stream
from runtime.peer.future import Future
from runtime.peer.method import Named, rpc_name
from runtime.wire.codec import encode_arguments

Method = str | Callable[..., Any] | Named
"""What to call: a name, a function that has one, or a stub."""


class RoleActor:
    """One member of a role: `name` ("actor-3"), `role`, `rank`, and `info` with all the plan says."""

    def __init__(self, info: ActorInfo, endpoint: Endpoint, options: CallOptions = DEFAULT) -> None:
        self.info = info
        self._endpoint = endpoint
        self._options = options

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def role(self) -> str:
        return self.info.role

    @property
    def rank(self) -> int:
        return self.info.rank

    def options(
        self, *, timeout: float | None = None, retry: int = 0, idempotent: bool = False
    ) -> RoleActor:
        """The same member, called with a deadline of `timeout` seconds. An `idempotent` call is sent
        again up to `retry` times, to the member's next start, when it dies before it answers."""
        options = gather.checked_options(timeout, retry, idempotent)
        return RoleActor(self.info, self._endpoint, options)

    def call(self, method: Method, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `method` (a name or a function). A member that is still starting is waited for.

        Raises `MisuseError` for arguments that cannot be sent. The future fails with `RemoteError`
        (what the handler raised, and an instance of its class), `NotExposedError`, `ArgumentError`,
        `PeerLostError` or `Timeout`.
        """
        endpoint, calls = self._endpoint, list[Outgoing]()
        name, options = rpc_name(method), gather.here(self._options)
        parcel = gather.prepared(endpoint, (self.name,), encode_arguments(args, kwargs), options)
        future = gather.future_of(endpoint, name, self.name, calls)
        request = name, parcel, options
        endpoint.mailbox.run(gather.start, endpoint, self.name, request, gather.One(future), calls)
        return future

    def cast(self, method: Method, /, *args: Any, **kwargs: Any) -> None:
        """Call `method` one way: nobody hears whether it arrived or what came of it. Waits while the
        member is behind with what it was sent; on the peer loop that is `Full`."""
        name, endpoint = rpc_name(method), self._endpoint
        parcel = gather.prepared(
            endpoint, (self.name,), encode_arguments(args, kwargs), self._options
        )
        endpoint.mailbox.run(endpoint.caller.cast, self.name, name, parcel)

    def stream(self, method: Method, /, *args: Any, **kwargs: Any) -> Stream[Any]:
        """Call a generator method: what it yields, item by item, for `for` or `async for`. Closing or
        dropping the stream closes the generator; a deadline holds for the whole stream. A method that
        is no generator gives its result as the one item."""
        name, endpoint = rpc_name(method), self._endpoint
        options = gather.here(self._options)
        parcel = gather.prepared(endpoint, (self.name,), encode_arguments(args, kwargs), options)
        feed = Feed[Any](endpoint, name, self.name, 1, lambda errors: errors[0])
        feed.open(((self.name, Source(feed, 0), (name, parcel, options)),))
        return Stream(feed)

    def ping(self) -> Future[float]:
        """The seconds that a call there and back takes; waits while the member starts."""
        begun = time.monotonic()
        return self.call(PING).then(lambda _: time.monotonic() - begun)

    def __repr__(self) -> str:
        return f"RoleActor({self.name!r})"

    def __reduce__(self) -> Any:
        """Where it arrives, it is called from there."""
        return RoleActor._here, (self.info, self._options)

    @classmethod
    def _here(cls, info: ActorInfo, options: CallOptions) -> RoleActor:
        return cls(info, context.current().endpoint, options)

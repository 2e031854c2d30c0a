"""`call_any`: one call, made to the member that has the fewest of ours, and moved when that one is lost.

Among equals the members take turns. A call moves on only if it may run twice (`idempotent`), or had not
been sent; it is tried with each member at most once, all within the one deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.errors import PeerLostError, RemoteError
from runtime.peer import gather
from runtime.peer.calls import Outgoing
from runtime.peer.endpoint import Endpoint
from runtime.peer.future import Future


class Balanced:
    """One such call. `targets` in the order of their turn; `calls` holds the one that is under way."""

    def __init__(
        self,
        endpoint: Endpoint,
        targets: Sequence[str],
        request: gather.Request,
        future: Future[Any],
        calls: list[Outgoing],
    ) -> None:
        self._endpoint = endpoint
        self._left = list(targets)
        self._request = request
        self._future = future
        self._calls = calls
        self._clock = endpoint.mailbox.loop.time
        self._begun = self._clock()

    def start(self) -> None:
        """On the loop: call the member with the fewest calls of ours among those not tried yet."""
        target = min(self._left, key=self._endpoint.caller.table.load)
        self._left.remove(target)
        method, parcel, options = self._request
        if options.timeout is not None:
            left = options.timeout - (self._clock() - self._begun)
            options = options._replace(timeout=max(0.0, left))
        if self._left:
            options = options._replace(
                retry=0
            )  # another member is sooner there than its next start
        self._calls.clear()
        gather.start(self._endpoint, target, (method, parcel, options), self, self._calls)

    def answered(self, call: Outgoing, value: Any) -> None:
        """On the loop."""
        self._future.set_result(value)

    def failed(self, call: Outgoing, error: Exception) -> None:
        """On the loop."""
        lost = isinstance(error, PeerLostError) and not isinstance(error, RemoteError)
        may_move = self._request[2].idempotent or not call.sent
        if lost and may_move and self._left and not self._future.done():
            self.start()
        else:
            self._future.set_exception(error)

"""The shell of `calls.WaitGraph`: when to ask whether handlers wait for each other, and what then.

Asked is when a plain handler begins to wait while others queue behind it, and when a call queues
behind one that waits; the first time at once, then at most every `PROBE_AGAIN_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from runtime.errors import MisuseError
from runtime.peer.calls import Cycle, Forward, Incoming, Lane, Owner, WaitGraph
from runtime.wire import messages

PROBE_AGAIN_S = 0.05


class CycleWatch:
    """Finds cycles of plain handlers. `fail` is told the queued call that can never start."""

    def __init__(
        self,
        owner: Owner,
        plain: Lane,
        loop: asyncio.AbstractEventLoop,
        fail: Callable[[Incoming, MisuseError], None],
    ) -> None:
        self._graph = WaitGraph(owner, plain)
        self._loop = loop
        self._fail = fail
        self._not_before = 0.0
        self._again: asyncio.TimerHandle | None = None

    def queued(self) -> None:
        """A call has come to the plain lane."""
        if self._graph.stuck() is None:
            return
        if self._loop.time() >= self._not_before:
            self._ask()
        elif self._again is None:
            self._again = self._loop.call_at(self._not_before, self._ask_again)

    def blocked(self, call: Incoming) -> None:
        """The handler of `call` has begun to wait."""
        self._forward(self._graph.blocked(call))
        if self._graph.stuck() is call:
            self._ask()

    def asked(self, call: Incoming, probe: messages.Probe) -> None:
        """Another process asks what `call` waits for."""
        found = self._graph.asked(call, probe)
        if isinstance(found, Cycle):
            path = " -> ".join(found.path)
            reason = (
                f"a cycle of plain handlers that wait for each other: {path}; plain handlers run "
                "one at a time, so none of these can go on. Make one of them `async def`, or let it "
                "return before it calls"
            )
            self._fail(found.call, MisuseError(reason))
        else:
            self._forward(found)

    def over(self, call: Incoming) -> None:
        """`call` needs no answer any more."""
        self._graph.over(call)

    def close(self) -> None:
        """Ask nothing more."""
        if self._again is not None:
            self._again.cancel()
        self._not_before = float("inf")

    def _ask(self) -> None:
        self._not_before = self._loop.time() + PROBE_AGAIN_S
        self._forward(self._graph.probe())

    def _ask_again(self) -> None:
        self._again = None
        if self._graph.stuck() is not None:
            self._ask()

    def _forward(self, forwards: Sequence[Forward]) -> None:
        for channel, probe in forwards:
            channel.urgent(messages.encode_probe(probe))

"""Asking the control plane: one number a question, until it is answered, withdrawn, or out of time.

The hosting agent and every other process ask alike; they differ in how a command travels (`carry`).
A question keeps its number when it has to be sent again, so that it is run once. When its time is up it
is withdrawn, and the withdrawal brings either the reason in words or an answer that was just in time:
nobody is both counted as arrived and told that it timed out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import Any

from runtime.aio import Backoff
from runtime.control.messages import error_from
from runtime.errors import MisuseError, PeerLostError, Timeout
from runtime.machine import Message

logger = logging.getLogger(__name__)

Carry = Callable[[int, Message], "asyncio.Future[Any]"]
"""Takes a numbered command to the plane; the future gives ["value", …] or ["error", …]."""

_SAY_AFTER_S = 10.0
_WITHDRAW_S = 2.0


class Asker:
    """Numbers the questions of one client. To be used on one event loop.

    `give_up` is called with the number of a question whose caller was cancelled; it must not wait.
    `patience`: seconds for which a question is repeated while the control plane cannot be reached.
    """

    def __init__(
        self,
        carry: Carry,
        give_up: Callable[[int], None],
        random: Random,
        patience: float = 3.0,
    ) -> None:
        self._carry, self._give_up, self._random = carry, give_up, random
        self._patience = patience
        self._last = 0
        self._open: set[int] = set()

    async def ask(
        self, machine: str, message: Message, timeout: float | None = None, *, quiet: bool = False
    ) -> Any:
        """The machine's answer. Raises its error, or `Timeout` saying in words what was missing, or
        `PeerLostError` when the control plane cannot be reached for that long.

        `timeout`: seconds, None for no limit. After 10 s it logs once what it waits for, unless `quiet`.
        Cancelling withdraws the question.
        """
        if timeout is not None and not timeout >= 0:
            raise MisuseError(f"timeout={timeout!r}: allowed are seconds from 0 on, or None")
        number = self._number()
        command = {"op": "ask", "machine": machine, "message": message}
        try:
            return await self._answer(number, command, timeout, quiet)
        except asyncio.CancelledError:
            self._give_up(number)
            raise
        finally:
            self._open.discard(number)

    def _number(self) -> int:
        self._last += 1
        self._open.add(self._last)
        return self._last

    def _send(self, number: int, command: dict[str, Any]) -> asyncio.Future[Any]:
        still_open = sorted(other for other in self._open if other < number)
        return self._carry(number, {**command, "open": still_open})

    async def _answer(
        self, number: int, command: dict[str, Any], timeout: float | None, quiet: bool
    ) -> Any:
        clock = asyncio.get_running_loop().time
        started = clock()
        deadline = None if timeout is None else started + timeout
        say_at = None if quiet else started + _SAY_AFTER_S
        backoff, unreachable_since = Backoff(self._random), 0.0
        future = self._send(number, command)
        try:
            while True:
                moments = [moment for moment in (deadline, say_at) if moment is not None]
                wait = max(0.0, min(moments) - clock()) if moments else None
                await asyncio.wait({future}, timeout=wait)
                now = clock()
                if future.done() and not _unreachable(future):
                    return _unpack(future.result())
                if deadline is not None and now >= deadline:
                    return await self._withdraw(number, future, now - started)
                if future.done():
                    unreachable_since = unreachable_since or now
                    if now - unreachable_since > self._patience:
                        return future.result()
                    await backoff.wait()
                    future = self._send(number, command)
                elif say_at is not None and now >= say_at:
                    say_at = None
                    logger.warning(
                        "still waiting after %.0f s: %s", now - started, await self._why(number)
                    )
        finally:
            future.cancel()

    async def _withdraw(self, number: int, future: asyncio.Future[Any], waited: float) -> Any:
        reply = await self._aside({"op": "withdraw", "id": number})
        if future.done() and not _unreachable(future):
            return _unpack(future.result())
        if reply is not None and reply["answer"] is not None:
            return _unpack(reply["answer"])
        if reply is None:
            self._give_up(number)
            why = "the control plane does not answer"
        else:
            why = reply["why"] or "the control plane had not got to it"
        raise Timeout(f"timed out after {waited:.1f} s: {why}", waited_s=waited)

    async def _why(self, number: int) -> str:
        reply = await self._aside({"op": "why", "id": number})
        if reply is None:
            return "the control plane does not answer"
        return reply["why"] or "the answer is on its way"

    async def _aside(self, command: dict[str, Any]) -> dict[str, Any] | None:
        """Ask something about another question; None when there is no answer soon."""
        number = self._number()
        future = self._send(number, command)
        try:
            await asyncio.wait({future}, timeout=_WITHDRAW_S)
            if not future.done() or _unreachable(future):
                return None
            reply: dict[str, Any] = _unpack(future.result())
            return reply
        finally:
            future.cancel()
            self._open.discard(number)


def _unreachable(future: asyncio.Future[Any]) -> bool:
    """Whether a finished attempt ended because the control plane was not there."""
    return future.cancelled() or isinstance(future.exception(), PeerLostError)


def _unpack(answer: Any) -> Any:
    kind, content = answer
    if kind == "error":
        raise error_from(content)
    return content

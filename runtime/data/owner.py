"""The owner's side of a queue: runs its machine for callers of this process and, by RPC, for all others.

Threads of this process ask the machine directly, under a lock, so that a local put or get of what is there
costs no change of thread. Answers to other processes are given on the loop; so are ticks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from runtime.control.messages import error_state
from runtime.data.letters import read_request, write_answer
from runtime.errors import Closed, MisuseError, RuntimeFault
from runtime.machine import Call, Effect, Fail, Machine, Reply
from runtime.peer.endpoint import Endpoint, current_call
from runtime.peer.execution import Later
from runtime.peer.method import rpc
from runtime.wire.codec import Encoded

logger = logging.getLogger(__name__)

Outcome = tuple[Any, Exception | None]
"""A call's value, or its error."""
Answer = Callable[[Any, Exception | None], object]
"""Takes an outcome. Called on any thread, once."""

_Done = list[tuple[Answer, Any, Exception | None]]

_DEAD_KEPT = 4096


class QueueOwner:
    """Serves `machine` as the RPC `method` of `endpoint`."""

    def __init__(self, endpoint: Endpoint, method: str, machine: Machine) -> None:
        self._endpoint, self._machine = endpoint, machine
        self._mailbox = endpoint.mailbox
        self._clock = self._mailbox.loop.time
        self._lock = threading.Lock()
        self._answers: dict[Call, Answer] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._dead: dict[str, None] = {}
        endpoint.export(method, self._asked, raw=True)
        endpoint.on_lost(self._lost)

    # -- on any thread ------------------------------------------------------------------------

    def ask(
        self,
        message: dict[str, Any],
        peer: str,
        wait: Callable[[], Answer],
        ids: Iterator[int] | None = None,
    ) -> Outcome | None:
        """Hand over a message of `peer`. Gives the outcome if it is there at once; else `wait` is called, for
        what is to be told it, on any thread. `ids` gives the message its id, so that ids come to the
        machine in their order."""
        outcome: Outcome | None = None
        done: _Done = []
        with self._lock:
            if ids is not None:
                message["id"] = next(ids)
            call = Call(peer, message["id"])
            try:
                effects = self._machine.handle(message, call, self._clock())
            except RuntimeFault as error:
                outcome = (None, error)
            else:
                for effect in effects:
                    if effect.call == call:  # type: ignore[union-attr]
                        outcome = _outcome(effect)
                    else:
                        self._sort(effect, done)
                if outcome is None:
                    self._answers[call] = wait()
            due = self._machine.deadline()
        if done or due is not None:
            self._finish(done, due)
        return outcome

    def cancelled(self, call: Call) -> None:
        """Nobody waits for `call` any more, or its answer has reached nobody."""
        with self._lock:
            self._answers.pop(call, None)
            effects = self._machine.cancelled(call, self._clock())
            done, due = self._all(effects), self._machine.deadline()
        self._finish(done, due)

    def why(self, call: Call) -> str:
        """In words, what `call` waits for."""
        with self._lock:
            return self._machine.why(call) or "the answer is on its way"

    def _sort(self, effect: Effect, done: _Done) -> None:
        answer = self._answers.pop(effect.call, None)  # type: ignore[union-attr]
        if answer is not None:
            done.append((answer, *_outcome(effect)))

    def _all(self, effects: Iterable[Effect]) -> _Done:
        done: _Done = []
        for effect in effects:
            self._sort(effect, done)
        return done

    def _finish(self, done: _Done, due: float | None) -> None:
        for answer, value, error in done:
            answer(value, error)
        if due is not None and (self._timer is None or due < self._timer.when()):
            self._mailbox.run(self._arm, due)

    # -- on the loop --------------------------------------------------------------------------

    def _arm(self, due: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._mailbox.loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        with self._lock:
            done = self._all(self._machine.tick(self._clock()))
            due = self._machine.deadline()
        self._finish(done, due)

    def _lost(self, peer: str, cause: str) -> None:
        self._dead[peer] = None
        if len(self._dead) > _DEAD_KEPT:
            del self._dead[next(iter(self._dead))]
        with self._lock:
            for call in [call for call in self._answers if call.client == peer]:
                del self._answers[call]
            done = self._all(self._machine.lost(peer, cause, self._clock()))
            due = self._machine.deadline()
        self._finish(done, due)

    @rpc(thread=False)
    def _asked(self, letter: Encoded) -> Encoded | Later:
        # When the caller's link breaks this call is over, but not the question: it comes again by
        # the same id. What ends it is "cancel", or the caller's death.
        peer = current_call().peer
        message = read_request(letter)
        if peer in self._dead:
            self._check_legacy(peer, message)
        if message.get("op") == "cancel":
            about = message.get("about")
            if type(about) is not int:
                raise MisuseError("'cancel' needs the id of the call that it is 'about'")
            self.cancelled(Call(peer, about))
            return write_answer({})
        later = Later()
        outcome = self.ask(message, peer, lambda: self._on_loop(later))
        return later if outcome is None else _letter(*outcome)

    def _on_loop(self, later: Later) -> Answer:
        def settle(value: Any, error: Exception | None) -> None:
            later.tell(_letter(value, error), None)

        return partial(self._mailbox.run, settle)

    @staticmethod
    def _check_legacy(peer: str, message: dict[str, Any]) -> None:
        """What a process wrote before it died is read after its death is known: what it was told to be in
        the queue must get there, nothing else."""
        if message.get("op") != "put":
            raise Closed(f"{peer} is dead")
        if not message.get("eager"):
            message["timeout"] = 0


def _letter(value: Any, error: Exception | None) -> Encoded:
    return write_answer(value if error is None else {"error": error_state(error)})


def _outcome(effect: Effect) -> Outcome:
    if type(effect) is Reply:
        return effect.value, None
    assert type(effect) is Fail, f"a queue has no effect {effect!r}"
    return None, effect.error

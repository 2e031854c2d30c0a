"""From the thread of a caller to the peer loop and back: how calls are posted, and who waits for them.

`prepared` and `on_loop` are the way there. `One` and `All` take the answers, on the loop, and settle the future
that the caller holds. Which calls are made is decided in `actor`, `group` and `balance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from runtime.errors import CallGroupError, Failure, MisuseError, PeerLostError, RuntimeFault
from runtime.job import ActorInfo
from runtime.peer.calls import Answered, CallOptions, Outgoing
from runtime.peer.endpoint import Endpoint
from runtime.peer.flow import nbytes, size_of
from runtime.peer.future import Future, current_waiter
from runtime.wire.codec import Encoded

SMALL_BYTES = 64 * 1024
"""Buffers below that are copied at once: cheaper than to say when they may be changed."""


def checked_options(timeout: float | None, retry: int, idempotent: bool) -> CallOptions:
    """The options of a call, if they are any; else `MisuseError`."""
    is_time = isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0
    if timeout is not None and not is_time:
        raise MisuseError(f"timeout={timeout!r}: allowed are seconds above 0, or None for no limit")
    if isinstance(retry, bool) or not isinstance(retry, int) or retry < 0:
        raise MisuseError(f"retry={retry!r}: allowed are whole numbers from 0")
    return CallOptions(timeout, retry, bool(idempotent))


Request = tuple[str, Encoded, CallOptions]
"""What is asked of a member: the method, its arguments, and how it is called."""


# the way there


def prepared(
    endpoint: Endpoint, targets: Sequence[str], parcel: Encoded, options: CallOptions
) -> Encoded:
    """`parcel` as it is to be sent to each of `targets`: what its owner changes after this does not
    travel (where the host's shared memory has no room for it, large parts do until they have left).
    Waits while a target is behind with what it was sent."""
    if parcel.buffers:
        body, buffers = endpoint.stage(parcel)
        parcel = Encoded(body, [bytes(b) if nbytes(b) < SMALL_BYTES else b for b in buffers])
    endpoint.admit(targets, size_of(*parcel), options.timeout)
    return parcel


def here(options: CallOptions) -> CallOptions:
    """`options` of a call that is made by this code: in a handler, or not."""
    return options if current_waiter.get() is None else options._replace(nested=True)


def future_of(
    endpoint: Endpoint, method: str, target: str, calls: Sequence[Outgoing]
) -> Future[Any]:
    """The result of `calls`, which are still to be made."""
    caller = endpoint.caller

    def abandon(given_up: Iterable[Outgoing]) -> None:
        for call in given_up:
            caller.abandon(call)

    return Future(endpoint.mailbox, calls, waits_for(endpoint, method, target, calls), abandon)


def waits_for(
    endpoint: Endpoint, method: str, target: str, calls: Sequence[Outgoing]
) -> Callable[[], str]:
    """Says in words what the result of `calls` waits for."""
    caller = endpoint.caller

    def describe() -> str:
        open_calls = [call for call in list(calls) if call in caller.table]
        text = f"the result of {method}() of {target}"
        if not open_calls:
            return text
        waits = "; ".join(f"{call.target}: {caller.why(call)}" for call in open_calls[:4])
        more = f"; and {len(open_calls) - 4} more" if len(open_calls) > 4 else ""
        return f"{text}: no answer yet from {waits}{more}"

    return describe


def start(
    endpoint: Endpoint,
    target: str,
    request: Request,
    waiter: Answered,
    calls: list[Outgoing],
) -> None:
    """On the loop: make one call, and note it in `calls`."""
    method, parcel, options = request
    try:
        calls.append(endpoint.caller.call(target, method, parcel, waiter, options))
    except RuntimeFault as error:
        waiter.failed(Outgoing(0, target, method, waiter, 0.0), error)


# who waits for the answers, on the loop


class One:
    """A call whose answer is the future's, after `check` (which may raise)."""

    __slots__ = ("_check", "_future")

    def __init__(self, future: Future[Any], check: Callable[[Any], Any] | None = None) -> None:
        self._future = future
        self._check = check

    def answered(self, call: Outgoing, value: Any) -> None:
        try:
            checked = value if self._check is None else self._check(value)
        except RuntimeFault as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(checked)

    def failed(self, call: Outgoing, error: Exception) -> None:
        self._future.set_exception(error)


class All:
    """The answers of all `members`, one future."""

    def __init__(
        self,
        future: Future[list[Any]],
        members: Sequence[ActorInfo],
        method: str,
        return_exceptions: bool,
    ) -> None:
        self._future = future
        self._members = members
        self._method = method
        self._return_exceptions = return_exceptions
        self._results: list[Any] = [None] * len(members)
        self._errors: dict[int, Exception] = {}
        self._left = len(members)

    def take(self, index: int, value: Any, error: Exception | None) -> None:
        """The answer of member `index`."""
        if error is None or self._return_exceptions:
            self._results[index] = value if error is None else error
        else:
            self._errors[index] = error
        self._left -= 1
        if not self._left:
            self.finish()

    def finish(self) -> None:
        """All have answered."""
        if not self._errors:
            self._future.set_result(self._results)
            return
        partial = {i: r for i, r in enumerate(self._results) if i not in self._errors}
        self._future.set_exception(group_error(self._method, self._members, self._errors, partial))


class Member:
    """Hands the answer of one member to the `All` of its call."""

    __slots__ = ("_all", "_index")

    def __init__(self, all: All, index: int) -> None:
        self._all = all
        self._index = index

    def answered(self, call: Outgoing, value: Any) -> None:
        self._all.take(self._index, value, None)

    def failed(self, call: Outgoing, error: Exception) -> None:
        self._all.take(self._index, None, error)


def group_error(
    method: str,
    members: Sequence[ActorInfo],
    errors: Mapping[int, Exception],
    partial: dict[int, Any],
) -> CallGroupError:
    """What a call of `members` failed with: `errors` and the results of the others, by place."""
    failures = []
    for index, error in sorted(errors.items()):
        info = members[index]
        cause = error.cause if isinstance(error, PeerLostError) else _headline(error)
        failures.append(Failure(info.role, info.rank, info.host, cause, (), error))
    told = "; ".join(f"{f.role}-{f.rank}: {f.cause}" for f in failures[:8])
    more = f"; and {len(failures) - 8} more" if len(failures) > 8 else ""
    return CallGroupError(
        f"{method}() failed in {len(failures)} of {len(members)} members: {told}{more}",
        [errors[index] for index in sorted(errors)],
        failures,
        partial,
    )


def _headline(error: Exception) -> str:
    reason = error.reason if isinstance(error, RuntimeFault) else str(error)
    return reason.partition("\n")[0]

"""The members of a role, and calling them: one, all, or rank 0.

A member is known by name, from the plan: it need not run yet, and after a restart the same object
reaches the new process. Arguments are encoded once, on the caller's thread, so that what cannot be
sent is refused before anything is; the calls themselves are made on the peer loop.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

from runtime.errors import (
    CallGroupError,
    Failure,
    MisuseError,
    PeerLostError,
    RuntimeFault,
    Timeout,
    nearest,
)
from runtime.job import ActorInfo
from runtime.peer import context
from runtime.peer.calls import Outgoing
from runtime.peer.endpoint import PING, Endpoint
from runtime.peer.future import Future
from runtime.peer.method import rpc_name
from runtime.wire.codec import Encoded, encode_arguments

Method = str | Callable[..., Any]


def checked_timeout(timeout: float | None) -> float | None:
    """`timeout` if it is one; else `MisuseError`."""
    if timeout is None or (
        isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and timeout > 0
    ):
        return timeout
    raise MisuseError(f"timeout={timeout!r}: allowed are seconds above 0, or None for no limit")


class RoleActor:
    """One member of a role: `name` ("actor-3"), `role`, `rank`, and `info` with all the plan says."""

    def __init__(self, info: ActorInfo, endpoint: Endpoint, timeout: float | None = None) -> None:
        self.info = info
        self._endpoint = endpoint
        self._timeout = timeout

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def role(self) -> str:
        return self.info.role

    @property
    def rank(self) -> int:
        return self.info.rank

    def options(self, *, timeout: float | None = None) -> RoleActor:
        """The same member, called with a deadline of `timeout` seconds."""
        return RoleActor(self.info, self._endpoint, checked_timeout(timeout))

    def call(self, method: Method, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `method` (a name or a function). A member that is still starting is waited for.

        Raises `MisuseError` for arguments that cannot be sent. The future fails with `RemoteError`
        (what the handler raised, and an instance of its class), `NotExposedError`, `ArgumentError`,
        `PeerLostError` or `Timeout`.
        """
        name = rpc_name(method)
        encoded = encode_arguments(args, kwargs)
        calls: list[Outgoing] = []
        future = _future(self._endpoint, name, self.name, calls)
        _on_loop(self._endpoint, lambda: self._start_call(name, encoded, calls, _One(future)))
        return future

    def _start_call(
        self, name: str, encoded: Encoded, calls: list[Outgoing], waiter: _One | _Member
    ) -> None:
        """On the loop: make the call, and note it in `calls`. For this module."""
        try:
            caller = self._endpoint.caller
            calls.append(caller.call(self.name, name, encoded, waiter, self._timeout))
        except RuntimeFault as error:
            waiter.failed(None, error)

    def cast(self, method: Method, /, *args: Any, **kwargs: Any) -> None:
        """Call `method` one way: nobody hears whether it arrived or what came of it."""
        name, encoded = rpc_name(method), encode_arguments(args, kwargs)
        _on_loop(self._endpoint, lambda: self._endpoint.caller.cast(self.name, name, encoded))

    def ping(self) -> Future[float]:
        """The seconds that a call there and back takes; waits while the member starts."""
        begun = time.monotonic()
        return self.call(PING).then(lambda _: time.monotonic() - begun)

    def __repr__(self) -> str:
        return f"RoleActor({self.name!r})"


class RoleGroup(Sequence[RoleActor]):
    """The members of one role or of several, in rank order: `RoleGroup("actor")`, or
    `RoleGroup("agents", roles=["actor", "learner"])` with the roles as given, then by rank.

    Raises `MisuseError` for a role that the job does not have; with `optional=True` the group is
    empty then. Indexing gives a `RoleActor`, slicing a group.
    """

    def __init__(
        self, name: str | None = None, roles: Sequence[str] | None = None, *, optional: bool = False
    ) -> None:
        if isinstance(roles, str):
            raise MisuseError(f"roles={roles!r}: give a list of role names")
        wanted = [name] if roles is None and name is not None else list(roles or ())
        if not wanted:
            raise MisuseError("RoleGroup() needs the name of a role, or roles=[...]")
        here = context.current()
        self.name = name or "+".join(wanted)
        self._endpoint = here.endpoint
        self._actors = [
            RoleActor(info, here.endpoint)
            for role in wanted
            for info in _members(here.directory, role, optional)
        ]
        self._return_exceptions = False

    def options(
        self, *, timeout: float | None = None, return_exceptions: bool = False
    ) -> RoleGroup:
        """The same members, called with a deadline of `timeout` seconds each; `return_exceptions`:
        failures stand in the list of results instead of being raised together."""
        group = copy.copy(self)
        group._actors = [actor.options(timeout=timeout) for actor in self._actors]
        group._return_exceptions = return_exceptions
        return group

    # -- as a sequence ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._actors)

    @overload
    def __getitem__(self, index: int) -> RoleActor: ...

    @overload
    def __getitem__(self, index: slice) -> RoleGroup: ...

    def __getitem__(self, index: int | slice) -> RoleActor | RoleGroup:
        if isinstance(index, slice):
            group = copy.copy(self)
            group._actors = self._actors[index]
            return group
        try:
            return self._actors[index]
        except IndexError:
            raise IndexError(f"{self!r} has no member {index}") from None

    def __iter__(self) -> Iterator[RoleActor]:
        return iter(self._actors)

    def __repr__(self) -> str:
        return f"RoleGroup({self.name!r}, {len(self)} members)"

    # -- calling ------------------------------------------------------------------------------

    def call(self, method: Method, /, *args: Any, **kwargs: Any) -> Future[list[Any]]:
        """Call `method` of every member with the same arguments; results in order.

        Failures come together when all have answered or failed, as one `CallGroupError` that names
        each member (or stand in the list, see `options`). An empty group gives [].
        """
        if "_scatter" in kwargs:
            raise MisuseError("call(_scatter=...): scattering arguments is not there yet")
        name = rpc_name(method)
        encoded = encode_arguments(args, kwargs)
        calls: list[Outgoing] = []
        future = _future(self._endpoint, name, f"role {self.name}", calls)
        gather = _All(future, self._actors, name, self._return_exceptions)
        _on_loop(self._endpoint, lambda: self._start_all(gather, name, encoded, calls))
        return future

    def call_rank0(self, method: Method, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `method` of the first member only."""
        if not self._actors:
            raise MisuseError(f"{self!r}.call_rank0({rpc_name(method)!r}): the group is empty")
        return self[0].call(method, *args, **kwargs)

    def cast(self, method: Method, /, *args: Any, **kwargs: Any) -> None:
        """Call `method` of every member one way."""
        name, encoded = rpc_name(method), encode_arguments(args, kwargs)

        def send() -> None:
            for actor in self._actors:
                self._endpoint.caller.cast(actor.name, name, encoded)

        _on_loop(self._endpoint, send)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return once every member answers calls. Raises `Timeout` naming who does not yet, and what
        calls raise. Blocks: on the peer loop, await `wait_ready_async`."""
        try:
            self.options(timeout=timeout).call(PING).result()
        except CallGroupError as error:
            raise self._not_ready(error, timeout) from error

    async def wait_ready_async(self, timeout: float | None = None) -> None:
        """`wait_ready`, awaited."""
        try:
            await self.options(timeout=timeout).call(PING)
        except CallGroupError as error:
            raise self._not_ready(error, timeout) from error

    def _not_ready(self, error: CallGroupError, timeout: float | None) -> RuntimeFault:
        worse = [cause for cause in error.exceptions if not isinstance(cause, Timeout)]
        if worse or timeout is None:
            return error if len(worse) != 1 or not isinstance(worse[0], RuntimeFault) else worse[0]
        late = ", ".join(f"{failure.role}-{failure.rank}" for failure in error.failures)
        return Timeout(f"{self!r} is not ready after {timeout:g} s; no answer from {late}", timeout)

    def _start_all(self, gather: _All, name: str, encoded: Encoded, calls: list[Outgoing]) -> None:
        if not self._actors:
            gather.finish()
        for index, actor in enumerate(self._actors):
            actor._start_call(name, encoded, calls, _Member(gather, index))


# who waits for the answers, on the loop


class _One:
    """A call whose answer is the future's."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def answered(self, call: Outgoing, value: Any) -> None:
        self._future.set_result(value)

    def failed(self, call: Outgoing | None, error: Exception) -> None:
        self._future.set_exception(error)


class _All:
    """The answers of all members, one future."""

    def __init__(
        self,
        future: Future[list[Any]],
        actors: Sequence[RoleActor],
        method: str,
        return_exceptions: bool,
    ) -> None:
        self._future = future
        self._actors = actors
        self._method = method
        self._return_exceptions = return_exceptions
        self._results: list[Any] = [None] * len(actors)
        self._errors: dict[int, Exception] = {}
        self._left = len(actors)

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
        if self._errors:
            self._future.set_exception(self._failure())
        else:
            self._future.set_result(self._results)

    def _failure(self) -> CallGroupError:
        failures = []
        for index, error in sorted(self._errors.items()):
            info = self._actors[index].info
            cause = error.cause if isinstance(error, PeerLostError) else _headline(error)
            failures.append(Failure(info.role, info.rank, info.host, cause, (), error))
        told = "; ".join(f"{f.role}-{f.rank}: {f.cause}" for f in failures[:8])
        more = f"; and {len(failures) - 8} more" if len(failures) > 8 else ""
        partial = {i: r for i, r in enumerate(self._results) if i not in self._errors}
        return CallGroupError(
            f"{self._method}() failed in {len(failures)} of {len(self._actors)} members: {told}{more}",
            [self._errors[index] for index in sorted(self._errors)],
            failures,
            partial,
        )


class _Member:
    """Hands the answer of one member to the `_All` of its call."""

    __slots__ = ("_all", "_index")

    def __init__(self, all: _All, index: int) -> None:
        self._all = all
        self._index = index

    def answered(self, call: Outgoing, value: Any) -> None:
        self._all.take(self._index, value, None)

    def failed(self, call: Outgoing | None, error: Exception) -> None:
        self._all.take(self._index, None, error)


def _on_loop(endpoint: Endpoint, work: Callable[[], None]) -> None:
    if endpoint.mailbox.on_loop_thread():
        work()
    else:
        endpoint.mailbox.post(work)


def _members(directory: context.Directory, role: str, optional: bool) -> list[ActorInfo]:
    roles = directory.roles()
    found = roles.get(role)
    if not found and not optional:
        known = ", ".join(roles) or "none"
        near = nearest(str(role), roles, quoted=True)
        raise MisuseError(f"the job has no role {role!r}{near}; its roles are: {known}")
    return list(found or ())


def _future(endpoint: Endpoint, method: str, target: str, calls: list[Outgoing]) -> Future[Any]:
    """The result of `calls`, which are still to be made."""
    caller = endpoint.caller

    def describe() -> str:
        open_calls = [call for call in list(calls) if call in caller.table]
        text = f"the result of {method}() of {target}"
        if not open_calls:
            return text
        waits = "; ".join(f"{call.target}: {caller.why(call)}" for call in open_calls[:4])
        more = f"; and {len(open_calls) - 4} more" if len(open_calls) > 4 else ""
        return f"{text}: no answer yet from {waits}{more}"

    def abandon(given_up: Iterable[Outgoing]) -> None:
        for call in given_up:
            caller.abandon(call)

    return Future(endpoint.mailbox, calls, describe, abandon)


def _headline(error: Exception) -> str:
    reason = error.reason if isinstance(error, RuntimeFault) else str(error)
    return reason.partition("\n")[0]

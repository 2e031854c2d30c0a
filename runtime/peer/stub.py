"""Typed stubs of what other roles provide: `@remote("reward", how="batch")` in a `remote_call.py`.

A stub is a function whose body is never run: it has a name, a signature and a role. Callers import it and
call it, as if it were here; type checkers see its parameters, and the result that `how` gives. Providers
say `@rpc(remote_call.stub)`, which takes its name and holds them to its signature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from runtime.errors import MisuseError, nearest
from runtime.peer import batch, context
from runtime.peer.future import Future
from runtime.peer.group import RoleGroup
from runtime.peer.method import Named
from runtime.peer.sequence import FutureSequence

P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V", covariant=True)
W = TypeVar("W", covariant=True)

_FORMS = ("call", "rank0", "batch", "any")


class Stub(Named, Generic[P, V, W]):
    """Made by `remote`. Calling it calls its role, and gives the value (an `async def` stub: something to
    await); `future(...)` gives the `Future` (how="batch": the `FutureSequence`) instead."""

    __name__: str

    def __init__(
        self, function: Callable[..., Any], role: str, how: str, options: dict[str, Any]
    ) -> None:
        super().__init__(function)
        functools.update_wrapper(self, function)
        self._role, self._how, self._options = role, how, options
        self._signature = inspect.signature(function)
        self._awaited = inspect.iscoroutinefunction(function)
        self._group: RoleGroup | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> V:
        """Call the role; blocks, unless the stub is an `async def` or how="batch"."""
        if self._awaited or self._how == "batch":
            return cast(V, self.future(*args, **kwargs))
        if context.current().endpoint.mailbox.on_loop_thread():
            name = self.function.__name__
            raise MisuseError(
                f"the stub {name}() blocks, and this is the peer loop's own thread; use "
                f"`await {name}.future(...)` there, or make the stub `async def`"
            )
        future: Any = self.future(*args, **kwargs)
        return cast(V, future.result())

    def future(self, *args: P.args, **kwargs: P.kwargs) -> W:
        """Call the role without waiting. `MisuseError` for arguments that do not fit the signature."""
        name = self.function.__name__
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise MisuseError(
                f"{name}(): {error}; its signature is {name}{self._signature}"
            ) from None
        group: Any = self._members()
        made: Any
        if self._how == "batch":
            size = batch.common_size(args, kwargs)
            made = group.call_batch(name, size, *args, **kwargs)
        elif self._how == "call":
            made = group.call(name, *args, **kwargs)
        elif self._how == "rank0":
            made = group.call_rank0(name, *args, **kwargs)
        else:
            made = group.call_any(name, *args, **kwargs)
        return cast(W, made)

    def options(
        self,
        *,
        timeout: float | None = None,
        retry: int = 0,
        idempotent: bool = False,
        return_exceptions: bool = False,
    ) -> Stub[P, V, W]:
        """The same stub, called as `RoleGroup.options` says."""
        options = {
            "timeout": timeout,
            "retry": retry,
            "idempotent": idempotent,
            "return_exceptions": return_exceptions,
        }
        return Stub(self.function, self._role, self._how, options)

    def _members(self) -> RoleGroup:
        endpoint = context.current().endpoint
        if self._group is None or self._group._endpoint is not endpoint:
            self._group = RoleGroup(self._role).options(**self._options)
        return self._group

    def __repr__(self) -> str:
        return f"<stub {self.function.__name__} of role {self._role!r}, how={self._how!r}>"


class _All(Protocol):
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> Stub[P, Future[list[R]], Future[list[R]]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Stub[P, list[R], Future[list[R]]]: ...


class _One(Protocol):
    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> Stub[P, Future[R], Future[R]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Stub[P, R, Future[R]]: ...


class _Pieces(Protocol):
    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, Sequence[R]]], /
    ) -> Stub[P, FutureSequence[R], FutureSequence[R]]: ...
    @overload
    def __call__(
        self, function: Callable[P, Sequence[R]], /
    ) -> Stub[P, FutureSequence[R], FutureSequence[R]]: ...


@overload
def remote(role: str, *, how: Literal["call"] = "call") -> _All: ...
@overload
def remote(role: str, *, how: Literal["rank0", "any"]) -> _One: ...
@overload
def remote(role: str, *, how: Literal["batch"]) -> _Pieces: ...
def remote(role: str, *, how: str = "call") -> Any:
    """Make a typed stub: calling the decorated function calls `role` instead.

    `how`: "call" calls every member and gives the list of results, "rank0" the first member, "any" the
    least busy one, "batch" cuts the arguments into pieces (see `RoleGroup.call_batch`; the size is that
    of the arguments that can be cut) and gives a `FutureSequence`.
    """
    if not isinstance(role, str) or not role:
        raise MisuseError(f"@remote({role!r}): say the role, as @remote('actor', how='call')")
    if how not in _FORMS:
        raise MisuseError(
            f"@remote(how={how!r}): no such way{nearest(str(how), _FORMS, quoted=True)}; allowed are: "
            f"{', '.join(_FORMS)}"
        )
    return lambda function: Stub(function, role, how, {})

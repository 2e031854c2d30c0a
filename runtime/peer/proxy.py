"""An object over there, called like one here: `proxy.method(...)` for every `@rpc` method of its class.

Plain methods block until the answer is there; `async def` methods give a future to await, generators a
stream to iterate. The class is only looked at for its methods: it is never constructed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from runtime.errors import MisuseError, NotExposedError, nearest
from runtime.job import ActorInfo
from runtime.peer import context
from runtime.peer.actor import RoleActor
from runtime.peer.endpoint import Endpoint
from runtime.peer.feed import Stream
from runtime.peer.future import Future
from runtime.peer.method import rpc_methods

C = TypeVar("C")


class UserRpcProxy:
    """Made by `create_rpc_proxy`."""

    def __init__(
        self, actor: RoleActor, namespace: str | None, cls: type, endpoint: Endpoint
    ) -> None:
        methods = rpc_methods(cls)
        if not methods:
            raise MisuseError(f"{cls.__qualname__} has no method marked with @rpc")
        self._actor, self._namespace, self._cls, self._endpoint = actor, namespace, cls, endpoint
        # In the instance's own dict, so that a user's method named like one of ours wins.
        for attribute, method in methods.items():
            name = f"{namespace}.{method.name}" if namespace else method.name
            self.__dict__[attribute] = self._method(getattr(cls, attribute), name)

    def options(
        self, *, timeout: float | None = None, retry: int = 0, idempotent: bool = False
    ) -> UserRpcProxy:
        """The same object, called with a deadline of `timeout` seconds; see `RoleActor.options`."""
        actor = self._actor.options(timeout=timeout, retry=retry, idempotent=idempotent)
        return UserRpcProxy(actor, self._namespace, self._cls, self._endpoint)

    def _method(self, function: Any, name: str) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            return _streamed(self._actor, name)
        if inspect.iscoroutinefunction(function):
            return _awaited(self._actor, name)
        return self._blocking(name)

    def _blocking(self, name: str) -> Callable[..., Any]:
        actor, endpoint = self._actor, self._endpoint

        def call(*args: Any, **kwargs: Any) -> Any:
            if endpoint.mailbox.on_loop_thread():
                raise MisuseError(
                    f"{name}() of a proxy blocks, and this is the peer loop's own thread; use "
                    f"`await RoleActor.call({name!r}, ...)`, or make the method `async def`"
                )
            return actor.call(name, *args, **kwargs).result()

        call.__name__ = name
        return call

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        names = sorted(rpc_methods(self._cls))
        raise NotExposedError(
            f"{self._cls.__qualname__}.{attribute} is not marked with @rpc"
            f"{nearest(attribute, names, quoted=True)}; marked are: {', '.join(names)}",
            names,
        )

    def __repr__(self) -> str:
        inner = f"{self._namespace}: " if self._namespace else ""
        return f"<proxy of {inner}{self._cls.__qualname__} in {self._actor.name}>"


def _awaited(actor: RoleActor, name: str) -> Callable[..., Future[Any]]:
    def call(*args: Any, **kwargs: Any) -> Future[Any]:
        return actor.call(name, *args, **kwargs)

    call.__name__ = name
    return call


def _streamed(actor: RoleActor, name: str) -> Callable[..., Stream[Any]]:
    def call(*args: Any, **kwargs: Any) -> Stream[Any]:
        return actor.stream(name, *args, **kwargs)

    call.__name__ = name
    return call


def create_rpc_proxy(owner: str | RoleActor | ActorInfo, name: str | None, cls: type[C]) -> C:
    """The instance exported as `name` by `owner`: an actor's name ("actor-3"; "actor" is its rank 0),
    a `RoleActor` or an `ActorInfo`. `name` None or "": one exported without a name, as the entry class
    is. The result is a `UserRpcProxy`; it is typed as `cls`, whose methods it has.

    Raises `MisuseError` for an unknown owner, or a class without `@rpc` methods.
    """
    here = context.current()
    if isinstance(owner, RoleActor):
        actor = owner
    elif isinstance(owner, ActorInfo):
        actor = RoleActor(owner, here.endpoint)
    else:
        actor = RoleActor(find_actor(here.directory, owner), here.endpoint)
    return cast(C, UserRpcProxy(actor, name, cls, here.endpoint))


def find_actor(directory: context.Directory, name: str) -> ActorInfo:
    """The planned actor of that name; a role's name means its rank 0. `MisuseError` listing all."""
    roles = directory.roles()
    if roles.get(name):
        return roles[name][0]
    known = {info.name: info for actors in roles.values() for info in actors}
    if name in known:
        return known[name]
    listed = ", ".join(list(known)[:40]) or "none"
    raise MisuseError(
        f"the job has no actor {name!r}{nearest(str(name), known, quoted=True)}; its actors are: {listed}"
    )


def export_rpc_method(name: str, func: Callable[..., Any]) -> None:
    """Let other processes call `func` as `name`. Again for the same function: nothing. Raises
    `MisuseError` when the name belongs to another one."""
    context.current().endpoint.export(name, func)


def export_rpc_instance(namespace: str | None, instance: object) -> None:
    """Let other processes call every `@rpc` method of `instance`, as "namespace.method" (or "method").
    Raises `MisuseError` as `export_rpc_method` does, and for an object without such methods."""
    context.current().endpoint.export_instance(namespace, instance)

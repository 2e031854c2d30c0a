"""The members of a role, or of several, and the ways to call them: all, one, the least busy, in pieces.

Arguments are encoded once, on the caller's thread; what they are for each member is decided in `batch`,
who waits for the answers in `gather`, `balance`, `sequence` and `feed`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from runtime.errors import CallGroupError, MisuseError, RuntimeFault, Timeout, nearest
from runtime.job import ActorInfo
from runtime.peer import batch, context, gather, holding
from runtime.peer.actor import Method, RoleActor
from runtime.peer.balance import Balanced
from runtime.peer.calls import DEFAULT, CallOptions, Outgoing
from runtime.peer.endpoint import PING
from runtime.peer.feed import Feed, Source, Stream
from runtime.peer.future import Future
from runtime.peer.method import rpc_name
from runtime.peer.sequence import FutureSequence, Part, piece_check
from runtime.wire.codec import Encoded, encode_arguments

_AGAIN: Mapping[str, Any] = {"retry": 5, "idempotent": True}


class RoleGroup(Sequence[RoleActor]):
    """The members of one role or of several, in rank order: `RoleGroup("actor")`, or
    `RoleGroup("agents", roles=["actor", "learner"])` with the roles as given, then by rank.

    Raises `MisuseError` for a role that the job does not have; with `optional=True` the group is
    empty then. Indexing gives a `RoleActor`, slicing a group. What is called is given by name or as a
    function; arguments that cannot be sent are a `MisuseError` before anything is sent.
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
        self._options = DEFAULT
        self._return_exceptions = False
        self._turn = itertools.count(here.endpoint.caller.sent)

    def options(
        self,
        *,
        timeout: float | None = None,
        retry: int = 0,
        idempotent: bool = False,
        return_exceptions: bool = False,
    ) -> RoleGroup:
        """The same members, called with these options and no others: a deadline of `timeout` seconds; an `idempotent` call is
        sent again up to `retry` times when a member dies before it answers, to its next start.
        `return_exceptions`: failures stand among the results instead of being raised together."""
        group = copy.copy(self)
        group._options = gather.checked_options(timeout, retry, idempotent)
        group._actors = [
            RoleActor(actor.info, self._endpoint, group._options) for actor in self._actors
        ]
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

    def __copy__(self) -> RoleGroup:
        group = RoleGroup.__new__(RoleGroup)
        vars(group).update(vars(self))
        return group

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value for key, value in vars(self).items() if key not in {"_endpoint", "_turn"}
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Where it arrives, its members are called from there."""
        vars(self).update(state)
        self._endpoint = context.current().endpoint
        self._turn = itertools.count(self._endpoint.caller.sent)

    # -- calling all --------------------------------------------------------------------------

    def call(
        self, method: Method, /, *args: Any, _scatter: bool = False, **kwargs: Any
    ) -> Future[list[Any]]:
        """Call `method` of every member with the same arguments; results in order. `_scatter`: each
        argument is a list of as many items as there are members, one for each.

        Failures come together when all have answered or failed, as one `CallGroupError` that names
        each member (or stand in the list, see `options`). An empty group gives [].
        """
        name = rpc_name(method)
        if not _scatter:
            return self._call_all(name, encode_arguments(args, kwargs))
        given = batch.scattered(len(self), args, kwargs)
        parcels = [encode_arguments(own, named) for own, named in given]
        options = gather.here(self._options)
        return self._gathered(
            name,
            [self._prepared([actor], parcel) for actor, parcel in zip(self, parcels, strict=True)],
            options,
        )

    def broadcast(
        self,
        state_dict: Mapping[str, Any],
        method: Method = "load_weights",
        *,
        version: int | None = None,
    ) -> Future[list[Any]]:
        """Give weights to every member: `method(state_dict)` is called once in each, or
        `method(state_dict, version=version)` where a version is given. What it returns comes in order.

        The tensors are serialized once and copied once a host; each member gets views of its own, to
        keep and to write to. They are taken as they are now, except those that the host's shared
        memory has no room for: do not change these before the future is done.
        """
        if not isinstance(state_dict, Mapping):
            raise MisuseError(
                f"broadcast({type(state_dict).__name__}): give a state dict, tensors by name"
            )
        # A plain dict: an `OrderedDict` as modules make it would travel as one pickle.
        named = {} if version is None else {"version": version}
        name, options = rpc_name(method), gather.here(self._options)
        parcel = self._prepared(self._actors, encode_arguments([dict(state_dict)], named))
        infos = [actor.info for actor in self._actors]
        shipments, parcels = holding.shipments(self._endpoint, infos, parcel, options)
        for shipment in shipments:
            self._endpoint.mailbox.run(shipment.start)
        future = self._gathered(name, parcels, options)
        for shipment in shipments:
            future.add_done_callback(shipment.over)
        return future

    def cast(self, method: Method, /, *args: Any, **kwargs: Any) -> None:
        """Call `method` of every member one way."""
        name = rpc_name(method)
        parcel = self._prepared(self._actors, encode_arguments(args, kwargs))

        def send() -> None:
            for actor in self._actors:
                self._endpoint.caller.cast(actor.name, name, parcel)

        self._endpoint.mailbox.run(send)

    def stream(self, method: Method, /, *args: Any, **kwargs: Any) -> Stream[tuple[int, Any]]:
        """Call `method` of every member: (rank, result) as they arrive, for `for` or `async for`; of a
        generator method (rank, item) for each item. The rank is the member's place in this group.

        What members fail with is raised together after the results of the others, or comes as a result
        (see `options`). Closing or dropping the stream gives up what has not arrived.
        """
        name, options = rpc_name(method), gather.here(self._options)
        parcel = self._prepared(self._actors, encode_arguments(args, kwargs))
        infos = [actor.info for actor in self._actors]
        feed = Feed[tuple[int, Any]](
            self._endpoint,
            name,
            f"role {self.name}",
            len(infos),
            lambda errors: gather.group_error(name, infos, errors, {}),
        )
        request = name, parcel, options
        feed.open(
            (info.name, Source(feed, rank, self._wrap(rank), self._return_exceptions), request)
            for rank, info in enumerate(infos)
        )
        return Stream(feed)

    # -- calling some -------------------------------------------------------------------------

    def call_rank0(self, method: Method, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `method` of the first member only."""
        self._refuse_empty("call_rank0", method)
        return self[0].call(method, *args, **kwargs)

    def call_any(self, method: Method, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `method` of the member that has the fewest calls of this process to answer; equals take
        turns. An `idempotent` call (see `options`) moves on when its member is lost."""
        self._refuse_empty("call_any", method)
        name, options = rpc_name(method), gather.here(self._options)
        first = next(self._turn) % len(self)
        names = [actor.name for actor in (*self._actors[first:], *self._actors[:first])]
        likely = min(names, key=self._endpoint.caller.table.load)
        parcel = gather.prepared(
            self._endpoint, [likely], encode_arguments(args, kwargs), self._options
        )
        calls: list[Outgoing] = []
        future = gather.future_of(self._endpoint, name, f"any of {self.name}", calls)
        request = name, parcel, options
        self._endpoint.mailbox.run(Balanced(self._endpoint, names, request, future, calls).start)
        return future

    def call_batch(
        self, method: Method, size: int, /, *args: Any, **kwargs: Any
    ) -> FutureSequence[Any]:
        """Cut a batch of `size` items into pieces of ceil(size / members), and call each member that
        gets one with its piece; the results are one sequence of `size` items.

        Sequences, tensors, arrays and `BatchedDataDict`s are cut (tensors along dim 0) and must be
        `size` long, else `MisuseError`; texts, bytes, dicts and `Whole(x)` go whole to each. `method`
        returns a sequence as long as its piece.
        """
        self._refuse_empty("call_batch", method)
        name = rpc_name(method)
        pieces = batch.pieces(size, len(self), args, kwargs)
        members = self._actors[: len(pieces)]
        parcels = [encode_arguments(piece.args, piece.kwargs) for piece in pieces]
        options = gather.here(self._options)
        requests = [
            (name, self._prepared([actor], parcel), options)
            for actor, parcel in zip(members, parcels, strict=True)
        ]
        parts, starts = [], []
        for actor, piece, request in zip(members, pieces, requests, strict=True):
            calls: list[Outgoing] = []
            future = gather.future_of(self._endpoint, name, actor.name, calls)
            parts.append(Part(piece.start, piece.stop, actor.info, future))
            waiter = gather.One(future, piece_check(name, actor.info, piece))
            starts.append((actor.name, request, waiter, calls))
        together: list[Outgoing] = []
        self._endpoint.mailbox.run(self._start, starts, together)
        return FutureSequence(self._endpoint, name, parts, together, self._return_exceptions)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return once every member answers calls, one that dies and is started again from its next start. Raises
        `Timeout` naming who does not yet, and what calls raise. Blocks: on the peer loop, await `wait_ready_async`."""
        if self._endpoint.mailbox.on_loop_thread():
            raise MisuseError(
                f"{self!r}.wait_ready() would block the peer loop's own thread; use "
                "`await group.wait_ready_async()` there"
            )
        try:
            self.options(timeout=timeout, **_AGAIN).call(PING).result()
        except CallGroupError as error:
            raise self._not_ready(error, timeout) from error

    async def wait_ready_async(self, timeout: float | None = None) -> None:
        """`wait_ready`, awaited."""
        try:
            await self.options(timeout=timeout, **_AGAIN).call(PING)
        except CallGroupError as error:
            raise self._not_ready(error, timeout) from error

    # -- inside -------------------------------------------------------------------------------

    def _not_ready(self, error: CallGroupError, timeout: float | None) -> RuntimeFault:
        worse = [cause for cause in error.exceptions if not isinstance(cause, Timeout)]
        if worse or timeout is None:
            return error if len(worse) != 1 or not isinstance(worse[0], RuntimeFault) else worse[0]
        late = ", ".join(f"{failure.role}-{failure.rank}" for failure in error.failures)
        return Timeout(f"{self!r} is not ready after {timeout:g} s; no answer from {late}", timeout)

    def _refuse_empty(self, form: str, method: Method) -> None:
        if not self._actors:
            raise MisuseError(f"{self!r}.{form}({rpc_name(method)!r}): the group is empty")

    def _prepared(self, actors: Sequence[RoleActor], parcel: Encoded) -> Encoded:
        targets = [actor.name for actor in actors]
        return gather.prepared(self._endpoint, targets, parcel, self._options)

    def _call_all(self, name: str, parcel: Encoded) -> Future[list[Any]]:
        parcel = self._prepared(self._actors, parcel)
        return self._gathered(name, [parcel] * len(self), gather.here(self._options))

    def _gathered(
        self, name: str, parcels: Sequence[Encoded], options: CallOptions
    ) -> Future[list[Any]]:
        calls: list[Outgoing] = []
        future = gather.future_of(self._endpoint, name, f"role {self.name}", calls)
        infos = [actor.info for actor in self._actors]
        together = gather.All(future, infos, name, self._return_exceptions)
        if not infos:
            together.finish()
        starts = [
            (info.name, (name, parcel, options), gather.Member(together, place), calls)
            for place, (info, parcel) in enumerate(zip(infos, parcels, strict=True))
        ]
        self._endpoint.mailbox.run(self._start, starts)
        return future

    def _start(
        self,
        starts: Sequence[tuple[str, gather.Request, Any, list[Outgoing]]],
        together: list[Outgoing] | None = None,
    ) -> None:
        for target, request, waiter, calls in starts:
            gather.start(self._endpoint, target, request, waiter, calls)
            if together is not None:
                together += calls

    def _wrap(self, rank: int) -> Any:
        return lambda item: (rank, item)


def _members(directory: context.Directory, role: str, optional: bool) -> list[ActorInfo]:
    roles = directory.roles()
    found = roles.get(role)
    if not found and not optional:
        known = ", ".join(roles) or "none"
        near = nearest(str(role), roles, quoted=True)
        raise MisuseError(f"the job has no role {role!r}{near}; its roles are: {known}")
    return list(found or ())

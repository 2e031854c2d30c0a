"""The arena in one process: several members share it, each as a process of its own would."""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import WireError
from runtime.transport import arena
from runtime.transport.arena import LEAST_BYTES, Arena, ArenaSpec
from runtime.transport.arena_keeper import Keeper
from runtime.transport.arena_table import BUDGETS, EXTENT
from runtime.wire.frames import Buffer

SIZE = 8 * EXTENT
KIB = 1024
LARGE = 300 * KIB + 5


class Host:
    """A keeper and its members."""

    def __init__(self, members: int = 4, size: int = SIZE) -> None:
        self.keeper = Keeper(size, members)
        self.members = [Arena(self.keeper.spec(place)) for place in range(members)]

    def restart(self, place: int) -> Arena:
        """The member dies (its views stay where they are) and comes back."""
        self.members[place].close()
        self.members[place]._pid = 0  # no finalizer of it runs any more
        self.keeper.reclaim(place)
        self.members[place] = Arena(self.keeper.spec(place))
        return self.members[place]

    def free(self) -> bool:
        """Whether nothing is in use; members find out about their own slots as they allocate."""
        for member in self.members:
            member.stage(b"x" * LEAST_BYTES)
        return self.keeper.statistics().rows == 0

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.keeper.close()


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    gc.freeze()  # `gc.collect` looks at what the test makes, not at what a thousand others left
    yield host
    gc.unfreeze()
    host.close()


def text(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def send(data: Buffer, sender: Arena, receiver: Arena) -> memoryview:
    handle = sender.share(data, receiver.index)
    assert handle is not None
    assert len(handle) <= 64
    return receiver.open(handle)


@pytest.mark.parametrize("size", [LEAST_BYTES, LARGE, 3 * 1024 * KIB, EXTENT, 2 * EXTENT + 1])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_buffer_arrives(host: Host, size: int, kind: Callable[[bytes], Buffer]) -> None:
    data = text(size)
    one, other, *_ = host.members
    assert send(kind(data), one, other) == data
    gc.collect()
    assert host.free()


def test_any_contiguous_format_is_staged_as_bytes(host: Host) -> None:
    one = host.members[0]
    for source in (
        torch.arange(LARGE).numpy(),
        memoryview(bytes(LARGE * 16)).cast("d", [LARGE, 2]),
    ):
        view = one.stage(memoryview(source))
        assert view is not None
        assert view.format == "B"
        assert view == memoryview(source).cast("B")


def test_small_buffers_are_not_worth_it(host: Host) -> None:
    one, other, *_ = host.members
    assert one.stage(bytes(LEAST_BYTES - 1)) is None
    assert one.share(bytes(LEAST_BYTES - 1), other.index) is None


def test_what_is_staged_goes_to_many_without_a_copy(host: Host) -> None:
    one, *others = host.members
    view = one.stage(text(LARGE))
    assert view is not None
    assert one.is_staged(view)
    assert one.is_staged(view[100:5000])
    assert not one.is_staged(text(LARGE))
    seen = [send(view, one, other) for other in others]
    part = send(view[100:200_000], one, others[0])
    assert host.keeper.statistics().rows == 1
    assert all(got == view for got in seen)
    assert part == view[100:200_000]


def test_nobody_sees_what_a_receiver_writes(host: Host) -> None:
    one, other, third, _ = host.members
    view = one.stage(text(LARGE))
    assert view is not None
    mine, theirs = send(view, one, other), send(view, one, third)
    mine[:] = bytes(LARGE)
    assert view == theirs == text(LARGE)
    del mine
    again = send(view, one, other)
    assert again == text(LARGE), "nor does the next view of the same process"


def test_a_view_goes_on_to_others_without_a_copy(host: Host) -> None:
    one, other, third, _ = host.members
    first = send(text(LARGE), one, other)
    assert other.is_staged(first)
    second = send(first, other, third)
    assert host.keeper.statistics().rows == 1
    del first
    assert second == text(LARGE), "it stays when the one in the middle lets go"
    del second
    assert host.free()


def test_a_view_that_was_written_to_is_sent_as_it_is_now(host: Host) -> None:
    one, other, third, _ = host.members
    first = send(text(LARGE), one, other)
    first[70_000] ^= 0xFF
    assert not other.is_staged(first)
    second = send(first, other, third)
    assert second == first
    assert second != text(LARGE)


def test_a_slot_lives_until_the_last_handle_of_several_is_done(host: Host) -> None:
    one, other, *_ = host.members
    view = one.stage(text(LARGE))
    assert view is not None
    handles = [one.share(view, other.index) for _ in range(3)]
    del view
    for handle in handles[:2]:
        assert handle is not None
        assert other.open(handle) == text(LARGE)
        one.stage(bytes(LARGE))
    assert handles[2] is not None
    other.discard(handles[2])
    assert host.free()


def test_no_more_than_127_handles_are_on_their_way_to_one_member(host: Host) -> None:
    one, other, *_ = host.members
    view = one.stage(text(LARGE))
    assert view is not None
    handles = [one.share(view, other.index) for _ in range(130)]
    assert [handle is not None for handle in handles] == [True] * 127 + [False] * 3
    views = [other.open(handle) for handle in handles[:127] if handle]
    assert one.share(view, other.index) is not None
    assert all(got == view for got in views)


def test_a_handle_that_was_never_sent_is_taken_back(host: Host) -> None:
    one, other, *_ = host.members
    handle = one.share(text(LARGE), other.index)
    assert handle is not None
    one.revoke(handle, other.index)
    with pytest.raises(WireError, match="stale"):
        other.open(handle)
    assert host.free()


def test_a_handle_opens_once_and_only_while_its_slot_is_what_it_was(host: Host) -> None:
    one, other, third, _ = host.members
    handle = one.share(text(LARGE), other.index)
    assert handle is not None
    with pytest.raises(WireError, match="stale"):
        third.open(handle)
    view = other.open(handle)
    for use in (other.open, other.discard):
        with pytest.raises(WireError, match="stale"):
            use(handle)
    del view
    again = one.share(text(LARGE, 1), other.index)
    assert again is not None
    with pytest.raises(WireError, match="stale"):
        other.open(handle)
    assert other.open(again) == text(LARGE, 1)


@pytest.mark.parametrize("flip", [0, 8, 10, 12, 15, 19, 22, 27, 31])
def test_garbage_is_no_handle(host: Host, flip: int) -> None:
    one, other, *_ = host.members
    handle = one.share(text(LARGE), other.index)
    assert handle is not None
    bad = bytearray(handle)
    bad[flip] ^= 0x80
    for garbage in (bytes(bad), handle[:-1], b"", handle + b"x"):
        with pytest.raises(WireError, match="stale"):
            other.open(garbage)
    assert other.open(handle) == text(LARGE)


def test_a_tensor_made_of_a_view_keeps_it(host: Host) -> None:
    one, other, *_ = host.members
    tensor = torch.frombuffer(send(text(LARGE), one, other), dtype=torch.uint8)
    nested = {"a": [tensor[100:].view(5, -1)]}
    del tensor
    gc.collect()
    one.stage(bytes(LARGE))
    assert not host.free()
    assert bytes(nested["a"][0].flatten().tolist()) == text(LARGE)[100:]
    nested["a"][0].add_(1)
    cycle: list[object] = [nested.pop("a")]
    cycle.append(cycle)
    del cycle
    assert not host.free()
    gc.collect()
    assert host.free()


def test_views_cost_no_file_descriptors(host: Host) -> None:
    one, other, *_ = host.members
    data = text(LEAST_BYTES)
    before = len(os.listdir("/proc/self/fd"))
    staged = one.stage(data)
    assert staged is not None
    views = [send(staged, one, other) for _ in range(100)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # each member's own
    assert all(view == data for view in views)


def test_a_process_without_more_mappings_gets_a_copy(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, *_ = host.members
    data = text(LARGE)
    handle = one.share(data, other.index)
    assert handle is not None
    monkeypatch.setattr(arena, "_libc", SimpleNamespace(mmap=lambda *_: arena._MAP_FAILED))
    view = other.open(handle)
    assert view == data
    view[0] ^= 1  # its own
    monkeypatch.undo()
    assert host.free()


def test_a_full_arena_is_no_error(host: Host) -> None:
    one, other, *_ = host.members
    views = []
    while (view := one.stage(bytes(EXTENT), "queue")) is not None:
        views.append(view)
    assert len(views) == 4, "six tenths of eight extents"
    assert one.share(bytes(EXTENT), other.index) is not None, "other uses have their part"
    while other.stage(bytes(EXTENT)) is not None and len(views) < 99:
        views.append(other.stage(bytes(EXTENT), "checkpoint"))
    assert one.stage(bytes(9 * EXTENT)) is None
    assert one.share(bytes(9 * EXTENT), other.index) is None


def test_a_budget_is_that_of_all_members(host: Host) -> None:
    one, other, *_ = host.members
    views = [one.stage(bytes(2 * EXTENT), "queue"), other.stage(bytes(2 * EXTENT), "queue")]
    assert all(views)
    assert host.members[2].stage(bytes(EXTENT), "queue") is None
    assert host.members[2].stage(bytes(EXTENT), "rpc") is not None


def test_what_a_budget_has_no_room_for_takes_none_from_the_others(host: Host) -> None:
    one, other, *_ = host.members
    kinds = list(BUDGETS)

    def used() -> list[int]:
        return [sum(one._table.used[kinds.index(k) :: len(kinds)]) // EXTENT for k in kinds]

    data = text(EXTENT)
    kept = [one.staged(data, "queue") for _ in range(5)]
    assert [one.is_staged(view) for view in kept] == [True] * 4 + [False]
    assert kept[4] == data, "it is what it was"
    assert used() == [0, 4, 0]
    assert one.share(kept[4], other.index) is None, "nor is it staged when it is sent"
    assert one.staged(kept[4], "rpc") == data
    assert used() == [0, 4, 0]
    view = send(data, one, other)
    assert view == data
    assert used() == [1, 4, 0]
    small = text(LEAST_BYTES - 1)
    assert one.staged(small, "queue") is small


def test_there_is_no_room_without_a_row() -> None:
    host = Host(members=254, size=16 * EXTENT)
    one = host.members[0]
    views = [one.stage(bytes(LEAST_BYTES)) for _ in range(33)]
    assert [view is not None for view in views] == [True] * 32 + [False]
    views.clear()
    assert one.stage(bytes(LEAST_BYTES)) is not None
    host.close()


def test_a_budget_that_is_full_costs_nobody_warm_memory(host: Host) -> None:
    one = host.members[0]
    kept = one.stage(bytes(EXTENT), "queue")
    one.stage(bytes(EXTENT), "queue")
    assert kept is not None
    assert one.stage(bytes(5 * EXTENT), "queue") is None
    assert host.keeper.statistics().extents == 2


def test_memory_is_used_again_before_new_memory_is(host: Host) -> None:
    one, other, *_ = host.members
    for seed in range(20):
        assert send(bytes([seed]) * EXTENT, one, other)[-1] == seed
    assert host.keeper.statistics().extents <= 2


def test_free_extents_go_to_who_needs_them(host: Host) -> None:
    one, other, *_ = host.members
    held = [one.stage(bytes(EXTENT)) for _ in range(3)]
    again = [one.stage(bytes(EXTENT), "checkpoint") for _ in range(4)]
    assert all(held + again)
    again.clear()
    wanted = bytes(3 * EXTENT)
    assert other.stage(wanted) is None
    found = None
    for _ in range(300):
        if (found := other.stage(wanted, "queue")) is not None:
            break
        threading.Event().wait(0.02)
    assert found is not None


def test_handles_for_a_process_that_has_died_are_refused(host: Host) -> None:
    one, other, *_ = host.members
    before = other.index
    handle = one.share(text(LARGE), before)
    after = host.restart(1)
    assert one.share(text(LARGE), before) is None
    assert handle is not None
    with pytest.raises(WireError, match="stale"):
        after.open(handle)
    assert send(text(LARGE), one, after) == text(LARGE)
    assert host.free()


def test_a_closed_arena_shares_nothing_and_its_views_stay(host: Host) -> None:
    one, other, *_ = host.members
    view, handle = send(text(LARGE), one, other), one.share(text(LARGE), other.index)
    other.close()
    assert other.stage(bytes(LARGE)) is None
    assert other.share(bytes(LARGE), one.index) is None
    assert handle is not None
    with pytest.raises(WireError, match="closed"):
        other.open(handle)
    assert view == text(LARGE)


def test_a_file_descriptor_that_somebody_closed_is_missed(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    one, other, *_ = host.members
    fd = one._table.fd
    os.close(fd)
    taken = os.open(os.devnull, os.O_RDWR)
    assert taken == fd, "the number is in use for something else by now"
    with caplog.at_level(logging.DEBUG):
        assert one.stage(bytes(LARGE)) is None
        assert one.share(bytes(LARGE), other.index) is None
    os.close(taken)
    assert [r.levelname for r in caplog.records if "arena" in r.message] == ["DEBUG"]


def test_there_may_be_no_arena(caplog: pytest.LogCaptureFixture) -> None:
    assert Arena.attach(None) is None
    assert Arena.attach(ArenaSpec("/proc/self/fd/9999", 0)) is None
    assert Arena.attach(ArenaSpec(os.devnull, 0)) is None


def test_threads_stage_at_once(host: Host) -> None:
    one, other, *_ = host.members
    wrong: list[int] = []

    def work(seed: int) -> None:
        data = text(LARGE, seed)
        for _ in range(30):
            view = one.stage(data)
            if view is None or view != data:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        assert send(text(LARGE, 9), one, other) == text(LARGE, 9)
    for thread in threads:
        thread.join()
    assert not wrong
    assert host.free()


STEP = st.tuples(
    st.sampled_from(["stage", "share", "open", "discard", "drop", "forget", "forward", "write"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(LEAST_BYTES // KIB, 200),
)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(STEP, max_size=40))
def test_whatever_is_done_contents_stay_and_all_is_free_at_the_end(
    host: Host, steps: list[tuple[str, int, int, int]]
) -> None:
    staged: list[tuple[int, memoryview, bytes]] = []
    sent: list[tuple[int, bytes, bytes]] = []
    opened: list[tuple[int, memoryview, bytes]] = []
    for number, (kind, one, other, size) in enumerate(steps):
        if kind == "stage":
            data = number.to_bytes(2, "big") * (size * KIB // 2)
            if (view := host.members[one].stage(data)) is not None:
                staged.append((one, view, data))
        elif kind in ("share", "forward"):
            pool = staged if kind == "share" else opened
            if pool:
                who, view, data = pool[size % len(pool)]
                handle = host.members[who].share(view, host.members[other].index)
                if handle is not None:
                    sent.append((other, handle, data))
        elif kind in ("open", "discard") and sent:
            who, handle, data = sent.pop(size % len(sent))
            if kind == "open":
                opened.append((who, host.members[who].open(handle), data))
            else:
                host.members[who].discard(handle)
        elif kind == "drop" and staged:
            staged.pop(size % len(staged))
        elif kind == "forget" and opened:
            opened.pop(size % len(opened))
        elif kind == "write" and opened:
            place = size % len(opened)
            who, view, data = opened[place]
            view[0] ^= 0xFF
            opened[place] = (who, view, bytes([view[0]]) + data[1:])
        changed = [number for _, view, data in staged + opened if view[::997] != data[::997]]
        assert not changed
    for who, handle, data in sent:
        assert host.members[who].open(handle) == data
    view = None
    staged.clear()
    opened.clear()
    gc.collect()
    assert host.free()

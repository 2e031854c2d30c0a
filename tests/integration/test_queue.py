"""Queues between real processes: who is killed, and what is there afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.integration.support.job import Job

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]


def _role(name: str, entry: str, *, total: int = 1, driver: bool = True) -> str:
    return (
        f'[roles.{name}]\nentry = "{entry}.py"\nkind = "simple"\ntotal = {total}\n'
        f'driver = {str(driver).lower()}\nrestart = {{ policy = "one", max = 1 }}\n'
    )


def _lines(job: Job) -> list[str]:
    return [re.sub(r"^\[[^\]]*\] ", "", line) for line in job.out.splitlines()]


def _run(launch: Launch, write: Write, roles: str, **programs: str) -> list[str]:
    write("job.toml", roles)
    for name, text in programs.items():
        write(f"{name}.py", "import os, signal, sys, time\nfrom runtime import DataQueue\n" + text)
    job = launch("--timeout", "60", "--job", "job.toml")
    assert job.wait(70) == 0, job.describe()
    assert "Traceback" not in job.err
    job.assert_nothing_left()
    return _lines(job)


def test_what_was_put_is_there_although_its_producer_is_killed_right_after(
    launch: Launch, write: Write
) -> None:
    producer = """
queue = DataQueue("q")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    for number in range(500):
        queue.put(number)
    os.kill(os.getpid(), signal.SIGKILL)
queue.put("end")
"""
    consumer = """
queue, got = DataQueue("q", is_master=True, size=10_000), []
while "end" not in got:
    got += queue.get(100)
print("in order", got == [*range(500), "end"])
"""
    roles = _role("producer", "producer") + _role("consumer", "consumer")
    lines = _run(launch, write, roles, producer=producer, consumer=consumer)
    assert "in order True" in lines


def test_leased_items_of_a_killed_consumer_go_to_the_next_first_and_in_order(
    launch: Launch, write: Write
) -> None:
    consumer = """
queue = DataQueue("q")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    leased = queue.get(4, min_size=4, lease=True)
    leased[1].ack()
    os.kill(os.getpid(), signal.SIGKILL)
again = queue.get(10, lease=True)
print("again", [item.value for item in again])
for item in again:
    item.ack()
queue.close()
"""
    owner = """
queue = DataQueue("q", is_master=True)
queue.put(*range(6))
while queue.statistics().put_total and not queue.statistics().closed:
    time.sleep(0.02)
"""
    roles = _role("owner", "owner") + _role("consumer", "consumer")
    lines = _run(launch, write, roles, owner=owner, consumer=consumer)
    assert "again [0, 2, 3, 4, 5]" in lines


def test_waiting_puts_and_gets_go_on_with_the_next_owner(launch: Launch, write: Write) -> None:
    owner = """
queue = DataQueue("q", is_master=True, size=2)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    while queue.statistics().waiting_producers == 0:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
for item in queue:
    print("got", item, flush=True)
"""
    producer = """
queue = DataQueue("q")
queue.put("a", "b")
queue.put("c", "d", timeout=50)
queue.close()
"""
    lines = _run(
        launch,
        write,
        _role("owner", "owner") + _role("producer", "producer"),
        owner=owner,
        producer=producer,
    )
    assert [line for line in lines if line.startswith("got")][-2:] == ["got c", "got d"]


def test_a_second_owner_is_refused_by_name_while_the_first_lives(
    launch: Launch, write: Write
) -> None:
    owner = """
try:
    queue = DataQueue("q", is_master=True)
except ValueError as error:
    print("refused", error, flush=True)
    DataQueue("q").put("refused")
else:
    print("owner got", queue.get())
"""
    lines = _run(launch, write, _role("owner", "owner", total=2), owner=owner)
    assert "owner got ['refused']" in lines
    assert any(line.startswith("refused") and "owned by owner-" in line for line in lines)


def test_many_producers_and_consumers_share_large_and_small_items(
    launch: Launch, write: Write
) -> None:
    producer = """
rank, queue = int(os.environ["RANK"]), DataQueue("q")
for number in range(100):
    queue.put((rank, number), bytes(200_000) if number % 20 == 0 else b"")
"""
    consumer = """
from runtime import kv
queue, got = DataQueue("q"), []
for item in queue:
    got.append(item)
kv.put("got-" + os.environ["RANK"], [x for x in got if isinstance(x, tuple)])
print("bytes", sum(len(x) for x in got if isinstance(x, bytes)), flush=True)
"""
    owner = """
from runtime import kv
queue = DataQueue("q", is_master=True, size=50, max_bytes=1 << 20)
while queue.statistics().put_total < 600:
    time.sleep(0.02)
queue.close()
got = []
for rank in range(2):
    while (part := kv.get(f"got-{rank}")) is None:
        time.sleep(0.02)
    got += map(tuple, part)
print("all once", sorted(got) == [(r, n) for r in range(3) for n in range(100)])
"""
    roles = (
        _role("owner", "owner")
        + _role("producer", "producer", total=3)
        + _role("consumer", "consumer", total=2)
    )
    lines = _run(launch, write, roles, owner=owner, producer=producer, consumer=consumer)
    assert "all once True" in lines
    totals = [int(line.split()[1]) for line in lines if line.startswith("bytes")]
    assert sum(totals) == 3 * 5 * 200_000


def test_puts_of_many_threads_survive_that_the_main_one_is_interrupted_in_its_own(
    launch: Launch, write: Write
) -> None:
    producer = """
import itertools, threading
queue, sure, stop, counts, armed = DataQueue("q"), [], threading.Event(), {}, False
depths = []
def interrupt(*_):
    if armed:
        depths.append(queue.qsize(20))  # in the midst of a put, mostly
        if len(depths) % 4 == 0:
            raise KeyboardInterrupt
signal.signal(signal.SIGUSR1, interrupt)
def put(name):
    for number in itertools.count():
        if stop.is_set():
            break
        queue.put((name, number), timeout=None if number % 3 else 20)
    counts[name] = number
def annoy():
    for _ in range(50):
        time.sleep(0.003)
        os.kill(os.getpid(), signal.SIGUSR1)
    stop.set()
threads = [threading.Thread(target=put, args=(name,)) for name in range(3)]
threads.append(threading.Thread(target=annoy))
for thread in threads:
    thread.start()
interrupted = 0
for number in itertools.count():
    if stop.is_set():
        break
    try:
        armed = True
        queue.put(("main", number))
        sure.append(number)
        armed = False
    except KeyboardInterrupt:
        armed = False
        interrupted += 1
for thread in threads:
    thread.join()
print("interrupted", interrupted > 0, flush=True)
queue.put(("end", sure, counts))
"""
    consumer = """
queue, got = DataQueue("q", is_master=True, size=500), {}
while True:
    for name, number, *counts in queue.get(50):
        got.setdefault(name, []).append(number)
    if "end" in got:
        break
sure, main = got["end"][0], got["main"]
print("sure", set(sure) <= set(main), main == sorted(set(main)))
print("others", all(got[name] == list(range(count)) for name, count in counts[0].items()))
"""
    roles = _role("producer", "producer") + _role("consumer", "consumer")
    lines = _run(launch, write, roles, producer=producer, consumer=consumer)
    assert {"interrupted True", "sure True True", "others True"} <= set(lines)


def test_threads_that_wait_in_a_queue_when_the_program_ends_do_so_without_a_word(
    launch: Launch, write: Write
) -> None:
    program = """
import threading
queue, nobodys = DataQueue("q"), DataQueue("nobody owns it")
for wait in (queue.get, lambda: queue.put(*range(9)), nobodys.get):
    threading.Thread(target=wait, daemon=True).start()
while queue.statistics().waiting_producers == 0:
    time.sleep(0.01)
print("ends")
"""
    owner = """
queue = DataQueue("q", is_master=True, size=2)
time.sleep(1)
"""
    roles = _role("owner", "owner") + _role("program", "program")
    assert _run(launch, write, roles, owner=owner, program=program) == ["ends"]

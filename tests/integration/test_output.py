"""What workers print arrives: whole lines with their rank on the console, the exact bytes in the files.

Nothing is lost, whatever the lines look like, however many there are, and however slowly they are read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.integration.support.job import Job
from tests.integration.support.screen import PREFIX, assert_no_noise

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]

ONE = ("--nproc-per-node", "1", "--role", "trainer")
TWO = ("--nproc-per-node", "2", "--role", "trainer")
BYTES_PREFIX = re.compile(rb"^\[trainer (\d+)(?: [^\]]+)?\] ?")


def lines_by_rank(out: bytes) -> dict[int, list[bytes]]:
    """The lines of each rank without their prefix; a line without one is not whole."""
    found: dict[int, list[bytes]] = {}
    for line in out.split(b"\n")[:-1]:
        match = BYTES_PREFIX.match(line)
        assert match, f"a line without the prefix of a worker: {line[:200]!r}"
        found.setdefault(int(match[1]), []).append(line[match.end() :])
    assert out.endswith(b"\n") or not out
    return found


def log(job: Job, rank: int, stream: str = "stdout", attempt: int = 0) -> bytes:
    """The log file of one worker's stream, found by way of the `latest` link."""
    path = job.logs / "latest" / f"attempt_{attempt}" / "trainer" / str(rank) / f"{stream}.log"
    assert path.exists(), sorted(str(p) for p in job.logs.rglob("*"))
    return path.read_bytes()


FLOOD = """
import os, sys
rank, n, times = os.environ["RANK"], int(sys.argv[1]), int((sys.argv[2:] or "1")[0])
text = "the quick brown fox jumps over the lazy dog" * times
for i in range(n):
    print(f"{rank}:{i:06d} {text}")
"""


def flood(rank: int, count: int, times: int = 1) -> list[bytes]:
    """What `FLOOD` prints in this rank."""
    text = "the quick brown fox jumps over the lazy dog" * times
    return [f"{rank}:{i:06d} {text}".encode() for i in range(count)]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_of_eight_workers_with_100000_lines_each_no_line_is_torn_lost_or_out_of_order(
    write: Write, launch: Launch
) -> None:
    count = 100_000
    script = write("train.py", FLOOD)
    job = launch("--nproc-per-node", "8", "--role", "trainer", script, str(count))
    assert job.wait(180) == 0
    found = lines_by_rank(job.out_bytes)
    assert sorted(found) == list(range(8))
    for rank, lines in found.items():
        expected = flood(rank, count)
        assert lines == expected
        assert log(job, rank) == b"\n".join(expected) + b"\n"
    job.assert_nothing_left()


def test_lines_of_a_megabyte_stay_whole(write: Write, launch: Launch) -> None:
    script = write(
        "train.py",
        """
        import os
        rank = os.environ["RANK"]
        for i in range(4):
            print(rank * 1_000_000 + f" end {i}")
        """,
    )
    job = launch(*TWO, script)
    assert job.wait() == 0
    expected = {r: [str(r).encode() * 1_000_000 + b" end %d" % i for i in range(4)] for r in (0, 1)}
    found = lines_by_rank(job.out_bytes)
    assert {r: [len(line) for line in lines] for r, lines in found.items()} == {
        r: [len(line) for line in lines] for r, lines in expected.items()
    }
    assert found == expected
    for rank in (0, 1):
        assert log(job, rank) == b"\n".join(expected[rank]) + b"\n"


def test_bytes_that_are_no_utf8_arrive_as_they_are(write: Write, launch: Launch) -> None:
    script = write(
        "train.py",
        r"""
        import os
        os.write(1, b"\xff\xfe \x00 caf\xe9\n")
        os.write(2, b"\x80 error \xc3\n")
        """,
    )
    job = launch(*ONE, script)
    assert job.wait() == 0
    assert lines_by_rank(job.out_bytes) == {0: [b"\xff\xfe \x00 caf\xe9"]}
    assert b"\x80 error \xc3\n" in job._streams[-1].bytes
    assert log(job, 0) == b"\xff\xfe \x00 caf\xe9\n"
    assert log(job, 0, "stderr") == b"\x80 error \xc3\n"


def test_a_last_line_without_newline_is_shown_and_kept_as_written(
    write: Write, launch: Launch
) -> None:
    job = launch(*TWO, write("train.py", "print('first')\nprint('no end', end='')\n"))
    assert job.wait() == 0
    assert lines_by_rank(job.out_bytes) == {r: [b"first", b"no end"] for r in (0, 1)}
    assert log(job, 0) == log(job, 1) == b"first\nno end"


def test_a_part_of_a_line_is_in_the_file_before_the_worker_ends(
    write: Write, launch: Launch
) -> None:
    """A worker that hangs behind `print("loading …", end="")` must not hide how far it came."""
    body = "import time\nprint('loading', end='', flush=True)\ntime.sleep(600)\n"
    job = launch(*ONE, write("train.py", body))
    path = job.logs / "latest" / "attempt_0" / "trainer" / "0" / "stdout.log"
    job.wait_until(lambda: path.exists() and path.read_bytes() == b"loading", "it was written")


def test_a_bar_with_carriage_returns_shows_its_last_state_and_stays_raw_in_the_file(
    write: Write, launch: Launch
) -> None:
    script = write(
        "train.py",
        r"""
        import os, sys
        rank = os.environ["RANK"]
        for percent in range(101):
            sys.stdout.write(f"\r{rank} at {percent:3d}%")
            sys.stdout.flush()
        sys.stdout.write("\n")
        print(f"{rank} done")
        """,
    )
    job = launch(*TWO, script)
    assert job.wait() == 0
    raw = {r: "".join(f"\r{r} at {p:3d}%" for p in range(101)) + f"\n{r} done\n" for r in (0, 1)}
    for rank in (0, 1):
        assert log(job, rank) == raw[rank].encode()
        mine = lines_by_rank(job.out_bytes)[rank]
        assert mine[-1] == f"{rank} done".encode()
        assert mine[-2].endswith(f"{rank} at 100%".encode())
        assert all(f"{1 - rank} at".encode() not in line for line in mine)


def test_stdout_goes_to_stdout_and_stderr_to_stderr(write: Write, launch: Launch) -> None:
    job = launch(*TWO, write("train.py", "import sys\nprint('O')\nprint('E', file=sys.stderr)\n"))
    assert job.wait() == 0
    assert lines_by_rank(job.out_bytes) == {0: [b"O"], 1: [b"O"]}
    errors = [line for line in job.err.splitlines() if PREFIX.match(line)]
    assert sorted(PREFIX.sub("", line) for line in errors) == ["E", "E"]
    assert (log(job, 0), log(job, 0, "stderr")) == (b"O\n", b"E\n")


def test_what_a_worker_printed_before_it_was_killed_is_not_lost(
    write: Write, launch: Launch
) -> None:
    script = write("train.py", FLOOD + "sys.stdout.flush()\nos.kill(os.getpid(), 9)\n")
    job = launch(*ONE, script, "20000")
    assert job.wait() == 137
    assert lines_by_rank(job.out_bytes) == {0: flood(0, 20_000)}


def test_the_children_of_a_worker_print_as_that_worker(write: Write, launch: Launch) -> None:
    body = "import subprocess, sys\nsubprocess.run(['echo', 'from a child'], check=True)\n"
    job = launch(*ONE, write("train.py", body))
    assert job.wait() == 0
    assert lines_by_rank(job.out_bytes) == {0: [b"from a child"]}


def test_each_attempt_has_its_own_files(write: Write, launch: Launch) -> None:
    script = write(
        "train.py",
        """
        import os, sys
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        print("attempt", attempt)
        sys.exit(1 if attempt == 0 else 0)
        """,
    )
    job = launch(*ONE, "--max-restarts", "1", script)
    assert job.wait() == 0
    assert log(job, 0, attempt=0) == b"attempt 0\n"
    assert log(job, 0, attempt=1) == b"attempt 1\n"


def test_latest_points_at_the_newest_job(write: Write, launch: Launch) -> None:
    script = write("train.py", "import sys\nprint(sys.argv[1])\n")
    for word in ("one", "two"):
        job = launch(*ONE, script, word)
        assert job.wait() == 0
        assert (job.logs / "latest").is_symlink()
        assert log(job, 0) == f"{word}\n".encode()
    assert len([p for p in job.logs.iterdir() if not p.is_symlink()]) == 2


def test_stdout_may_be_a_file(write: Write, launch: Launch, tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    job = launch(*TWO, write("train.py", FLOOD), "5000", out_file=target)
    assert job.wait() == 0
    assert lines_by_rank(target.read_bytes()) == {r: flood(r, 5000) for r in (0, 1)}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_slow_reader_holds_the_workers_up_and_loses_nothing(write: Write, launch: Launch) -> None:
    """40 MB that nobody reads for a while: the workers wait, and the launcher and agent do not grow."""
    count, times = 35_000, 12
    job = launch(*TWO, write("train.py", FLOOD), str(count), str(times), read_output=False)
    pipe = job.popen.stdout
    assert pipe is not None
    time.sleep(2)
    assert job.popen.poll() is None, "the job ended although nobody read its output"
    ours = [psutil.Process(job.pid), psutil.Process(job.agent().pid)]
    resident = {p.pid: p.memory_info().rss for p in ours}
    assert max(resident.values()) < 100 * 2**20, resident
    received = bytearray()
    for _ in range(20):
        received += pipe.read1(1 << 12)
        time.sleep(0.05)
    received += pipe.read()
    assert job.wait(60) == 0
    assert lines_by_rank(bytes(received)) == {r: flood(r, count, times) for r in (0, 1)}
    job.assert_nothing_left()


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("--local-ranks-filter", "1"), {1: [b"hello"]}),
        (("--redirects", "3"), {}),
        (("--redirects", "3", "--tee", "3"), {0: [b"hello"], 1: [b"hello"]}),
        (("--redirects", "0:1"), {1: [b"hello"]}),
    ],
    ids=["filter", "redirects", "tee", "redirects of one rank"],
)
def test_the_console_can_be_narrowed_and_the_files_have_everything(
    write: Write, launch: Launch, options: tuple[str, ...], shown: dict[int, list[bytes]]
) -> None:
    job = launch(*TWO, *options, write("train.py", "print('hello')\n"))
    assert job.wait() == 0
    assert lines_by_rank(job.out_bytes) == shown
    assert log(job, 0) == log(job, 1) == b"hello\n"
    assert_no_noise(job)

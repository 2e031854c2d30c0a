"""`runtime.init()` in ranks that torchrun, srun and mpirun have started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.support import processes
from tests.integration.support.hosts import Hosts
from tests.integration.support.job import MARKER, ROOT, Job
from tests.integration.support.needs import need

pytestmark = pytest.mark.timeout(180)  # torch is imported two to eight times in a test

Write = Callable[[str, str], Path]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PLAIN = """
    import os, runtime
    from runtime import DataQueue, RoleGroup, barrier, kv, rpc

    worker = runtime.init(timeout=60)
    me = worker.actor_info

    @rpc
    def add(x):
        return x + me.rank

    everyone = RoleGroup("default")
    assert everyone.call(add, 10).result(20) == [10 + rank for rank in range(me.world_size)]
    queue = DataQueue("q", is_master=me.rank == 0)
    queue.put(me.rank, timeout=20)
    kv.put(f"host of {me.rank}", me.host)
    barrier("all have put", timeout=20)
    if me.rank == 0:
        items = queue.get(me.world_size, timeout=20, min_size=me.world_size)
        hosts = sorted({kv.get(f"host of {rank}") for rank in range(me.world_size)})
        print("RESULT", sorted(items), *hosts, flush=True)
    barrier("all have seen", timeout=20)
"""
INSIDE = """
    import asyncio, os, threading, runtime

    async def inside():
        runtime.init(timeout=60)  # blocks the loop, as it says

    if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
        asyncio.run(inside())
    else:
        thread = threading.Thread(target=runtime.init, kwargs={"timeout": 60})
        thread.start()
        thread.join()
"""
# Ranks share their output: a line is one write.
RESTARTED = """
    import os, signal, sys, runtime
    import torch, torch.distributed as dist
    from runtime import PeerLostError, RoleGroup, barrier, rpc

    def group():
        dist.init_process_group("gloo")
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones.item() == 2

    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 1:
        group()
    worker = runtime.init(timeout=60)
    assert runtime.init(timeout=60) is worker is runtime.current_worker()
    me = worker.actor_info
    assert me.restart_count == attempt
    if attempt == 2:
        group()

    @rpc
    def die(how):
        os._exit(1) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)

    def kill(rank, how):
        barrier("ready", timeout=20)
        if me.rank != rank:
            try:
                RoleGroup("default")[rank].call(die, how).result(20)
            except PeerLostError as lost:
                os.write(1, f"LOST {attempt} {lost.rank} {lost.cause}\\n".encode())
        signal.pause()

    match attempt:
        case 0: kill(1, "exit")
        case 1: kill(0, "SIGKILL")
        case 2: kill(1, "SIGKILL")
    barrier("end", timeout=20)
    os.write(1, f"DONE {me.rank} {attempt}\\n".encode())
"""


class Outside:
    """Somebody else's job, and what is left of it."""

    def __init__(self, folder: Path) -> None:
        self.marker = f"{MARKER}={uuid.uuid4().hex}"
        # A short path: that of a unix socket has 107 bytes.
        self._runtime = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
        name, _, value = self.marker.partition("=")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RUNTIME_", "SLURM_"))}
        self.env = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), name: value}
        self.env["XDG_RUNTIME_DIR"] = str(self._runtime)
        self._output = folder / "output"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *argv: object, **env: str) -> subprocess.Popen[bytes]:
        """In a file, not a pipe: whoever holds it open afterwards must not keep us waiting."""
        with self._output.open("ab") as file:
            words = [str(word) for word in argv]
            started = subprocess.Popen(words, env={**self.env, **env}, stdout=file, stderr=file)
        self._started.append(started)
        return started

    def start_ranks(self, count: int, script: Path, of: int | None = None) -> None:
        """As mpirun does, whose ranks know of each other by these variables alone."""
        job = str(uuid.uuid4().int % 10**9)
        for rank in range(count):
            said = {
                "RANK": rank,
                "SIZE": of or count,
                "LOCAL_RANK": rank,
                "LOCAL_SIZE": of or count,
            }
            env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in said.items()}
            self.start(sys.executable, script, PMIX_NAMESPACE=job, **env)

    def wait(self, timeout: float = 150.0) -> list[int]:
        """The exit codes."""
        until = time.monotonic() + timeout
        try:
            return [one.wait(max(0.1, until - time.monotonic())) for one in self._started]
        except subprocess.TimeoutExpired:
            pytest.fail(f"not ended within {timeout} s:\n{self.output()}")

    def output(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def lines(self, first: str) -> list[str]:
        """The lines that begin with that word, sorted."""
        return sorted(line for line in self.output().splitlines() if line.startswith(first))

    def assert_nothing_left(self, within: float = 5.0) -> None:
        until = time.monotonic() + within
        while left := [*processes.with_marker(self.marker), *self._runtime.iterdir()]:
            assert time.monotonic() < until, f"left: {left}\n{self.output()}"
            time.sleep(0.02)

    def close(self) -> None:
        for process in processes.with_marker(self.marker):
            os.kill(process.pid, signal.SIGKILL)
        for started in self._started:
            started.wait()
        shutil.rmtree(self._runtime, ignore_errors=True)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    job = Outside(tmp_path)
    yield job
    job.close()


def test_three_restarts_in_a_row_under_torchrun(outside: Outside, write: Write) -> None:
    """The process group comes not at all, before `init`, after it. Rank 0 serves the store: that of the agents keeps
    gloo's old addresses, which torch itself does not survive."""
    script = write("train.py", RESTARTED)
    words = ("--standalone", "--nproc-per-node=2", "--max-restarts=3", "--monitor-interval=0.3")
    outside.start(*TORCHRUN, *words, script, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert outside.wait() == [0], outside.output()
    lost = ["LOST 0 1 exit 1", "LOST 1 0 SIGKILL", "LOST 2 1 SIGKILL"]
    assert outside.lines("LOST") == lost, outside.output()
    assert outside.lines("DONE") == ["DONE 0 3", "DONE 1 3"]
    outside.assert_nothing_left()


def test_mpirun_on_one_host_needs_nothing(outside: Outside, write: Write) -> None:
    need(shutil.which("mpirun"), "Open MPI's mpirun")
    script = write(
        "train.py",
        INSIDE
        + PLAIN
        + """
    if me.rank == 0:
        child = os.fork()
        if child == 0:  # as a DataLoader's worker
            try:
                kv.get("x")
            except runtime.MisuseError as error:
                os._exit("forked from a worker" in str(error))
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    barrier("forked", timeout=20)
    runtime.shutdown()
    runtime.shutdown()
    try:
        runtime.init()
    except runtime.MisuseError as error:
        print("AGAIN", error, flush=True)
    """,
    )
    words = ("--allow-run-as-root", "--oversubscribe", "-n", 2)
    outside.start("mpirun", *words, sys.executable, script)
    assert outside.wait() == [0], outside.output()
    (result,) = outside.lines("RESULT")
    assert result.startswith("RESULT [0, 1] ")
    again = "AGAIN this process has left its job: a rank can join once"
    assert outside.lines("AGAIN") == [again, again]
    outside.assert_nothing_left()


def test_the_agent_outlives_the_rank_that_started_it_and_ranks_outlive_the_agent(
    outside: Outside, write: Write
) -> None:
    script = write(
        "train.py",
        """
        import os, signal, runtime
        from runtime import BarrierBroken, PeerLostError, RoleGroup, barrier, kv, rpc

        worker = runtime.init(timeout=60)

        @rpc
        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        if worker.actor_info.rank == 0:
            signal.pause()
        try:
            RoleGroup("default")[0].call(die).result(20)
        except PeerLostError as lost:
            os.write(1, f"LOST {lost.rank} {lost.cause}\\n".encode())
        kv.put("still", "here")
        try:
            barrier("never", timeout=20)
        except BarrierBroken as broken:
            print("BROKEN", broken.missing, kv.get("still"), flush=True)
        os.kill(worker._spec.agent_pid, signal.SIGKILL)
        try:
            kv.get("still")
        except runtime.RuntimeFault as error:
            print("CUT", error, flush=True)
        """,
    )
    outside.start_ranks(2, script)
    assert outside.wait() == [-signal.SIGKILL, 0], outside.output()
    assert outside.lines("LOST") == ["LOST 0 SIGKILL"]
    assert outside.lines("BROKEN") == ["BROKEN ['default-0'] here"], outside.output()
    (cut,) = outside.lines("CUT")
    assert "control plane" in cut
    outside.assert_nothing_left()


def test_in_a_job_of_our_own_init_is_the_current_worker(
    launch: Callable[..., Job], write: Write
) -> None:
    job = launch(
        write(
            "train.py",
            """
            import runtime
            worker = runtime.init()
            assert worker is runtime.current_worker()
            runtime.shutdown()
            runtime.kv.put("x", worker.actor_info.rank)
            print("value", runtime.kv.get("x"))
            """,
        )
    )
    assert job.wait() == 0
    assert "value 0" in job.out


def test_ranks_that_never_call_init_are_named(outside: Outside, write: Write) -> None:
    script = write("train.py", "import runtime\nruntime.init(timeout=1)\n")
    outside.start_ranks(1, script, of=3)
    assert outside.wait() == [1]
    said = "RendezvousError: ranks 1, 2 have not called runtime.init() within 1 s (all 3 ranks of mpirun"
    assert said in outside.output(), outside.output()
    outside.assert_nothing_left()


def test_three_restarts_in_a_row_on_two_nodes_of_torchrun(hosts: Hosts, write: Write) -> None:
    """Only the node whose rank died counts the restart, and the store still has the keys of all earlier rounds."""
    script = write(
        "train.py",
        """
        import os, signal, sys
        from pathlib import Path
        import torch, torch.distributed as dist

        deaths = Path(sys.argv[1])
        attempt = len(list(deaths.iterdir()))

        def group():
            dist.init_process_group("gloo")
            ones = torch.ones(1)
            dist.all_reduce(ones)
            assert ones.item() == 2

        if attempt == 1:
            group()
        """
        + PLAIN.replace("\n    ", "\n        ")
        + """
        if attempt == 2:
            group()
            barrier("grouped", timeout=20)  # or the other may fail in its part of `group`
        if attempt < 3:
            if me.rank == (1, 0, 1)[attempt]:
                (deaths / str(attempt)).touch()
                os._exit(1) if attempt == 1 else os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        print("DONE", me.rank, me.restart_count, flush=True)
        """,
    )
    words = (
        *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.3"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=host1:29400", "--rdzv-id=x"),
    )
    deaths = script.with_name("deaths")
    deaths.mkdir()
    outputs = [script.with_name(name) for name in ("host1", "host2")]
    # The second: see docs/torchrun.md
    env = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = []
    for output in outputs:
        with output.open("wb") as file:
            argv = (*TORCHRUN, *words, script, deaths)
            started.append(hosts.popen(output.name, *argv, stdout=file, stderr=file, env=env))
    codes = [process.wait(150) for process in started]
    text = "".join(output.read_text() for output in outputs)
    assert codes == [0, 0], text
    results = [line for line in text.splitlines() if line.startswith("RESULT")]
    assert results == ["RESULT [0, 1] host1 host2"] * 4
    done = [line.split() for line in text.splitlines() if line.startswith("DONE")]
    assert sorted(rank for _, rank, _ in done) == ["0", "1"]
    assert sum(int(count) for _, _, count in done) == 3, done  # each death at its own node
    hosts.assert_empty()
    for host in ("host1", "host2"):
        assert not hosts.path(host, f"/tmp/runtime-{os.getuid()}").exists()


def test_srun_on_two_hosts_needs_nothing(hosts: Hosts, write: Write) -> None:
    need(shutil.which("slurmctld"), "slurm-wlm and munge")
    script = write("train.py", PLAIN)
    hosts.slurm("up")
    try:
        step = ("srun", "-N2", "-n2", "--overlap", sys.executable, script)
        done = hosts.exec("host1", *step, env={"OMP_NUM_THREADS": "1"}, timeout=120)
        assert "RESULT [0, 1] host1 host2" in done.stdout.splitlines(), done.stdout + done.stderr
    finally:
        hosts.slurm("down")
    hosts.assert_empty()


def test_mpirun_on_two_hosts_needs_nothing(hosts: Hosts, write: Write) -> None:
    need(shutil.which("mpirun"), "openmpi-bin")
    script = write("train.py", PLAIN)
    words = ("mpirun", "--allow-run-as-root", "--host", "host1,host2", "-n", "2")
    told = ("-x", "OMP_NUM_THREADS=1", "-x", "PYTHONPATH")
    done = hosts.exec("host1", *words, *told, sys.executable, script, timeout=120)
    assert "RESULT [0, 1] host1 host2" in done.stdout.splitlines(), done.stdout + done.stderr
    hosts.assert_empty()


def test_the_example_trains_under_torchrun_and_asks_all_ranks(outside: Outside) -> None:
    script = ROOT / "examples" / "torchrun" / "train.py"
    outside.start(*TORCHRUN, "--standalone", "--nproc-per-node=2", script)
    assert outside.wait() == [0], outside.output()
    (line,) = outside.lines("loss by rank")
    losses = [float(word) for word in line.partition(": ")[2].split(", ")]
    assert len(losses) == 2
    assert max(losses) < 0.01
    outside.assert_nothing_left()

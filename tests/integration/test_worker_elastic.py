"""What an elastic role's workers find: torchrun's environment, a checked node, a process group."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.support.job import FRAME_OF_OURS, Job

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]

_APP = """
import os, sys
def group():
    import torch, torch.distributed as dist
    value = torch.ones(4) * (dist.get_rank() + 1)
    dist.all_reduce(value)
    return dist.get_backend(), dist.get_rank() == int(os.environ["RANK"]), value[0].item()
def run():
    print(group())
class App:
    def __init__(self): self.at_construction = group()
    def run(self): print(self.at_construction)
    def teardown(self):
        import torch.distributed as dist
        print("still there:", dist.is_initialized())
def plain():
    import torch.distributed as dist
    print("none:", dist.is_initialized(), os.environ["WORLD_SIZE"])
def destroys():
    import torch.distributed as dist
    dist.destroy_process_group()
    print("destroyed")
def leaves():
    print(group())
    sys.exit(0)
def one_fails():
    group()
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 fails")
    group()
"""

_ROLE = """
[roles.{name}]
entry = "app:{entry}"
kind = "elastic"
total = {total}
comm_auto_setup_process_group = {setup}
comm_pre_check = {check}
restart = {{ policy = "never", max = 0 }}
"""


def _role(name: str, entry: str, *, total: int = 2, setup: bool = True, check: bool = True) -> str:
    flags = {"setup": str(setup).lower(), "check": str(check).lower()}
    return _ROLE.format(name=name, entry=entry, total=total, **flags)


def _lines(job: Job, role: str) -> list[str]:
    """What one role printed, without the prefixes."""
    found = re.findall(rf"^\[{role} \d+[^\]]*\] (.*)$", job.out, re.MULTILINE)
    return sorted(found)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """One job of many elastic roles, each with a group of its own."""
    cwd = tmp_path_factory.mktemp("elastic")
    (cwd / "app.py").write_text(_APP)
    roles = [
        _role("checked", "run"),
        _role("unchecked", "App", check=False),
        _role("bare", "plain", setup=False),
        _role("ending", "destroys", total=1),
        _role("leaving", "leaves", total=1),
    ]
    (cwd / "job.toml").write_text("".join(roles))
    job = Job(["--timeout", "100", "--job", "job.toml"], cwd=cwd)
    try:
        assert job.wait(110) == 0, job.describe()
        job.assert_nothing_left()
        yield job
    finally:
        job.close()


def test_a_function_finds_a_gloo_group_of_its_role(several: Job) -> None:
    assert _lines(several, "checked") == ["('gloo', True, 3.0)"] * 2


def test_a_class_finds_the_group_at_construction_and_still_in_teardown(several: Job) -> None:
    expected = ["('gloo', True, 3.0)"] * 2 + ["still there: True"] * 2
    assert _lines(several, "unchecked") == expected


def test_a_role_that_says_no_gets_the_environment_only(several: Job) -> None:
    assert _lines(several, "bare") == ["none: False 2"] * 2


def test_a_program_may_end_the_group_or_itself(several: Job) -> None:
    assert _lines(several, "ending") == ["destroyed"]
    assert _lines(several, "leaving") == ["('gloo', True, 1.0)"]


def test_a_job_that_goes_well_says_nothing_on_stderr(several: Job) -> None:
    assert several.err == ""


@pytest.fixture
def elastic(write: Write, launch: Launch) -> Callable[[str], Job]:
    def elastic(entry: str) -> Job:
        write("app.py", _APP)
        write("job.toml", _role("trainer", entry))
        return launch("--job", "job.toml")

    return elastic


def test_a_rank_that_fails_does_not_wait_for_the_group(elastic: Callable[[str], Job]) -> None:
    job = elastic("one_fails")
    assert job.wait() == 1
    assert "ValueError: rank 1 fails" in job.err
    assert "rank 1" in job.err.partition("first ")[2].splitlines()[0], job.describe()
    assert not FRAME_OF_OURS.search(job.err), job.describe()
    job.assert_nothing_left()


def test_a_script_gets_a_group_when_it_asks_for_one(write: Write, launch: Launch) -> None:
    write("train.py", "from app import group\nprint(group())")
    write("app.py", _APP)
    job = launch("--nproc-per-node", "2", "--init-process-group", "train.py")
    assert job.wait() == 0, job.describe()
    assert _lines(job, "default") == ["('gloo', True, 3.0)"] * 2


def test_a_plain_script_finds_torchruns_environment_and_no_torch(
    write: Write, launch: Launch
) -> None:
    write(
        "train.py",
        """
        import os, sys
        names = (
            "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK GROUP_WORLD_SIZE "
            "ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT "
            "TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID TORCHELASTIC_ERROR_FILE RUNTIME_JOB_ID "
            "RUNTIME_GLOBAL_RANK OMP_NUM_THREADS"
        ).split()
        missing = [name for name in names if name not in os.environ]
        values = [os.environ[n] for n in names[:4] + names[7:10] + names[12:14] + names[18:]]
        print(missing, values, "torch" in sys.modules)
        """,
    )
    job = launch(
        "--nproc-per-node", "2", "--max-restarts", "3", "--start-method", "spawn", "train.py"
    )
    assert job.wait() == 0, job.describe()
    assert _lines(job, "default") == [
        f"[] ['{rank}', '{rank}', '2', '2', 'default', '{rank}', '2', '0', '3', '1'] False"
        for rank in (0, 1)
    ]


def test_a_group_that_cannot_form_names_the_rank_and_its_host(write: Write, launch: Launch) -> None:
    # Rank 1 is led to a port where nobody listens; rank 0 waits in vain. Both ends are bounded.
    write(
        "app.py",
        """
        import os
        from dataclasses import replace
        from runtime import process_group, current_worker
        def run():
            worker = current_worker()
            if worker.actor_info.rank == 1:
                os.environ["MASTER_PORT"] = "1"
            spec = replace(worker._spec, init_process_group=True, start_timeout_s=3.0)
            with process_group.opened(spec):
                print("formed")
        """,
    )
    write("job.toml", _role("trainer", "run", setup=False, check=False))
    job = launch("--job", "job.toml")
    assert job.wait() == 1
    assert re.search(r"trainer-[01] on \S+ could not form the process group", job.err), (
        job.describe()
    )
    assert "formed" not in job.out

"""Slurm's variables as hosts, and the command that carries an agent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.config import Config
from runtime.errors import ConfigError
from runtime.job import Entry
from runtime.launcher import slurm
from runtime.launcher.options import LaunchOptions
from runtime.launcher.plan import Facts, Host, Start, worker_env
from runtime.launcher.prepare import dial_settings, hosts_from_options, prepare

BATCH = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[01-03],login", "SLURM_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "0",
}  # fmt: skip
TASK = {**BATCH, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
RUN = LaunchOptions(entry=Entry("script", "train.py"))


def options(**given: object) -> LaunchOptions:
    return replace(RUN, **given)  # type: ignore[arg-type]


def hosts(env: dict[str, str], **given: object) -> list[tuple[str, int | None, bool]]:
    facts = Facts("job", own_names=("gpu01",), env=env)
    return [(h.name, h.slots, h.local) for h in hosts_from_options(options(**given), facts)]


# Which hosts


@pytest.mark.parametrize("named", [None, "slurm"])
def test_the_nodes_of_the_allocation_are_the_hosts(named: str | None) -> None:
    assert hosts(BATCH, hosts=named) == [
        ("gpu01", None, True), ("gpu02", None, False), ("gpu03", None, False), ("login", None, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [{"hosts": "localhost"}, {"standalone": True}, {"launcher": "local"}],
    ids=["--hosts", "--standalone", "--launcher local"],
)
def test_who_says_where_is_not_overruled(given: dict[str, object]) -> None:
    assert [local for _, _, local in hosts(BATCH, **given)] == [True]
    assert slurm.is_meant(options(**given), TASK) is False


def test_a_host_file_goes_before_the_allocation() -> None:
    assert slurm.is_meant(RUN, BATCH)
    assert not slurm.is_meant(options(hostfile="hosts.txt"), BATCH)


def test_who_is_in_an_allocation_submits_nothing() -> None:
    assert slurm.is_to_submit(options(launcher="slurm"), {})
    assert not slurm.is_to_submit(options(launcher="slurm"), BATCH)
    assert not slurm.is_to_submit(RUN, {})


def test_hosts_slurm_outside_an_allocation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--hosts slurm: this is no Slurm allocation"):
        hosts({}, hosts="slurm")


def test_an_allocation_of_several_parts_is_refused_with_the_hosts_to_name() -> None:
    env = {f"SLURM_JOB_NODELIST_HET_GROUP_{n}": hosts for n, hosts in enumerate(("a", "b[1-2]"))}
    with pytest.raises(
        ConfigError, match=r"say --hosts a,b\[1-2\] --launcher ssh, or --standalone"
    ):
        hosts(env)
    with pytest.raises(ConfigError, match="heterogeneous"):
        hosts(env, hosts="slurm")
    assert [local for _, _, local in hosts(env, standalone=True)] == [True]


def test_nnodes_takes_the_first_nodes() -> None:
    assert [name for name, _, _ in hosts(BATCH, nnodes=(2, 2))] == ["gpu01", "gpu02"]


@pytest.mark.parametrize(
    ("env", "slots"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "4"}, [8, 8, 8, 8]),
        ({"SLURM_NTASKS": "7", "SLURM_TASKS_PER_NODE": "2(x3),1"}, [2, 2, 2, 1]),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x4)"}, [2, 2, 2, 2]),
        ({"SLURM_GPUS_ON_NODE": "0"}, [None] * 4),
        ({}, [None] * 4),
    ],
)
def test_slots_are_gpus_or_the_tasks_that_were_asked_for(
    env: dict[str, str], slots: list[int | None]
) -> None:
    found = slurm.allocated(RUN, {**BATCH, **env})
    assert [host.slots for host in found] == slots


def test_workers_per_node_that_are_said_are_not_held_to_slurms_tasks() -> None:
    env = {**BATCH, "SLURM_NTASKS": "4"}
    assert [slots for _, slots, _ in hosts(env, nproc_per_node=8)] == [8, 8, 8, 8]


@pytest.mark.parametrize("text", ["2(x3)", "", "2(x3),x", "5", "2(x5)"])
def test_task_counts_that_do_not_fit_the_nodes_are_refused(text: str) -> None:
    env = {**BATCH, "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": text}
    with pytest.raises(ConfigError, match=r"SLURM_TASKS_PER_NODE=.* nodes, but .*login names 4"):
        slurm.allocated(RUN, env)


# One launcher in each task


def test_of_the_tasks_of_a_step_the_first_one_launches() -> None:
    tasks = [{**TASK, "SLURM_PROCID": number} for number in "012"]
    assert [slurm.is_follower(RUN, env) for env in tasks] == [False, True, True]
    assert not any(slurm.is_follower(options(standalone=True), env) for env in tasks)
    assert not slurm.is_follower(RUN, BATCH)
    assert not slurm.is_follower(RUN, {})


def test_a_task_with_a_share_of_its_node_reaches_even_that_by_srun() -> None:
    assert [local for _, _, local in hosts(TASK)] == [False] * 4


def test_a_worker_does_not_hear_which_task_its_agent_is() -> None:
    facts = Facts("job", own_names=("gpu01",), env=TASK)
    plan = prepare(RUN, facts)
    env = worker_env(
        plan.launches[0], {**TASK, "PMI_RANK": "2", "SLURM_CPUS_PER_TASK": "4"}, Start()
    )
    assert env.keys() & {*TASK, "PMI_RANK", "SLURM_CPUS_PER_TASK"} == {
        "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK",
    }  # fmt: skip


# The command


@pytest.mark.parametrize(
    ("given", "env", "carrier"),
    [
        ({}, BATCH, "srun"),
        ({"launcher": "slurm"}, BATCH, "srun"),
        ({"launcher": "ssh"}, BATCH, "ssh"),
        ({"hosts": "gpu02:4,gpu03:4"}, BATCH, "srun"),
        ({"hosts": "gpu02:4,elsewhere:4"}, BATCH, "ssh"),
        ({"hosts": "localhost:1,gpu02:4"}, BATCH, "srun"),
        ({"hosts": "gpu02:4"}, {}, "ssh"),
    ],
)
def test_srun_carries_what_is_in_the_allocation_unless_ssh_is_wanted(
    given: dict[str, object], env: dict[str, str], carrier: str
) -> None:
    facts = Facts("job", own_names=("gpu01",), env=env)
    chosen = options(**given)
    assert (
        dial_settings(chosen, hosts_from_options(chosen, facts), facts, Config()).carrier == carrier
    )


def test_a_job_that_srun_carries_cannot_be_left_alone() -> None:
    facts = Facts("job", own_names=("gpu01",), env=BATCH)
    chosen = options(detach=True)
    with pytest.raises(ConfigError, match="--detach: what srun starts ends with the launcher"):
        dial_settings(chosen, hosts_from_options(chosen, facts), facts, Config())


def test_an_agent_is_a_step_of_one_task_with_all_of_its_node() -> None:
    argv = slurm.srun_argv(Host("gpu02", local=False), "exec sh -c 'x y'")
    assert argv[-4:] == ["--nodelist=gpu02", "sh", "-c", "exec sh -c 'x y'"]
    command = argv[argv.index("srun") :]
    assert {"--nodes=1", "--ntasks=1", "--overlap", "--mpi=none", "--export=ALL"} <= set(command)
    # A wish for the job's own tasks would leave the agent one GPU of eight.
    assert argv[:3] == ["env", "-u", "SLURM_GPUS_PER_TASK"]

"""Who a rank is in somebody else's job, from environments as torchrun, srun and mpirun make them."""

from __future__ import annotations

import pytest

from runtime.errors import ConfigError, MisuseError
from runtime.launcher.torchrun import Outer, Place, find

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "ROLE_NAME": "trainer",
    "ROLE_RANK": "2",
    "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[01-03,07],login",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "223084545",
}


def found(env: dict[str, str]) -> Outer:
    outer = find(env)
    assert outer is not None
    return outer


def test_a_process_in_no_job_is_in_none() -> None:
    assert find({"PATH": "/bin"}) is None


def test_the_shell_of_a_slurm_allocation_is_no_rank() -> None:
    assert find({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None


def test_a_rank_of_torchrun_has_its_role_its_round_and_the_agents_store() -> None:
    place = Place(("node0",), (29500,), served=True)
    assert found(TORCHRUN) == Outer("torchrun", "run", 3, 4, 1, 2, place, "trainer", "1", 2)


def test_torchrun_without_a_store_of_its_own_leaves_that_to_rank_0() -> None:
    assert not found({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"}).place.served


def test_torchrun_inside_of_a_slurm_step_is_torchrun() -> None:
    assert found({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_mpirun_whose_daemons_srun_started_is_mpirun() -> None:
    assert found({**SRUN, **MPIRUN}).launcher == "mpirun"


def test_ranks_of_srun_meet_on_the_first_node_of_the_step() -> None:
    outer = found(SRUN)
    assert (outer.run_id, outer.rank, outer.world_size, outer.node) == ("77.0", 2, 4, "1")
    assert outer.place.hosts == ("gpu01",)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("one", "one"), ("a,b", "a"), ("x[7,9]y", "x7y"), ("n[1-2]-ib[3-4],z", "n1-ib3")],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert found({**SRUN, "SLURM_STEP_NODELIST": nodes}).place.hosts == (first,)


def test_the_ports_follow_from_the_job_and_leave_room_for_others() -> None:
    one, again = found(SRUN).place.ports, found({**SRUN, "SLURM_PROCID": "0"}).place.ports
    other = found({**SRUN, "SLURM_STEP_ID": "1"}).place.ports
    assert one == again != other
    assert len(set(one)) == len(one) > 1
    assert all(20_000 <= port < 30_000 for port in one)


def test_the_same_facts_under_other_names_are_found_too() -> None:
    old = {"SLURM_JOB_ID": "", "SLURM_JOBID": "78", "SLURM_STEP_NODELIST": ""}
    outer = found({**SRUN, **old, "SLURM_JOB_NODELIST": "n[1-2]"})
    assert (outer.run_id, outer.place.hosts) == ("78.0", ("n1",))
    older = {**MPIRUN, "PMIX_NAMESPACE": "", "OMPI_MCA_ess_base_jobid": "5"}
    assert found(older).run_id == "5"


def test_ranks_of_mpirun_meet_at_the_same_ports_whichever_they_are() -> None:
    ports = [found({**MPIRUN, "OMPI_COMM_WORLD_RANK": rank}).place.ports for rank in "01"]
    assert ports[0] == ports[1] != found({**MPIRUN, "PMIX_NAMESPACE": "7"}).place.ports


def test_a_master_that_is_set_goes_before_what_can_be_derived() -> None:
    place = found({**SRUN, "MASTER_ADDR": "m", "MASTER_PORT": "1234"}).place
    assert place == Place(("m",), (1234,))


def test_mpirun_on_one_host_needs_no_master() -> None:
    outer = found(MPIRUN)
    assert (outer.place.hosts, outer.run_id, outer.node) == (("localhost",), "223084545", "")


MPIRUN_HOST = "77.0;tcp://10.0.0.1,172.17.0.1:4000;tcp6://[fd00::1,fd01::1]:4001"
SEVERAL = {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": MPIRUN_HOST}


def test_ranks_of_mpirun_meet_on_its_own_host_if_rank_0_is_there() -> None:
    addresses = ("10.0.0.1", "172.17.0.1", "fd00::1", "fd01::1")
    first = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_orte_local_daemon_uri": MPIRUN_HOST}
    assert found(SEVERAL).place.hosts == found({**SEVERAL, **first}).place.hosts == addresses
    assert found({**SEVERAL, "MASTER_ADDR": "m"}).place.hosts == ("m",)


@pytest.mark.parametrize(
    "change",
    [
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_orte_local_daemon_uri": "77.1;tcp://10.0.0.2:3"},
        {"OMPI_MCA_orte_hnp_uri": ""},  # Open MPI 5
        {"OMPI_MCA_orte_hnp_uri": "77.0"},
    ],
)
def test_mpirun_whose_rank_0_is_who_knows_where_says_what_to_add(change: dict[str, str]) -> None:
    with pytest.raises(MisuseError, match=r"-x MASTER_ADDR=<host of rank 0>"):
        find({**SEVERAL, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "x"}, r"RANK='x' in the environment: must be a whole number from 0"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_a_broken_environment_is_named(change: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find({**TORCHRUN, **change})


def test_a_step_without_a_list_of_nodes_asks_for_a_master() -> None:
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        find({**SRUN, "SLURM_STEP_NODELIST": ""})
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST 'n\\[x\\]'"):
        find({**SRUN, "SLURM_STEP_NODELIST": "n[x]"})

"""Options, hosts and job to a plan: where everybody goes, command lines, environments, and how it is shown."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.config import Config
from runtime.errors import ConfigError
from runtime.job import Entry, JobSpec, Resource, Restart, RoleSpec
from runtime.launcher.options import parse_options
from runtime.launcher.place import Room, place
from runtime.launcher.plan import (
    Facts,
    Host,
    Plan,
    Start,
    command_line,
    make_plan,
    planned_actors,
    to_json,
    to_text,
    worker_env,
)
from runtime.launcher.prepare import (
    dial_settings,
    hosts_from_options,
    needed_files,
    parse_env_file,
    prepare,
)
from runtime.launcher.ssh import DialSettings

FACTS = Facts("j1", "/work", "/usr/bin/python3", ("box.example", "10.0.0.7"), cpu_count=4)


def planned(line: str, **facts: Any) -> Plan:
    return prepare(parse_options(line.split(), {}), replace(FACTS, **facts))


def refused(line: str, **facts: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        planned(line, **facts)
    return str(raised.value)


def where(plan: Plan) -> dict[str, int]:
    return dict(Counter(launch.host for launch in plan.launches))


# How many, and where

ASKED = {"found": {"h1": (8, 2), "h2": (16, 0)}}


@pytest.mark.parametrize(
    ("line", "facts", "counts"),
    [
        ("t.py", {}, {"localhost": 1}),
        ("--nproc-per-node 3 t.py", {}, {"localhost": 3}),
        ("--nproc-per-node cpu t.py", {}, {"localhost": 4}),
        ("--nproc-per-node auto t.py", {}, {"localhost": 4}),
        ("--nproc-per-node auto t.py", {"gpu_count": 2}, {"localhost": 2}),
        ("--nproc-per-node gpu t.py", {"gpu_count": 2}, {"localhost": 2}),
        ("t.py", {"gpu_count": 2}, {"localhost": 1}),
        ("-n 5 t.py", {}, {"localhost": 5}),
        ("--nnodes 1:4 --nproc-per-node 2 t.py", {}, {"localhost": 2}),
        ("--standalone --nproc-per-node 2 t.py", {}, {"localhost": 2}),
        ("--hosts localhost:3 t.py", {}, {"localhost": 3}),
        ("--hosts box t.py", {"gpu_count": 2}, {"box": 2}),
        ("--hosts 10.0.0.7:4 --nproc-per-node 2 t.py", {}, {"10.0.0.7": 2}),
        ("--dry-run --hosts h1:2,h2:1 t.py", {}, {"h1": 2, "h2": 1}),
        ("--dry-run --hosts h1:4,h2:4 --nproc-per-node 2 t.py", {}, {"h1": 2, "h2": 2}),
        ("--dry-run --hosts h1:4,h2:4 -n 6 t.py", {}, {"h1": 4, "h2": 2}),
        ("--dry-run --hosts h1:4,h2:4 -n 3 t.py", {}, {"h1": 3}),
        ("--dry-run --hosts h1:4,h2:4 -n 4 --nproc-per-node 2 t.py", {}, {"h1": 2, "h2": 2}),
        ("--dry-run --hosts h1,h2 -n 5 t.py", {}, {"h1": 3, "h2": 2}),
        ("--dry-run --hosts h1,h2,h3 --nnodes 2 --nproc-per-node 2 t.py", {}, {"h1": 2, "h2": 2}),
        ("--dry-run --hosts h1,h2 --nnodes 1:8 --nproc-per-node 2 t.py", {}, {"h1": 2, "h2": 2}),
        ("--dry-run --hosts localhost,h2:1 --nproc-per-node cpu t.py", {}, {"localhost": 4, "h2": 1}),
        ("--dry-run --hosts h1:4,h2:4 --include h2:1,3 t.py", {}, {"h2": 2}),
        ("--dry-run --hosts h1:4,h2:4 --exclude h2 t.py", {}, {"h1": 4}),
        ("--hosts h1,h2 t.py", ASKED, {"h1": 2, "h2": 1}),
        ("--hosts h1,h2 --nproc-per-node cpu t.py", ASKED, {"h1": 8, "h2": 16}),
        ("--hosts h1,h2 --nproc-per-node auto t.py", ASKED, {"h1": 2, "h2": 16}),
        ("--hosts box,h1 --nproc-per-node auto t.py", ASKED, {"box": 4, "h1": 2}),
        ("--hosts h1,h2:3 t.py", ASKED, {"h1": 2, "h2": 3}),
    ],
)  # fmt: skip
def test_the_command_line_says_how_many_go_where(
    line: str, facts: dict[str, Any], counts: dict[str, int]
) -> None:
    plan = planned(line, **facts)
    assert where(plan) == counts
    (role,) = plan.job.roles.values()
    assert role.total == len(plan.launches)
    assert role.nnodes[1] == len(counts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--nnodes 2 t.py", "--nnodes 2: found 1 host (localhost); name them with --hosts or --hostfile (starting by hand on every node is not possible yet)"),
        ("--nproc-per-node gpu t.py", "--nproc-per-node gpu: this machine has no GPU (allowed: N, cpu, auto)"),
        ("--hosts localhost:2 --nproc-per-node 4 t.py", "--nproc-per-node 4: host localhost has 2 slots"),
        ("--hosts localhost:2 -n 3 t.py", "-n 3: there is room for 2 workers (localhost 2)"),
        ("-n 3 --nproc-per-node 2 t.py", "-n 3: must be a multiple of --nproc-per-node 2"),
        ("--dry-run --hosts h1,h2:2 --nproc-per-node gpu t.py", "--nproc-per-node gpu: what host h1 has is not known; say its slots"),
        ("--hosts h1 --nproc-per-node gpu t.py", "--nproc-per-node gpu: what host h1 has is not known; say its slots"),
        ("--launcher local --hosts localhost,h2 t.py", "--launcher local: this machine only, and it is not h2"),
        ("--dry-run --standalone --hosts h1,h2 t.py", "--standalone: is one host, but 2 are named"),
        ("--hosts localhost,box t.py", "hosts localhost and box are both this machine: name it once"),
        ("--hosts a,a t.py", "--hosts 'a,a': a is named twice (items 1 and 2)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(line: str, message: str) -> None:
    assert refused(line) == message


def test_a_bad_role_name_is_refused_before_anything_starts() -> None:
    assert "a role's name is letters" in refused("--role a/b t.py")


def test_a_host_file_and_a_job_file_are_named_in_their_errors() -> None:
    assert refused("-H hosts t.py", files={"hosts": "h1 slots=x"}).startswith("hosts:1: slots must")
    assert refused("--job j.toml", files={"j.toml": "x = 1\n[roles.a]\nentry='m:f'"}).startswith(
        "j.toml: x: unknown key"
    )


def hosts_of(line: str, **facts: Any) -> tuple[Host, ...]:
    return hosts_from_options(parse_options(line.split(), {}), replace(FACTS, **facts))


def test_slots_that_only_a_host_can_say_are_left_open_until_it_was_asked() -> None:
    assert [host.slots for host in hosts_of("--hosts box:1,h1,h2:3 t.py")] == [1, None, 3]
    assert [host.slots for host in hosts_of("--hosts h1,h2 t.py", **ASKED)] == [2, 1]
    assert [host.slots for host in hosts_of("--hosts h1,h2 --nproc-per-node 4 t.py")] == [4, 4]
    assert refused("--hosts h2 --nproc-per-node gpu t.py", **ASKED) == (
        "--nproc-per-node gpu: host h2 has no GPU (allowed: N, cpu, auto)"
    )


def test_this_machine_goes_through_ssh_only_when_told_to() -> None:
    assert [host.local for host in hosts_of("--hosts box,h1 t.py")] == [True, False]
    forced = hosts_of("--launcher ssh --hosts box,h1 t.py")
    assert [host.local for host in forced] == [False, False]


def test_a_job_of_few_nodes_uses_the_first_hosts() -> None:
    files = {"job.toml": 'node_num = 1\n[roles.a]\nentry = "m:f"\ntotal = 1\n'}
    found = hosts_of("--job job.toml --hosts h1,h2", files=files)
    assert [host.name for host in found] == ["h1"]


def dialled(line: str, **facts: Any) -> DialSettings:
    options, found = parse_options(line.split(), {}), replace(FACTS, **facts)
    return dial_settings(options, hosts_from_options(options, found), found, Config())


def test_what_the_job_needs_on_other_hosts_is_asked_for_there() -> None:
    settings = dialled("--hosts h1 --ssh-port 23 --connect-timeout 7 sub/t.py")
    assert (settings.python, settings.workdir, settings.paths) == (
        "/usr/bin/python3", "/work", ("sub/t.py",),
    )  # fmt: skip
    assert settings.ssh_port == 23
    assert (settings.timeout_s, settings.alive_interval_s * settings.alive_count) == (7, 30)
    settings = dialled("--hosts h1 --python /py --workdir /data -m pkg.mod")
    assert (settings.python, settings.paths) == ("/py", ("/data",))
    job = '[roles.a]\nentry = "m:f"\ntotal = 1\npython = "/other"\nworkdir = "w"\n'
    settings = dialled("--hosts h1 --job job.toml", files={"job.toml": job})
    assert (settings.pythons, settings.paths) == (("/other",), ("w",))


def test_the_files_that_options_name_are_asked_for() -> None:
    def files(line: str) -> tuple[str, ...]:
        return needed_files(parse_options(line.split(), {}))

    assert files("-H hosts --env-file a --env-file b t.py") == ("hosts", "a", "b")
    assert files("--job j.toml") == ("j.toml",)
    assert files("--hosts h -H hosts t.py") == ()


# What each one runs and sees


@pytest.mark.parametrize(
    ("entry", "argv"),
    [
        (Entry("script", "t.py", ("--x", "1")), ("py", "t.py", "--x", "1")),
        (Entry("module", "pkg.mod", ("a",)), ("py", "-m", "pkg.mod", "a")),
        (Entry("object", "pkg.mod:run"), ("py", "-m", "runtime.worker", "--entry", "pkg.mod:run")),
        (Entry("program", "./a.out", ("1",)), ("./a.out", "1")),
    ],
)
def test_the_command_line_of_a_worker(entry: Entry, argv: tuple[str, ...]) -> None:
    assert command_line(entry, "py") == argv


def test_a_worker_has_the_whole_environment_of_torchrun_and_ours() -> None:
    plan = planned("--dry-run --hosts h1:2,h2:1 --role train --max-restarts 3 --rdzv-id abc t.py")
    assert plan.launches[2].argv == ("/usr/bin/python3", "t.py")
    assert dict(plan.launches[2].env) == {
        "RANK": "2",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "1",
        "NODE_RANK": "1",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_NAME": "train",
        "ROLE_RANK": "2",
        "ROLE_WORLD_SIZE": "3",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "abc",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "RUNTIME_JOB_ID": "abc",
        "RUNTIME_ROLE": "train",
        "RUNTIME_ACTOR": "train-2",
        "RUNTIME_HOST": "h2",
        "RUNTIME_GLOBAL_RANK": "2",
        "RUNTIME_GLOBAL_WORLD_SIZE": "3",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    assert plan.launches[1].env["OMP_NUM_THREADS"] == "1", "two workers share h1"


def test_omp_num_threads_is_set_only_where_nobody_said_it() -> None:
    def threads(line: str, **facts: Any) -> str | None:
        return planned(line, **facts).launches[0].env.get("OMP_NUM_THREADS")

    assert threads("--nproc-per-node 2 t.py") == "1"
    assert threads("t.py") is None
    assert threads("--nproc-per-node 2 t.py", env={"OMP_NUM_THREADS": "7"}) is None
    assert threads("--nproc-per-node 2 -x OMP_NUM_THREADS=5 t.py") == "5"


def test_large_pages_are_asked_for_beside_what_the_user_says_of_the_allocator() -> None:
    def said(line: str, **facts: Any) -> str:
        return planned(line, **facts).launches[0].env["GLIBC_TUNABLES"]

    assert said("t.py", env={"GLIBC_TUNABLES": "a=2"}) == "a=2:glibc.malloc.hugetlb=1"
    assert said("-x GLIBC_TUNABLES=b=3 t.py") == "b=3:glibc.malloc.hugetlb=1"


def test_precedence_is_inherited_then_global_then_role() -> None:
    text = """
    [global_env]
    A = "global"
    B = "global"
    C = "global"
    [roles.r]
    entry = "m:f"
    env = { A = "role" }
    """
    plan = planned(
        "--job j --env-file e -x C=line", files={"j": text, "e": "B=file\nC=file\nD=file"}
    )
    env = worker_env(plan.launches[0], {"A": "inherited", "E": "inherited"}, Start())
    assert [env[name] for name in "ABCDE"] == ["role", "file", "line", "file", "inherited"]


def test_what_only_a_start_decides_is_added_and_nothing_of_an_outer_job_is_left() -> None:
    launch = planned("--nproc-per-node 2 t.py").launches[1]
    outer = {
        "RANK": "7",
        "MASTER_PORT": "1",
        "RUNTIME_INCARNATION": "9",
        "TORCHELASTIC_ERROR_FILE": "x",
        "PATH": "/bin",
    }
    first = worker_env(launch, outer, Start())
    assert (first["RANK"], first["RUNTIME_INCARNATION"], first["PATH"]) == ("1", "0", "/bin")
    assert "MASTER_PORT" not in first
    assert "TORCHELASTIC_ERROR_FILE" not in first
    again = worker_env(launch, outer, Start(3, 2, "/log/error.json", "127.0.0.1", 29511, 0, 1))
    assert {name: again[name] for name in again if again[name] != first.get(name)} == {
        "RANK": "0",
        "ROLE_RANK": "0",
        "WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_ERROR_FILE": "/log/error.json",
        "RUNTIME_INCARNATION": "3",
    }  # fmt: skip


def test_a_master_chosen_by_hand_goes_before_the_rounds() -> None:
    plan = planned("--master-addr 10.0.0.7 --master-port 29500 t.py")
    env = worker_env(plan.launches[0], {}, Start(master_addr="127.0.0.1", master_port=1))
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.7", "29500")
    assert "MASTER_PORT" not in planned("--master-port 0 t.py").launches[0].env


def test_devices_are_masked_only_when_picked_by_hand() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in planned("--nproc-per-node 2 t.py").launches[0].env
    picked = planned("--hosts localhost:4 --include localhost:1,3 t.py")
    assert picked.launches[0].env["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_the_role_of_a_command_line_restarts_as_a_gang() -> None:
    role = planned("--max-restarts 2 --init-process-group t.py").job.roles["default"]
    assert (role.kind, role.restart) == ("elastic", Restart("gang", 2))
    assert role.sets_up_process_group
    assert not role.checks_node


def test_the_command_line_beats_the_job_file() -> None:
    text = '[roles.a]\nentry="m:f"\npython="/file/python"\nworkdir="/file"\npreload=["x"]'
    files = {"j": text}
    plain = planned("--job j", files=files)
    assert plain.launches[0].argv[0] == "/file/python"
    line = "--job j --python /line/python --workdir /line --preload none --start-method spawn"
    role = planned(line, files=files).job.roles["a"]
    assert (role.python, role.workdir, role.preload, role.start_method) == (
        "/line/python", "/line", (), "spawn",
    )  # fmt: skip


def test_env_files_hold_assignments() -> None:
    text = "# c\nA=1\nexport B='x y' # it's\nC=\"q # q\"\nD = a=b # note\n\nE="
    assert parse_env_file(text, "f") == {"A": "1", "B": "x y", "C": "q # q", "D": "a=b", "E": ""}
    with pytest.raises(ConfigError) as raised:
        parse_env_file("A\n1B=2\nRANK=0\nOK=1", "f")
    assert str(raised.value).split("\n") == [
        "f:1: must be NAME=VALUE, not 'A'",
        "f:2: must be NAME=VALUE, not '1B=2'",
        "f:3: RANK is set by the launcher and cannot be chosen",
    ]


# Jobs of several roles


def role(name: str, **fields: Any) -> RoleSpec:
    values = {"kind": "simple", "entry": Entry("object", "m:f"), **fields}
    if values["kind"] == "elastic":
        values.setdefault("restart", Restart("gang"))
    return RoleSpec(name, **values)


def job(*roles: RoleSpec, **fields: Any) -> JobSpec:
    return JobSpec("j", {one.name: one for one in roles}, **fields)


def placed(found: JobSpec, *rooms: Room) -> dict[str, str]:
    return {name: " ".join(hosts) for name, hosts in place(found, rooms).items()}


def test_elastic_roles_fill_hosts_in_order_and_simple_ones_take_what_is_left() -> None:
    found = job(role("eval"), role("train", kind="elastic", total=3, nnodes=(1, 2)))
    assert placed(found, Room("h1", 2), Room("h2", 4)) == {"train": "h1 h1 h2", "eval": "h2"}
    assert placed(found, Room("h1"), Room("h2")) == {"train": "h1 h1 h2", "eval": "h2"}


def test_members_of_a_group_share_a_host() -> None:
    found = job(role("a", kind="elastic", total=4, per_group=2, nnodes=(1, 2)))
    assert placed(found, Room("h1", 3), Room("h2", 3)) == {"a": "h1 h1 h2 h2"}
    assert placed(found, Room("h1"), Room("h2")) == {"a": "h1 h1 h2 h2"}
    assert placed(job(role("s", total=4, per_group=2)), Room("h1", 3), Room("h2", 2)) == {
        "s": "h1 h1 h2 h2"
    }


def test_simple_roles_spread_over_hosts_whose_slots_are_not_known() -> None:
    roles = (role("roll", total=2), role("reward"), role("judge", total=2, per_group=2))
    assert placed(job(*roles), Room("h1"), Room("h2"), Room("h3")) == {
        "roll": "h1 h2",
        "reward": "h3",
        "judge": "h1 h1",
    }
    # Slots that are known and free come first.
    assert placed(job(*roles[:2]), Room("h1"), Room("h2", 1)) == {"roll": "h2 h1", "reward": "h1"}


def test_simple_roles_are_never_refused_for_want_of_slots() -> None:
    found = job(role("a", total=4))
    assert placed(found, Room("h1", 1), Room("h2", 2)) == {"a": "h1 h2 h2 h1"}


def test_collocated_roles_share_hosts_group_by_group_and_take_no_further_slots() -> None:
    found = job(
        role("actor", total=4, per_group=2),
        role("rollout", total=2),
        role("other"),
        collocations=(frozenset({"actor", "rollout"}),),
    )
    assert placed(found, Room("h1", 2), Room("h2", 3)) == {
        "actor": "h1 h1 h2 h2",
        "rollout": "h1 h2",
        "other": "h2",
    }


def test_hosts_kept_for_a_role_are_used_by_no_other() -> None:
    found = job(role("a", total=2), role("b", total=2))
    rooms = (Room("h1", 2, "b"), Room("h2", 2))
    assert placed(found, *rooms) == {"a": "h2 h2", "b": "h1 h1"}
    with pytest.raises(ConfigError, match="role a: every host is kept for another role"):
        place(found, [Room("h1", 2, "b")])


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (role("a", kind="elastic", total=5, nnodes=(1, 2)), "role a: total = 5, but the hosts have room for 4 (h1 2, h2 2)"),
        (role("a", kind="elastic", total=4), "role a: total = 4, but the hosts have room for 2 (h1 2); nnodes = 1 keeps it off the others"),
        (role("a", kind="elastic", total=6, nnodes=(2, 2), nproc_per_node=3), "role a: 3 workers do not fit on h1, which has 2 of 2 slots free"),
    ],
)  # fmt: skip
def test_an_elastic_role_that_does_not_fit_is_refused(one: RoleSpec, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        place(job(one), [Room("h1", 2), Room("h2", 2)])
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("found", "hosts", "message"),
    [
        (job(role("a"), node_num=2), (Host("localhost"),), "the job needs node_num = 2 hosts, found 1: localhost"),
        (job(role("a")), (), "no host to start on"),
        (job(role("a")), (Host("localhost", role="b"),), "host localhost: role=b is no role of the job (a)"),
        (job(role("a", kind="elastic", total=4, nnodes=(2, 2))), (Host("localhost"),), "role a: needs 2 hosts, found 1"),
        (job(role("a", total=0)), (Host("localhost"),), "roles.a.total = 0: must be at least 1"),
        (
            job(role("a", resource=Resource(accelerator=3)), node_num=1, device_per_node=2),
            (Host("localhost"),),
            "roles ask for 3 devices (a 3), but node_num * device_per_node = 1 * 2 = 2",
        ),
    ],
)  # fmt: skip
def test_a_job_that_does_not_fit_its_hosts_is_refused(
    found: JobSpec, hosts: tuple[Host, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        make_plan(parse_options(["t.py"], {}), hosts, found, facts=FACTS)
    assert str(raised.value) == message


def test_one_master_port_cannot_serve_two_roles() -> None:
    text = "".join(f'[roles.{name}]\nkind="elastic"\nentry="m:f"\n' for name in "ab")
    assert refused("--job j --master-port 29500", files={"j": text}) == (
        "--master-port 29500: one port cannot serve the roles a, b; leave it out, and each gets a free one"
    )


def test_ranks_are_per_role_and_global_ranks_count_through() -> None:
    found = job(role("t", kind="elastic", total=2), role("e"))
    plan = make_plan(parse_options(["t.py"], {}), [Host("localhost")], found, facts=FACTS)
    rows = [
        (w.env["RUNTIME_ACTOR"], w.env["WORLD_SIZE"], w.env["RUNTIME_GLOBAL_RANK"])
        for w in plan.launches
    ]
    assert rows == [("t-0", "2", "0"), ("t-1", "2", "1"), ("e-0", "1", "2")]
    actors = planned_actors(plan)
    assert [actor.name for actor in actors] == ["t-0", "t-1", "e-0"]
    assert (actors[1].local_rank, actors[1].world_size, actors[1].spec) == (
        1,
        2,
        plan.job.roles["t"],
    )


@given(
    st.lists(st.none() | st.integers(1, 8), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4),
)
def test_every_rank_gets_a_host_and_groups_stay_together(
    slots: list[int | None], sizes: list[tuple[int, int]]
) -> None:
    rooms = [Room(f"h{number}", count) for number, count in enumerate(slots)]
    roles = [
        role(f"r{n}x", total=groups * size, per_group=size)
        for n, (groups, size) in enumerate(sizes)
    ]
    for one in roles:
        hosts = place(job(*roles), rooms)[one.name]
        assert len(hosts) == one.total
        groups = [set(hosts[at : at + one.per_group]) for at in range(0, one.total, one.per_group)]
        assert all(len(group) == 1 for group in groups)


# Shown


def test_the_json_form_has_exactly_job_hosts_and_launches() -> None:
    document = json.loads(
        to_json(planned("--dry-run --hosts h1:2,h2 --nproc-per-node 1 t.py --x 1"))
    )
    assert list(document) == ["job", "hosts", "launches"]
    assert document["job"]["id"] == "j1"
    assert document["job"]["roles"]["default"]["entry"] == {
        "form": "script", "target": "t.py", "args": ["--x", "1"],
    }  # fmt: skip
    assert document["hosts"] == [
        {"name": "h1", "slots": 2, "local": False},
        {"name": "h2", "slots": 1, "local": False},
    ]
    launch = document["launches"][1]
    assert list(launch) == ["host", "role", "rank", "local_rank", "argv", "env"]
    assert (launch["host"], launch["rank"], launch["local_rank"]) == ("h2", 1, 0)
    assert launch["argv"] == ["/usr/bin/python3", "t.py", "--x", "1"]


def test_the_json_form_survives_what_a_users_config_may_hold() -> None:
    found = job(role("a"), role("b"), config={"x": {1: object}}, collocations=(frozenset("ab"),))
    plan = make_plan(parse_options(["t.py"], {}), [Host("localhost")], found, facts=FACTS)
    document = json.loads(to_json(plan))
    assert document["job"]["config"] == {"x": {"1": "<class 'object'>"}}
    assert document["job"]["collocations"] == [["a", "b"]]


def test_the_text_form_reads_well() -> None:
    text = """
    [global_env]
    K = "a b"
    [roles.train]
    kind = "elastic"
    entry = "m:f"
    total = 2
    [roles.eval]
    entry = "eval.py --n 1"
    driver = false
    """
    plan = planned("--job sft.toml", files={"sft.toml": text}, env={"PYTHONUNBUFFERED": "1"})
    assert to_text(plan) == (
        "job j1 (sft): 3 workers\n"
        "host localhost: 3 slots, this machine\n"
        "\n"
        "role train: elastic, 2 workers, restart gang, 3x\n"
        "  /usr/bin/python3 -m runtime.worker --entry m:f\n"
        "  all: GLIBC_TUNABLES=glibc.malloc.hugetlb=1 GROUP_RANK=0 GROUP_WORLD_SIZE=1 K='a b' "
        "LOCAL_WORLD_SIZE=2 NODE_RANK=0 OMP_NUM_THREADS=1 "
        "PYTHONFAULTHANDLER=1 ROLE_NAME=train ROLE_WORLD_SIZE=2 RUNTIME_GLOBAL_WORLD_SIZE=3 "
        "RUNTIME_HOST=localhost RUNTIME_JOB_ID=j1 RUNTIME_ROLE=train TORCHELASTIC_MAX_RESTARTS=3 "
        "TORCHELASTIC_RUN_ID=j1 TORCHELASTIC_USE_AGENT_STORE=False WORLD_SIZE=2\n"
        "  train-0 on localhost: LOCAL_RANK=0 RANK=0 ROLE_RANK=0 RUNTIME_ACTOR=train-0 RUNTIME_GLOBAL_RANK=0\n"
        "  train-1 on localhost: LOCAL_RANK=1 RANK=1 ROLE_RANK=1 RUNTIME_ACTOR=train-1 RUNTIME_GLOBAL_RANK=1\n"
        "\n"
        "role eval: simple, 1 worker, restart one, 3x, no driver\n"
        "  /usr/bin/python3 eval.py --n 1\n"
        "  eval-0 on localhost: GLIBC_TUNABLES=glibc.malloc.hugetlb=1 GROUP_RANK=0 GROUP_WORLD_SIZE=1 "
        "K='a b' LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 "
        "NODE_RANK=0 OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1 RANK=0 ROLE_NAME=eval ROLE_RANK=0 "
        "ROLE_WORLD_SIZE=1 RUNTIME_ACTOR=eval-0 RUNTIME_GLOBAL_RANK=2 RUNTIME_GLOBAL_WORLD_SIZE=3 "
        "RUNTIME_HOST=localhost RUNTIME_JOB_ID=j1 RUNTIME_ROLE=eval TORCHELASTIC_MAX_RESTARTS=3 "
        "TORCHELASTIC_RUN_ID=j1 TORCHELASTIC_USE_AGENT_STORE=False WORLD_SIZE=1\n"
    )

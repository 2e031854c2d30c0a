"""Entries, validation, and `job.toml` there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.job import (
    Entry,
    JobSpec,
    Resource,
    Restart,
    RoleSpec,
    actor_name,
    parse_entry,
    validate,
)
from runtime.job_toml import job_from_toml

RUN = Entry("object", "pkg.mod:run")


def job(*roles: RoleSpec, **fields: Any) -> JobSpec:
    return JobSpec("j", {role.name: role for role in roles}, **fields)


def role(name: str = "trainer", **fields: Any) -> RoleSpec:
    values = {"kind": "simple", "entry": RUN, **fields}
    if values["kind"] == "elastic":
        values.setdefault("restart", Restart("gang"))
    return RoleSpec(name, **values)


def problems(found: JobSpec) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        validate(found)
    return str(raised.value).split("\n")


def toml_problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        job_from_toml(text, "jobs/job.toml")
    return str(raised.value).split("\n")


# Entries


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("pkg.mod:run", RUN),
        ("pkg.mod.run", RUN),
        ("mod:Cls.create", Entry("object", "mod:Cls.create")),
        ("train.py", Entry("script", "train.py")),
        ("train.py --x 'a b'", Entry("script", "train.py", ("--x", "a b"))),
        ("./bin/tool 1", Entry("script", "./bin/tool", ("1",))),
        ("'my dir/train.py'", Entry("script", "my dir/train.py")),
        ("-m pkg.mod --x 1", Entry("module", "pkg.mod", ("--x", "1"))),
    ],
)
def test_an_entry_is_told_by_its_form(text: str, entry: Entry) -> None:
    assert parse_entry(text) == entry
    assert parse_entry(str(entry)) == entry


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("run", "is not understood"),
        ("pkg.mod:", "is not understood"),
        ("pkg mod", "is not understood"),
        ("a-b:c", "is not understood"),
        ("pkg.1mod:run", "is not understood"),
        ("-m", "-m needs the dotted name of a module"),
        ("-m a-b", "-m needs the dotted name of a module"),
        ("train.py 'x", "no closing quotation"),
        ("pkg.mod:run --x 1", "takes no arguments here (found --x 1)"),
    ],
)
def test_an_entry_that_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_entry(text)
    assert message in str(raised.value)
    assert repr(text) in str(raised.value)


@given(st.lists(st.text().filter(lambda s: "\0" not in s)))
def test_arguments_keep_their_quoting(args: list[str]) -> None:
    entry = Entry("script", "train.py", tuple(args))
    assert parse_entry(str(entry)) == entry


# What a role does before its entry


@pytest.mark.parametrize(
    ("fields", "group", "check"),
    [
        ({"kind": "elastic"}, True, True),
        ({"kind": "elastic", "comm_auto_setup_process_group": False}, False, True),
        ({"kind": "elastic", "comm_pre_check": False}, True, False),
        ({"kind": "elastic", "entry": Entry("script", "t.py")}, False, False),
        ({"kind": "elastic", "entry": Entry("module", "t"), "init_process_group": True}, True, False),
        ({"kind": "elastic", "entry": Entry("program", "t"), "init_process_group": True}, False, False),
        ({"kind": "simple", "init_process_group": True}, False, False),
    ],
)  # fmt: skip
def test_who_sets_up_a_process_group_and_checks_the_node(
    fields: dict[str, Any], group: bool, check: bool
) -> None:
    found = role(**fields)
    assert (found.sets_up_process_group, found.checks_node) == (group, check)


# Validation


def test_a_sound_job_is_returned_as_it_is() -> None:
    sound = job(
        role("trainer", kind="elastic", total=4, per_group=2, nnodes=(1, 2), nproc_per_node=2),
        role("actor", total=4, per_group=2),
        role("reward", driver=False),
        collocations=(frozenset({"trainer", "actor"}),),
        global_env={"K": "V"},
    )
    assert validate(sound) is sound


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total": 0}, "roles.trainer.total = 0: must be at least 1"),
        ({"per_group": 0}, "roles.trainer.per_group = 0: must be at least 1"),
        ({"total": 3, "per_group": 2}, "roles.trainer.total = 3: must be a multiple of per_group = 2"),
        ({"nproc_per_node": 0}, "roles.trainer.nproc_per_node = 0: must be at least 1"),
        ({"nnodes": (2, 1)}, "roles.trainer.nnodes = 2:1: must be N or MIN:MAX with 1 <= MIN <= MAX"),
        (
            {"kind": "elastic", "total": 3, "nproc_per_node": 2},
            "roles.trainer.total = 3: must be nnodes * nproc_per_node = 1 * 2 = 2",
        ),
        (
            {"kind": "elastic", "total": 6, "nproc_per_node": 3, "nnodes": (2, 2), "per_group": 2},
            "roles.trainer.nproc_per_node = 3: must be a multiple of per_group = 2: groups share a host",
        ),
        (
            {"kind": "elastic", "restart": Restart("one")},
            "roles.trainer.restart.policy = 'one': a role of kind elastic allows gang, never",
        ),
        ({"restart": Restart("one", -1)}, "roles.trainer.restart.max = -1: must be 0 or more"),
        ({"resource": Resource(cpu=-1)}, "roles.trainer.resource.cpu = -1: must be 0 or more"),
        ({"env": {"A-B": "1"}}, "roles.trainer.env: 'A-B' is no name of a variable"),
        ({"env": {"RANK": "1"}}, "roles.trainer.env: RANK is set by the launcher and cannot be chosen"),
        ({"env": {"A": "x\0"}}, "roles.trainer.env.A: a value cannot hold a zero byte"),
    ],
)  # fmt: skip
def test_a_wrong_role_is_refused_naming_field_value_and_what_is_allowed(
    fields: dict[str, Any], message: str
) -> None:
    assert problems(job(role(**fields))) == [message]


@pytest.mark.parametrize("name", ["", "a b", "1st", "a/b", "trainer-3", "@agent", "x" * 65])
def test_a_role_name_that_would_be_mistaken_for_something_else_is_refused(name: str) -> None:
    assert "a role's name is letters" in problems(job(role(name)))[0]


def test_role_names_are_case_sensitive() -> None:
    assert set(validate(job(role("Actor"), role("actor"))).roles) == {"Actor", "actor"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (job(), "roles: a job needs at least one role"),
        (
            job(role("a", driver=False)),
            "roles: none is a driver, so the job would end at once; give one driver = true",
        ),
        (job(role("a"), node_num=0), "node_num = 0: must be at least 1"),
        (job(role("a"), global_env={"RANK": "0"}), "global_env: RANK is set by the launcher and cannot be chosen"),
        (
            job(role("actor"), collocations=(frozenset({"actor", "actr"}),)),
            "collocation ['actor', 'actr']: no role is called 'actr' (did you mean actor?); the roles are actor",
        ),
        (job(role("a"), collocations=(frozenset({"a"}),)), "collocation ['a']: at least two roles are needed"),
        (
            job(role("a", total=4, per_group=2), role("b", total=4), collocations=(frozenset("ab"),)),
            "collocation ['a', 'b']: all need the same number of groups (total / per_group), but a has 2, b has 4",
        ),
        (
            job(role("a"), role("b"), role("c"), collocations=(frozenset("ab"), frozenset("bc"))),
            "collocation ['b', 'c']: b is collocated twice",
        ),
        (
            job(role("a", total=4, resource=Resource(accelerator=1)), role("b"), node_num=1, device_per_node=2),
            "roles ask for 4 devices (a 4), but node_num * device_per_node = 1 * 2 = 2",
        ),
    ],
)  # fmt: skip
def test_roles_must_fit_together(found: JobSpec, message: str) -> None:
    assert problems(found) == [message]


def test_all_mistakes_of_a_job_come_together() -> None:
    wrong = job(role("a", total=0, driver=False), role("b", per_group=2, driver=False))
    assert len(problems(wrong)) == 3


# job.toml

FULL = """
name = "grpo"
node_num = 1
device_per_node = 4
device_type = "CPU"
dl_type = "RL"
stream_type = "task"
collocation = [["actor", "rollout"]]
[config]
lr = 1e-3
deep = { a = [1, "x", { b = true }] }
[global_env]
K = "V"
[roles.trainer]
entry = "pkg.mod:run"
kind = "elastic"
total = 4
per_group = 2
nnodes = "1:2"
nproc_per_node = 2
driver = false
env = { A = "1" }
resource = { cpu = 1, memory = 1024, accelerator = 0.5 }
restart = { policy = "never", max = 1 }
python = "/opt/venv/bin/python"
workdir = "/data"
preload = ["torch", "numpy"]
start_method = "spawn"
comm_auto_setup_process_group = false
comm_pre_check = false
[roles.actor]
entry = "train.py --x 'a b'"
preload = "none"
[roles.rollout]
entry = "-m pkg.mod"
"""


def test_every_key_of_a_job_file_is_read() -> None:
    found = job_from_toml(FULL)
    assert found == JobSpec(
        "grpo",
        {
            "trainer": RoleSpec(
                "trainer",
                "elastic",
                RUN,
                4,
                2,
                False,
                {"A": "1"},
                Resource(1, 1024, 0, 0.5),
                Restart("never", 1),
                comm_auto_setup_process_group=False,
                comm_pre_check=False,
                nnodes=(1, 2),
                nproc_per_node=2,
                python="/opt/venv/bin/python",
                workdir="/data",
                preload=("torch", "numpy"),
                start_method="spawn",
            ),
            "actor": RoleSpec(
                "actor", "simple", Entry("script", "train.py", ("--x", "a b")), preload=()
            ),
            "rollout": RoleSpec("rollout", "simple", Entry("module", "pkg.mod")),
        },
        (frozenset({"actor", "rollout"}),),
        {"lr": 1e-3, "deep": {"a": [1, "x", {"b": True}]}},
        {"K": "V"},
        1,
        4,
        "CPU",
        "RL",
        "task",
    )
    assert job_from_toml(found.to_toml()) == found


def test_what_a_job_file_leaves_out_has_defaults() -> None:
    text = (
        '[roles.a]\nentry="m:f"\n[roles.b]\nkind="elastic"\nentry="m:f"\nnproc_per_node=3\nnnodes=2'
    )
    found = job_from_toml(text, "dir/my.toml")
    assert found.name == "my"
    assert found.roles["a"] == RoleSpec("a", "simple", Entry("object", "m:f"))
    assert found.roles["a"].restart == Restart("one", 3)
    assert found.roles["b"].restart == Restart("gang", 3)
    assert found.roles["b"].total == 6


def test_a_file_that_is_not_toml_is_refused_with_the_line() -> None:
    (line,) = toml_problems("name = \n")
    assert line.startswith("jobs/job.toml: this is not TOML: ")
    assert "line 1" in line


ROLE_KEYS = (
    "entry, kind, total, per_group, driver, env, resource, restart, nnodes, nproc_per_node, python, workdir, "
    "preload, start_method, comm_auto_setup_process_group, comm_pre_check, init_process_group, group"
)


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ('totl = 1', f"roles.a.totl: unknown key (did you mean total?); allowed are {ROLE_KEYS}"),
        ('total = "1"', 'roles.a.total = "1": must be a whole number'),
        ('total = true', "roles.a.total = true: must be a whole number"),
        ('driver = 1', "roles.a.driver = 1: must be true or false"),
        ('kind = "elastc"', 'roles.a.kind = "elastc": must be one of elastic, simple'),
        ('env = { A = 1 }', "roles.a.env = { A = 1 }: values must be text in quotes (A)"),
        ('env = "A=1"', 'roles.a.env = "A=1": must be a table'),
        ('resource = { gpu = 1 }', "roles.a.resource.gpu: unknown key (did you mean cpu?); allowed are cpu, memory, disk, accelerator, extra"),
        ('resource = { cpu = "1" }', 'roles.a.resource.cpu = "1": must be a number'),
        ('resource = { extra = { x = "1" } }', 'roles.a.resource.extra = { x = "1" }: must be a number'),
        ('restart = { policy = "all" }', 'roles.a.restart.policy = "all": must be one of gang, one, never'),
        ('restart = { max = "3" }', 'roles.a.restart.max = "3": must be a whole number'),
        ('nnodes = "1-2"', 'roles.a.nnodes = "1-2": must be a whole number or "MIN:MAX"'),
        ('preload = [1]', "roles.a.preload = [1]: must be a list of names"),
        ('start_method = "forkserver"', 'roles.a.start_method = "forkserver": must be one of fork, spawn'),
        ('python = ""', 'roles.a.python = "": must be text in quotes'),
        ('total = 1979-05-27', "roles.a.total = 1979-05-27: must be a whole number"),
        ('[b]\nx = 1', "b: unknown key; allowed are name, node_num, device_per_node, device_type, dl_type, stream_type, collocation, config, global_env, roles"),
        ('[config]\nx=1\n[roles.b]', 'roles.b.entry is missing: say "pkg.mod:obj", "train.py --x 1" or "-m pkg.mod --x 1"'),
        ('[roles.b]\nentry = "run"', 'roles.b.entry = "run": entry \'run\' is not understood: say "pkg.mod:obj", "train.py --x 1" or "-m pkg.mod --x 1"'),
        ('[roles.b]\nentry = 3', "roles.b.entry = 3: must be text in quotes"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_refused_naming_it(addition: str, message: str) -> None:
    assert toml_problems(f'[roles.a]\nentry = "m:f"\n{addition}\n') == [f"jobs/job.toml: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('dl_type = "XX"', 'dl_type = "XX": must be one of PRE, SFT, RL, MULTIMODAL'),
        ('device_type = "TPU"', 'device_type = "TPU": must be one of CPU, GPU'),
        ("node_num = 1.5", "node_num = 1.5: must be a whole number"),
        ("name = 3", "name = 3: must be text in quotes"),
        ('collocation = ["a", "b"]', 'collocation = ["a", "b"]: must be a list of lists of roles, as [["actor", "rollout"]]'),
        ("config = 3", "config = 3: must be a table"),
    ],
)  # fmt: skip
def test_a_wrong_key_of_the_job_is_refused(text: str, message: str) -> None:
    assert toml_problems(f'{text}\n[roles.a]\nentry = "m:f"\n') == [f"jobs/job.toml: {message}"]


def test_mistakes_of_form_and_of_meaning_come_together_each_once() -> None:
    text = """
    collocation = [["a", "c"]]
    [roles.a]
    entry = "m:f"
    total = "2"
    per_group = 2
    [roles.b]
    entry = "m:f"
    total = 3
    per_group = 2
    """
    assert toml_problems(text) == [
        'jobs/job.toml: roles.a.total = "2": must be a whole number',
        "jobs/job.toml: roles.b.total = 3: must be a multiple of per_group = 2",
        "jobs/job.toml: collocation ['a', 'c']: no role is called 'c'; the roles are a, b",
    ]


def test_a_job_file_without_roles_is_refused() -> None:
    assert toml_problems("") == ["jobs/job.toml: roles: a job needs at least one role"]
    assert toml_problems("roles = 3") == ["jobs/job.toml: roles = 3: must be a table"]
    assert toml_problems("[roles]\na = 3") == [
        "jobs/job.toml: roles.a = 3: must be a table, [roles.a]"
    ]


def test_what_toml_cannot_say_is_refused_when_written() -> None:
    with pytest.raises(ConfigError, match="no notation for None"):
        job(role(), config={"x": None}).to_toml()
    with pytest.raises(ConfigError, match="no notation for programs"):
        job(role(entry=Entry("program", "a.out"))).to_toml()


_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_VALUE = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)
_ENV = st.dictionaries(
    st.from_regex(r"[A-Z]{3,8}Q", fullmatch=True), _TEXT.filter(lambda s: "\0" not in s)
)


@given(
    st.dictionaries(_TEXT, _VALUE, max_size=4),
    _ENV,
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from(["elastic", "simple"]),
    st.none() | st.lists(st.sampled_from(["torch", "x.y"])).map(tuple),
)
def test_any_job_is_read_back_equal(
    config: dict[str, Any], env: dict[str, str], groups: int, size: int, kind: str, preload: Any
) -> None:
    one = role("a.b", kind=kind, total=groups * size, per_group=size, env=env, preload=preload)
    found = validate(job(one, role("c"), config=config, global_env=env))
    again = job_from_toml(found.to_toml())
    assert again == found
    assert again.to_toml() == found.to_toml()


def test_equality_is_of_what_is_said() -> None:
    assert job(role()) == job(role())
    assert job(role()) != job(role(total=2))
    assert job(role()) != replace(job(role()), config={"lr": 1})


def test_instances_are_named_by_role_and_rank() -> None:
    assert actor_name("a", 3) == "a-3"

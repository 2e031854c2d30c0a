"""Wrong input: exit 2, one clear line on what is wrong and what is allowed, no traceback, nothing started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from runtime import launch as launcher
from runtime.errors import ConfigError
from tests.integration.support.job import Job

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]
Told = Callable[..., None]


def refused(job: Job, *words: str, code: int = 2) -> str:
    """The job was refused: every one of `words` stands in what it says, and nothing was started."""
    assert job.wait(20) == code, job.describe()
    for word in words:
        assert word in job.err, f"{word!r} is not said:\n{job.err}"
    assert "Traceback" not in job.err
    assert job.out == ""
    assert not job.logs.exists()
    job.assert_nothing_left(within=0)  # an agent that was started in advance is not either
    return job.err


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """`told(options, words)`: these words are said against these options. The launcher's own way from its
    command line to its plan, in this process; that of the tests with `launch` leads through it, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def told(options: Sequence[str | Path], words: Sequence[str]) -> None:
        with pytest.raises(ConfigError) as raised:
            launcher._launch(["--dry-run", *map(str, options)], None)
        for word in words:
            assert word in str(raised.value), f"{word!r} is not said:\n{raised.value}"

    return told


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--no-such-option", "1"), ("--no-such-option",)),
        (("--nproc-per-nod", "2"), ("--nproc-per-nod", "--nproc-per-node")),
        (("--nproc-per-node", "0"), ("--nproc-per-node", "0", "at least 1")),
        (("--nproc-per-node", "-2"), ("--nproc-per-node", "-2")),
        (("--nproc-per-node", "many"), ("--nproc-per-node", "many", "gpu", "cpu", "auto")),
        (("--nnodes", "3:2"), ("--nnodes", "3:2")),
        (("--nnodes", "x"), ("--nnodes", "x")),
        (("--max-restarts", "-1"), ("--max-restarts", "-1")),
        (("--timeout", "soon"), ("--timeout", "soon")),
        (("--start-method", "threads"), ("--start-method", "threads", "fork", "spawn")),
        (("--hosts", ""), ("--hosts", "empty")),
        (("--hosts", "localhost:0"), ("--hosts", "localhost")),
        (("--hosts", "localhost:x"), ("--hosts", "localhost:x")),
        (("--hosts", "localhost:1,localhost:2"), ("localhost", "twice")),
        (("--env-file", "/no/such/file"), ("cannot read /no/such/file",)),
        (("-H", "h1:8,h2:8"), ("cannot read h1:8,h2:8", "hosts themselves go after --hosts")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and "-" in value[0] else "",
)
def test_a_wrong_option_is_named_with_what_was_found(
    write: Write, told: Told, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    told([*options, write("train.py", "print('ran')\n")], words)


def test_a_wrong_variable_is_named_as_the_variable(write: Write, launch: Launch) -> None:
    script = write("train.py", "print('ran')\n")
    refused(launch(script, env={"RUNTIME_NPROC_PER_NODE": "no"}), "RUNTIME_NPROC_PER_NODE", "no")


def test_no_program_at_all_is_refused_with_the_ways_to_say_one(launch: Launch) -> None:
    refused(launch("--nproc-per-node", "2"), "script")


def test_a_script_and_an_entry_together_are_refused(write: Write, launch: Launch) -> None:
    write("program.py", "def run(): pass\n")
    job = launch("--entry", "program:run", "--job", write("job.toml", "name = 'x'\n"))
    refused(job, "--entry", "--job")


# -- hosts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("localhost slots=2\nlocalhost slots=4\n", ("localhost", ":2", "twice", "line 1")),
        ("# only a comment\n\n", ("no host",)),
        ("localhost slots=2\nhost2 slots=two\n", (":2", "slots=two")),
        ("localhost slots=2 colour=red\n", (":1", "colour")),
        ("gpu[01-\n", (":1", "gpu[01-")),
    ],
    ids=["duplicate", "empty", "no number", "unknown key", "open range"],
)
def test_an_unreadable_host_file_is_named_with_its_line(
    write: Write, told: Told, text: str, words: tuple[str, ...]
) -> None:
    script = write("train.py", "print('ran')\n")
    told(["--hostfile", write("myhosts", text), script], ["myhosts", *words])


def test_a_missing_host_file_is_named(write: Write, launch: Launch) -> None:
    script = write("train.py", "print('ran')\n")
    refused(launch("--hostfile", "nowhere.txt", script), "nowhere.txt")


# -- job.toml ------------------------------------------------------------------------------------

GOOD_ROLE = '[roles.worker]\nentry = "program:run"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('nam = "x"\n' + GOOD_ROLE, ("nam", "name")),
        (GOOD_ROLE + "totl = 2\n", ("worker", "totl", "total")),
        (GOOD_ROLE + 'total = "two"\n', ("worker", "total", "two")),
        (GOOD_ROLE + "total = 0\n", ("worker", "total", "0")),
        (GOOD_ROLE + 'kind = "rubber"\n', ("worker", "kind", "rubber", "elastic", "simple")),
        (GOOD_ROLE + "total = 3\nper_group = 2\n", ("worker", "per_group")),
        (
            GOOD_ROLE + 'restart = { policy = "maybe" }\n',
            ("policy", "maybe", "gang", "one", "never"),
        ),
        (GOOD_ROLE + "driver = false\n", ("driver",)),
        ("[roles.worker]\ntotal = 1\n", ("worker", "entry")),
        ('name = "empty"\n', ("role",)),
        ("name = = 3\n", ("line 1",)),
        ('device_type = "TPU"\n' + GOOD_ROLE, ("device_type", "TPU", "CPU", "GPU")),
    ],
    ids=[
        "unknown key",
        "unknown key of a role",
        "wrong type",
        "zero",
        "kind",
        "group does not divide",
        "policy",
        "no driver",
        "no entry",
        "no role",
        "no TOML",
        "device type",
    ],
)
def test_a_wrong_job_file_is_named_with_role_field_value_and_what_is_allowed(
    write: Write, told: Told, text: str, words: tuple[str, ...]
) -> None:
    write("program.py", "def run(): pass\n")
    told(["--job", write("myjob.toml", text)], ["myjob.toml", *words])


def test_every_mistake_of_a_job_file_is_told_at_once(write: Write, launch: Launch) -> None:
    write("program.py", "def run(): pass\n")
    text = GOOD_ROLE + 'kind = "rubber"\ntotal = "two"\ncolour = 1\n'
    refused(launch("--job", write("myjob.toml", text)), "rubber", "two", "colour")


def test_a_missing_job_file_is_named(launch: Launch) -> None:
    refused(launch("--job", "nowhere.toml"), "nowhere.toml")


# -- programs ------------------------------------------------------------------------------------


def test_a_missing_script_is_named(launch: Launch) -> None:
    refused(launch("nowhere.py"), "nowhere.py")


def test_a_missing_script_of_a_role_is_named(write: Write, launch: Launch) -> None:
    job = launch("--job", write("job.toml", '[roles.worker]\nentry = "nowhere.py --x 1"\n'))
    refused(job, "worker", "nowhere.py")


def test_a_missing_module_of_m_is_named(launch: Launch) -> None:
    refused(launch("-m", "nowhere.at_all"), "nowhere")


def test_an_entry_that_is_no_callable_is_refused_with_what_it_is(
    write: Write, launch: Launch
) -> None:
    write("program.py", "run = 7\n")
    for options in (("--entry", "program:run"), ("--job", write("job.toml", GOOD_ROLE))):
        refused(launch(*options), "program:run", "is 7, which cannot be called", "a class")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def run(first, second): pass", ("needs 2 arguments", "without arguments or with one")),
        ("def run(*, first): pass", ("needs", "argument")),
        (
            "class run:\n    def __init__(self, size): pass\n    def run(self): pass",
            ("constructor needs 1 argument",),
        ),
    ],
    ids=["function", "keyword", "constructor"],
)
def test_an_entry_with_arguments_that_nobody_gives_is_refused(
    write: Write, told: Told, body: str, words: tuple[str, ...]
) -> None:
    program = write("program.py", f"open('started', 'w')\n{body}\n")
    told(["--job", write("job.toml", GOOD_ROLE)], ["worker", "program:run", *words])
    assert not program.with_name("started").exists()


def test_an_entry_without_a_name_behind_the_colon_is_refused(launch: Launch) -> None:
    refused(launch("--entry", "program:"), "program:", "pkg.mod:obj")


def test_a_missing_interpreter_ends_with_127(write: Write, launch: Launch) -> None:
    script = write("train.py", "print('ran')\n")
    job = launch("--python", "/no/such/python", script)
    assert job.wait(20) == 127
    assert "/no/such/python" in job.err
    assert "Traceback" not in job.err
    job.assert_nothing_left()


def test_an_interpreter_that_may_not_be_executed_ends_with_126(
    write: Write, launch: Launch
) -> None:
    python = write("python", "no program\n")
    python.chmod(0o644)
    job = launch("--python", python, write("train.py", "print('ran')\n"))
    assert job.wait(20) == 126
    assert str(python) in job.err
    assert "Traceback" not in job.err
    job.assert_nothing_left()


# -- looking without starting --------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_as_json_and_starts_nothing(write: Write, launch: Launch) -> None:
    script = write("train.py", "open('started', 'w')\n")
    options = ("--nproc-per-node", "2", "--role", "trainer", "--hosts", "localhost:2", "-x", "A=1")
    job = launch("--dry-run", "--json", *options, script, "--lr", "0.1")
    assert job.wait(20) == 0
    plan = json.loads(job.out)
    assert set(plan) == {"job", "hosts", "launches"}
    assert [(host["name"], host["slots"]) for host in plan["hosts"]] == [("localhost", 2)]
    assert [(x["role"], x["rank"], x["local_rank"]) for x in plan["launches"]] == [
        ("trainer", 0, 0),
        ("trainer", 1, 1),
    ]
    for launch_ in plan["launches"]:
        assert set(launch_) == {"host", "role", "rank", "local_rank", "argv", "env"}
        assert launch_["host"] == "localhost"
        assert launch_["argv"][-3:] == [str(script), "--lr", "0.1"]
        assert launch_["env"]["A"] == "1"
        assert "PATH" not in launch_["env"], "only what we set"
    assert plan["job"]["roles"]["trainer"]["total"] == 2
    assert not (job.cwd / "started").exists()
    assert not job.logs.exists()
    job.assert_nothing_left()


def test_a_dry_run_in_words_names_every_worker(write: Write, launch: Launch) -> None:
    job = launch("--dry-run", "--nproc-per-node", "3", "--role", "trainer", write("train.py", ""))
    assert job.wait(20) == 0
    assert all(f"trainer-{rank}" in job.out or f"trainer {rank}" in job.out for rank in range(3))
    job.assert_nothing_left()


def test_help_names_the_ways_to_give_a_program(launch: Launch) -> None:
    job = launch("--help")
    assert job.wait(20) == 0
    for word in ("--entry", "--job", "--nproc-per-node", "--max-restarts", "--dry-run"):
        assert word in job.out
    assert sys.executable not in job.err

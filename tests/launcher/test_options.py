"""Command line and environment to `LaunchOptions`, and every way in which they can be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.job import Entry
from runtime.launcher.flags import BY_NAME, FLAGS, Streams
from runtime.launcher.options import LaunchOptions, help_text, parse_options


def options(line: str, **env: str) -> LaunchOptions:
    return parse_options(line.split(), env)


def problems(line: str | list[str], **env: str) -> list[str]:
    argv = line.split() if isinstance(line, str) else line
    with pytest.raises(ConfigError) as raised:
        parse_options(argv, env)
    return str(raised.value).split("\n")


def test_defaults_are_those_of_torchrun_with_a_grace_of_ten_seconds() -> None:
    assert options("train.py") == LaunchOptions(entry=Entry("script", "train.py"))
    plain = options("train.py")
    assert (plain.max_restarts, plain.role, plain.shutdown_timeout) == (0, "default", 10.0)


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ("train.py --x 1 -m y", Entry("script", "train.py", ("--x", "1", "-m", "y"))),
        ("-m pkg.mod a -v", Entry("module", "pkg.mod", ("a", "-v"))),
        ("--entry pkg.mod:run", Entry("object", "pkg.mod:run")),
        ("--entry pkg.mod.Cls", Entry("object", "pkg.mod:Cls")),
        ("--no-python ./a.out 1", Entry("program", "./a.out", ("1",))),
        ("-- --odd.py x", Entry("script", "--odd.py", ("x",))),
        ("train.py -- x", Entry("script", "train.py", ("--", "x"))),
        ("--nnodes=1 -- train.py", Entry("script", "train.py")),
    ],
)
def test_the_program_begins_where_options_end(line: str, entry: Entry) -> None:
    assert options(line).entry == entry


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("--nproc-per-node 4", "nproc_per_node", 4),
        ("--nproc_per_node=gpu", "nproc_per_node", "gpu"),
        ("--nproc-per_node auto", "nproc_per_node", "auto"),
        ("--num-gpus 2", "nproc_per_node", 2),
        ("--nnodes 1", "nnodes", (1, 1)),
        ("--nnodes 1:4", "nnodes", (1, 4)),
        ("-n 4", "total", 4),
        ("-n4", "total", 4),
        ("-np 4", "total", 4),
        ("--max-restarts 3", "max_restarts", 3),
        ("--monitor-interval 0.5", "monitor_interval", 0.5),
        ("--rdzv-id abc", "job_id", "abc"),
        ("--job-id abc", "job_id", "abc"),
        ("--master-port 29500", "master_port", 29500),
        ("--rdzv-endpoint localhost:0", "rdzv_endpoint", "localhost:0"),
        (
            "--rdzv-conf timeout=3,join_timeout=4",
            "rdzv_conf",
            {"timeout": "3", "join_timeout": "4"},
        ),
        ("-r 3", "redirects", Streams(3)),
        ("--redirects 0:1,1:2", "redirects", Streams(0, {0: 1, 1: 2})),
        ("-t 2", "tee", Streams(2)),
        ("--local-ranks-filter 0,2", "local_ranks_filter", frozenset({0, 2})),
        ("-x A=1 --env B=x=y", "env", {"A": "1", "B": "x=y"}),
        ("-x HOME_TOWN", "env", {"HOME_TOWN": "Ulm"}),
        ("--env-file a --env-file b", "env_files", ("a", "b")),
        ("--preload torch,numpy --preload x.y", "preload", ("torch", "numpy", "x.y")),
        ("--preload none", "preload", ()),
        ("--port-range 20000:20100", "port_range", (20000, 20100)),
        ("--no-tag-output", "tag_output", False),
        ("--log-prefix [${role}${rank}]", "log_prefix", "[${role}${rank}]"),
        ("--start-method spawn", "start_method", "spawn"),
        ("--transport zmq", "transport", "zmq"),
        ("--arena 8GiB", "arena", 8 * 1024**3),
        ("--arena 512MiB", "arena", 512 * 1024**2),
        ("--arena 0", "arena", 0),
        ("--timeout 1.5", "timeout", 1.5),
        ("--drain-timeout 5", "drain_timeout", 5.0),
        ("--connect-timeout 5", "connect_timeout", 5.0),
        ("--launcher ssh", "launcher", "ssh"),
        ("--ssh-port 2222", "ssh_port", 2222),
        ("--ssh-config c", "ssh_config", "c"),
        ("--ssh-args=-i_key", "ssh_args", ("-i_key",)),
        ("--sync src", "sync", "src"),
        ("--detach", "detach", True),
        ("-vv", "verbosity", 2),
        ("-q -q -v", "verbosity", -1),
        ("--init-process-group", "init_process_group", True),
        ("-H hosts", "hostfile", "hosts"),
        ("-i h1@h2:0", "include", "h1@h2:0"),
        ("--dry-run --json", "json", True),
        ("--max-restarts 1 --max-restarts 2", "max_restarts", 2),
    ],
)
def test_each_option_sets_its_field(line: str, field: str, value: object) -> None:
    assert getattr(options(f"{line} train.py", HOME_TOWN="Ulm"), field) == value


def test_streams_of_a_rank_that_is_not_named_are_none() -> None:
    streams = options("-t 0:3,2:1 t.py").tee
    assert streams is not None
    assert [streams.of(rank) for rank in range(3)] == [3, 0, 1]


def test_the_command_line_beats_our_variable_and_that_beats_torchruns() -> None:
    env = {"RUNTIME_NPROC_PER_NODE": "3", "PET_NPROC_PER_NODE": "2"}
    assert options("--nproc-per-node 4 t.py", **env).nproc_per_node == 4
    assert options("t.py", **env).nproc_per_node == 3
    assert options("t.py", PET_NPROC_PER_NODE="2").nproc_per_node == 2
    assert options("t.py", PET_NPROC_PER_NODE="").nproc_per_node is None


def test_variables_set_switches_lists_and_numbers() -> None:
    found = options(
        "t.py",
        RUNTIME_DRY_RUN="true",
        RUNTIME_TAG_OUTPUT="0",
        RUNTIME_ENV="A=1 B='x y'",
        PET_MAX_RESTARTS="2",
        RUNTIME_VERBOSE="1",
        RUNTIME_QUIET="0",
    )
    assert found.dry_run
    assert not found.tag_output
    assert found.env == {"A": "1", "B": "x y"}
    assert (found.max_restarts, found.verbosity) == (2, 1)


def test_a_variable_may_name_the_program_or_the_job() -> None:
    assert options("", RUNTIME_ENTRY="a:b").entry == Entry("object", "a:b")
    assert options("", RUNTIME_JOB="job.toml").job_file == "job.toml"
    assert options("t.py", RUNTIME_JOB="job.toml").entry == Entry("script", "t.py")
    assert options("--entry a:b", RUNTIME_MODULE="1").entry == Entry("object", "a:b")


def test_a_worker_that_launches_does_not_take_its_own_identity_for_options() -> None:
    env = {"RUNTIME_JOB_ID": "outer", "RUNTIME_ROLE": "actor"}
    assert options("t.py", **env).job_id == "outer"
    inner = options("t.py", **env, RUNTIME_GLOBAL_RANK="0")
    assert (inner.job_id, inner.role) == (None, "default")


def test_a_foreign_variable_of_our_name_does_no_harm() -> None:
    assert options("t.py", RUNTIME_ENV="production").env == {}


def test_a_choice_on_the_command_line_drops_the_variable_it_excludes() -> None:
    assert options("--exclude h2 --hosts h1,h2 t.py", RUNTIME_INCLUDE="h1").include is None
    assert options("--job j.toml", PET_NPROC_PER_NODE="4").nproc_per_node is None
    assert options("-n 2 t.py", PET_NPROC_PER_NODE="4").nproc_per_node is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "nothing to run: give a script.py, -m MODULE, --entry PKG.MOD:OBJ or --job FILE"),
        ("-m", "nothing to run: give a script.py, -m MODULE, --entry PKG.MOD:OBJ or --job FILE"),
        ("--nproc 2 t.py", "--nproc: unknown option (did you mean --nproc-per-node?); --help lists all"),
        ("--max-restart=2 t.py", "--max-restart=2: unknown option (did you mean --max-restarts?); --help lists all"),
        ("-z t.py", "-z: unknown option; --help lists all"),
        ("--nproc-per-node 0 t.py", "--nproc-per-node 0: must be a whole number of at least 1, or gpu, cpu or auto"),
        ("--nproc-per-node 2.5 t.py", "--nproc-per-node 2.5: must be a whole number of at least 1, or gpu, cpu or auto"),
        ("--nproc-per-node tpu t.py", "--nproc-per-node tpu: must be a whole number of at least 1, or gpu, cpu or auto"),
        ("--nnodes 0 t.py", "--nnodes 0: must be N or MIN:MAX, whole numbers with 1 <= MIN <= MAX"),
        ("--nnodes 3:2 t.py", "--nnodes 3:2: must be N or MIN:MAX, whole numbers with 1 <= MIN <= MAX"),
        ("--nnodes 2: t.py", "--nnodes 2:: must be N or MIN:MAX, whole numbers with 1 <= MIN <= MAX"),
        ("--max-restarts -1 t.py", "--max-restarts -1: must be a whole number of at least 0"),
        ("--master-port 70000 t.py", "--master-port 70000: must be a whole number of at least 0 and at most 65535"),
        ("--shutdown-timeout soon t.py", "--shutdown-timeout soon: must be a number of seconds, 0 or more"),
        ("--timeout nan t.py", "--timeout nan: must be a number of seconds, 0 or more"),
        ("--hosts= t.py", "--hosts: must not be empty"),
        ("t.py", None),
        ("--start-method forkserver t.py", "--start-method forkserver: must be one of fork, spawn"),
        ("--launcher pdsh t.py", "--launcher pdsh: must be one of local, ssh, slurm"),
        ("--ssh-port 0 t.py", "--ssh-port 0: must be a whole number of at least 1 and at most 65535"),
        ("--transport tcp t.py", "--transport tcp: must be one of auto, zmq"),
        ("--arena 1.5GiB t.py", "--arena 1.5GiB: must be bytes, as a whole number, or with KiB, MiB, GiB or TiB after it"),
        ("-r 4 t.py", "-r 4: must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both), or LOCAL_RANK:STREAMS,…"),
        ("-t 0:1,0:2 t.py", "-t 0:1,0:2: must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both), or LOCAL_RANK:STREAMS,…"),
        ("--local-ranks-filter a t.py", "--local-ranks-filter a: must be local ranks with commas between, as 0,1"),
        ("-x 1A=2 t.py", "-x 1A=2: must be NAME or NAME=VALUE"),
        ("-x RANK=2 t.py", "-x RANK=2: the launcher sets that variable itself; it cannot be chosen"),
        ("-x NO_SUCH t.py", "-x NO_SUCH: not set here; give it a value, -x NO_SUCH=VALUE"),
        ("--rdzv-conf a,b t.py", "--rdzv-conf a,b: must be KEY=VALUE,KEY=VALUE"),
        ("--rdzv-endpoint h:x t.py", "--rdzv-endpoint h:x: must be HOST or HOST:PORT"),
        ("--rdzv-backend zk t.py", "--rdzv-backend zk: must be one of c10d, static, etcd, etcd-v2"),
        ("--port-range 6:5 t.py", "--port-range 6:5: must be LOW:HIGH with 1 <= LOW <= HIGH <= 65535"),
        ("--preload a-b t.py", "--preload a-b: must be module names with commas between, or none"),
        ("--preload none,torch t.py", "--preload none: goes with no other module"),
        ("--log-prefix ${rnk} t.py", "--log-prefix ${rnk}: may name only ${role} ${rank} ${local_rank} ${host} ${pid} ${time} ($$ is a dollar sign)"),
        ("--rdzv-id a/b t.py", "--rdzv-id a/b: must be at most 64 letters, digits, '.', '_' and '-'"),
        ("--rdzv-id .. t.py", "--rdzv-id ..: must not be empty or begin with a dot: it names a folder"),
        ("--dry-run=1 t.py", "--dry-run: takes no value (found '1')"),
        ("-vn t.py", "-v: takes no value (found 'n')"),
        ("--hosts", "--hosts: needs a value, H1:8,H2:8"),
        ("--hosts --dry-run t.py", "--hosts: needs a value, H1:8,H2:8"),
        ("--include a --exclude b t.py", "--include and --exclude: one of them, not both"),
        ("--standalone --nnodes 2 t.py", "--standalone: is one host, but --nnodes says 2"),
        ("--node-rank 1 t.py", "--node-rank 1: must be less than --nnodes (1)"),
        ("--json t.py", "--json: prints the plan, so it goes with --dry-run"),
        ("--log-prefix x --no-tag-output t.py", "--log-prefix and --no-tag-output: one of them, not both"),
        ("--no-python --python x t.py", "--no-python: no interpreter is involved, so neither --python nor --init-process-group can be given"),
        ("-m a-b", "-m a-b: must be the dotted name of a module"),
        ("--entry a:b c", "--entry: takes no program beside it (found 'c')"),
        ("--entry t.py", "--entry t.py: must be PKG.MOD:OBJ; scripts and modules go without --entry"),
        ("--entry foo", '--entry: entry \'foo\' is not understood: say "pkg.mod:obj", "train.py --x 1" or "-m pkg.mod --x 1"'),
        ("--job j.toml --entry a:b", "--entry and --job: one of them, not both"),
        ("--job j.toml -n 2", "-n: says nothing with --job; the file says it for each role"),
        ("--job j.toml t.py", "--job: takes no program beside it (found 't.py')"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_is_allowed(line: str, message: str | None) -> None:
    if message is None:
        assert options(line).entry is not None
    else:
        assert problems(line) == [message]


def test_all_mistakes_come_together() -> None:
    assert problems("--bogus --nproc-per-node 0 --nnodes x --json t.py") == [
        "--bogus: unknown option; --help lists all",
        "--nproc-per-node 0: must be a whole number of at least 1, or gpu, cpu or auto",
        "--nnodes x: must be N or MIN:MAX, whole numbers with 1 <= MIN <= MAX",
        "--json: prints the plan, so it goes with --dry-run",
    ]


def test_a_wrong_variable_is_named() -> None:
    assert problems("t.py", PET_NNODES="x") == [
        "PET_NNODES: x: must be N or MIN:MAX, whole numbers with 1 <= MIN <= MAX"
    ]
    assert problems("t.py", RUNTIME_DRY_RUN="maybe") == ["RUNTIME_DRY_RUN: maybe: must be 1 or 0"]


def test_an_empty_program_name_is_refused() -> None:
    assert problems([""]) == ["the program's name is empty"]


def test_help_wins_over_mistakes_and_names_every_flag_within_the_width() -> None:
    assert options("--bogus --help").help
    text = help_text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in BY_NAME)


def test_no_spelling_is_used_twice_and_every_field_exists() -> None:
    spellings = [name for flag in FLAGS for name in flag.spellings]
    assert len(spellings) == len(set(spellings))
    fields = set(LaunchOptions.__dataclass_fields__) | {"entry_text", "module", "no_python"}
    assert {flag.field for flag in FLAGS} <= fields


_VALUES = {
    "--nproc-per-node": st.integers(1, 10**6).map(str) | st.sampled_from(["gpu", "cpu", "auto"]),
    "--max-restarts": st.integers(0, 1000).map(str),
    "--role": st.text("abcXYZ_09", min_size=1),
    "--shutdown-timeout": st.integers(0, 1000).map(str),
    "--hosts": st.text(min_size=1).filter(lambda s: s.strip() and "\0" not in s),
    "--start-method": st.sampled_from(["fork", "spawn"]),
}


@given(st.lists(st.sampled_from(sorted(_VALUES)), unique=True), st.data(), st.lists(st.text()))
def test_spelling_attachment_and_source_make_no_difference(
    flags: list[str], data: st.DataObject, args: list[str]
) -> None:
    chosen = {flag: data.draw(_VALUES[flag]) for flag in flags}
    apart = [word for flag, value in chosen.items() for word in (flag, value)]
    joined = [f"--{flag[2:].replace('-', '_')}={value}" for flag, value in chosen.items()]
    first = (
        parse_options([*apart, "t.py", *args], {})
        if all(_is_value(v) for v in chosen.values())
        else None
    )
    second = parse_options([*joined, "t.py", *args], {})
    assert first in (None, second)
    assert second.entry == Entry("script", "t.py", tuple(args))
    env = {f"PET_{flag[2:].replace('-', '_').upper()}": value for flag, value in chosen.items()}
    if all(value == value.strip() for value in chosen.values()):
        assert parse_options(["t.py", *args], env) == second


def _is_value(text: str) -> bool:
    return not text.startswith("-")


@given(
    st.lists(st.text() | st.sampled_from(sorted(BY_NAME)), max_size=6),
    st.dictionaries(st.sampled_from(["RUNTIME_ENV", "PET_NNODES", "RUNTIME_QUIET"]), st.text()),
)
def test_any_command_line_is_read_or_refused_in_words(argv: list[str], env: dict[str, str]) -> None:
    try:
        found = parse_options(argv, env)
    except ConfigError as error:
        found = None
        words = str(error)
    if found is None:
        assert words.strip()
    else:
        assert found.help or (found.entry is None) == (found.job_file is not None)


def test_a_home_is_found_where_the_shell_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    options = parse_options(["--workdir=~/x", "--sync=~/y", "t.py"], {})
    assert (options.workdir, options.sync) == ("/home/me/x", "/home/me/y")

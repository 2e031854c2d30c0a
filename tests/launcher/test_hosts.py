"""Host lists, host files in their dialects, selection, and which host is this machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.launcher.hosts import (
    MAX_HOSTS,
    expand_range,
    is_local,
    mark_local,
    parse_hostfile,
    parse_hosts,
    select_hosts,
)
from runtime.launcher.plan import Host


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_hosts(text)
    return str(raised.value)


def file_refused(text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_hostfile(text, "hosts.txt")
    return str(raised.value).split("\n")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("h1:8,h2:8", [Host("h1", 8), Host("h2", 8)]),
        (" h1 , h2:4 ", [Host("h1"), Host("h2", 4)]),
        ("10.0.0.1:2", [Host("10.0.0.1", 2)]),
        ("me@h1:2", [Host("h1", 2, user="me")]),
        ("gpu[01-03,07]:8", [Host(f"gpu{n}", 8) for n in ("01", "02", "03", "07")]),
        (
            "r[1-2]n[8-9],head",
            [Host("r1n8"), Host("r1n9"), Host("r2n8"), Host("r2n9"), Host("head")],
        ),
        ("[fe80::1%ib0]:8,[::1]", [Host("fe80::1%ib0", 8), Host("::1")]),
        ("me@[fe80::1]:2", [Host("fe80::1", 2, user="me")]),
        ("node-1.cluster.local", [Host("node-1.cluster.local")]),
    ],
)
def test_a_list_of_hosts_is_read(text: str, hosts: list[Host]) -> None:
    assert list(parse_hosts(text)) == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty name"),
        ("h1,,h2", "an empty name"),
        ("h1:0", "slots must be a whole number of at least 1, not '0'"),
        ("h1:x", "slots must be a whole number of at least 1, not 'x'"),
        ("h1:", "slots must be a whole number of at least 1, not ''"),
        ("h1 h2", "'h1 h2' is no host name"),
        ("-h1", "'-h1' is no host name"),
        ("gpu[3-1]", "[3-1] is no range"),
        ("gpu[]", "[] is no range"),
        ("gpu[1", "'gpu[1' is no host"),
        ("gpu[1-99999999]", f"[1-99999999] is more than {MAX_HOSTS} hosts"),
        ("gpu[0-16384]", f"[0-16384] is more than {MAX_HOSTS} hosts"),
        ("r[1-200]n[1-200]", f"[1-200] is more than {MAX_HOSTS} hosts"),
        ("h1:\u0663", "slots must be a whole number of at least 1, not '\u0663'"),
        ("fe80::1", "slots must be a whole number of at least 1, not ':1'"),
    ],
)
def test_a_wrong_list_is_refused_with_what_is_allowed(text: str, message: str) -> None:
    assert refused(text) == (
        f"--hosts {text!r}: {message}; "
        "allowed are HOST, HOST:SLOTS and USER@HOST, with ranges as gpu[01-04,07]"
    )


def test_very_many_hosts_are_taken_for_a_mistake() -> None:
    assert len(parse_hosts(f"n[1-{MAX_HOSTS}]")) == MAX_HOSTS
    words = f"{MAX_HOSTS + 1} hosts, but at most {MAX_HOSTS} are allowed"
    assert refused(f"n[1-{MAX_HOSTS}],head") == f"--hosts: {words}"
    assert file_refused(f"n[1-{MAX_HOSTS}]\nhead") == [f"hosts.txt: {words}"]


def test_a_host_named_twice_is_refused_naming_both_places() -> None:
    assert refused("a,b,a:2") == "--hosts 'a,b,a:2': a is named twice (items 1 and 3)"
    assert refused("g[1-3],g2") == "--hosts 'g[1-3],g2': g2 is named twice (items 1 and 2)"


def test_host_files_of_all_dialects_are_read() -> None:
    text = """
    # comment, trailing too
    worker-0 slots=8                 # DeepSpeed, Open MPI
    worker-1	slots = 4 max-slots=8
    worker-2:8                       # MPICH
    user@worker-3 slots=8 port=65535 role=rollout addr=10.0.0.3 python=/opt/venv/bin/python
    gpu[01-02] slots=8
    [fe80::1%ib0]:8
    plain
    """
    assert list(parse_hostfile(text, "hosts.txt")) == [
        Host("worker-0", 8),
        Host("worker-1", 4),
        Host("worker-2", 8),
        Host(
            "worker-3", 8, "10.0.0.3", "user", 65535, python="/opt/venv/bin/python", role="rollout"
        ),
        Host("gpu01", 8),
        Host("gpu02", 8),
        Host("fe80::1%ib0", 8),
        Host("plain"),
    ]


def test_every_wrong_line_of_a_host_file_is_named() -> None:
    text = "a slots=0\nb solts=2\n\nc:2 slots=2\na\nd port=99999\ng[1-2] addr=1.2.3.4\na slots=1 # x\nb x"
    text += "\na\ne port=0\ne port=1 port=2\ne python="
    allowed = "allowed are slots=, max_slots=, port=, addr=, python=, role="
    assert file_refused(text) == [
        "hosts.txt:1: slots must be a whole number of at least 1, not '0' (in 'a slots=0')",
        f"hosts.txt:2: 'solts=2' (did you mean slots?): {allowed} (in 'b solts=2')",
        "hosts.txt:4: slots is said twice (in 'c:2 slots=2')",
        "hosts.txt:6: port must be from 1 to 65535, not '99999' (in 'd port=99999')",
        "hosts.txt:7: addr= cannot be one address for several hosts (in 'g[1-2] addr=1.2.3.4')",
        "hosts.txt:8: a is named twice; first on line 5",
        f"hosts.txt:9: 'x': {allowed} (in 'b x')",
        "hosts.txt:10: a is named twice; first on line 5",
        "hosts.txt:11: port must be from 1 to 65535, not '0' (in 'e port=0')",
        "hosts.txt:12: port is said twice (in 'e port=1 port=2')",
        "hosts.txt:13: python is empty (in 'e python=')",
    ]


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_a_host_file_without_a_host_is_refused(text: str) -> None:
    assert file_refused(text) == [
        "hosts.txt: no host in it; one host a line is needed, as: worker-0 slots=8"
    ]


HOSTS = (Host("h1", 4), Host("h2", 4), Host("g01"), Host("fe80::1", 2))


def chosen(include: str | None = None, exclude: str | None = None) -> list[tuple[str, object]]:
    hosts = select_hosts(HOSTS, include, exclude)
    return [(h.name, h.devices if h.devices is not None else h.slots) for h in hosts]


def test_include_keeps_hosts_and_slots_in_the_order_of_the_list() -> None:
    assert chosen(include="h2:0,2@h1") == [("h1", 4), ("h2", (0, 2))]
    assert chosen(include="g[01]:1@[fe80::1]:0") == [("g01", (1,)), ("fe80::1", (0,))]
    assert select_hosts(HOSTS, "h2:0,2")[0].slots == 2
    assert select_hosts([Host("h1", 9)], "h1:8,1")[0].devices == (1, 8)


def test_exclude_drops_hosts_and_slots() -> None:
    assert chosen(exclude="h1@h2:0@g01@[fe80::1]") == [("h2", (1, 2, 3))]
    assert chosen(exclude="h2:0,1,2,3") == [("h1", 4), ("g01", None), ("fe80::1", 2)]
    assert chosen() == [("h1", 4), ("h2", 4), ("g01", None), ("fe80::1", 2)]


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("h9", None, "--include h9: no host is called 'h9'; the hosts are h1, h2, g01, fe80::1"),
        ("h1@h1:2", None, "--include h1@h1:2: h1 is named twice"),
        ("h1:4", None, "--include h1:4: h1 has no slot 4; it has 0 to 3"),
        ("h1:", None, "--include h1:: 'h1:' is not HOST or HOST:SLOT,SLOT (as h1@h2:0,2)"),
        ("h1,h2", None, "--include h1,h2: 'h1,h2' is not HOST or HOST:SLOT,SLOT (as h1@h2:0,2)"),
        ("h1@", None, "--include h1@: '' is not HOST or HOST:SLOT,SLOT (as h1@h2:0,2)"),
        ("h1:,", None, "--include h1:,: 'h1:,' is not HOST or HOST:SLOT,SLOT (as h1@h2:0,2)"),
        ("g[2-1]", None, "--include g[2-1]: 'g[2-1]' is not HOST or HOST:SLOT,SLOT (as h1@h2:0,2)"),
        (None, "g01:0", "--exclude g01:0: how many slots g01 has is not known; say slots="),
        (None, "h1@h2@g01@[fe80::1]", "--exclude h1@h2@g01@[fe80::1]: no host is left"),
    ],
)  # fmt: skip
def test_a_wrong_selection_is_refused(
    include: str | None, exclude: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        select_hosts(HOSTS, include, exclude)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("localhost", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("node1.cluster.local", True),
        ("node1", True),
        ("10.0.0.7", True),
        ("10", False),
        ("node2", False),
        ("node1.other", False),
    ],
)
def test_this_machine_is_known_by_its_names_and_addresses(name: str, local: bool) -> None:
    assert is_local(name, ["Node1.Cluster.local", "10.0.0.7"]) is local


@pytest.mark.parametrize(
    "line", ["-oProxyCommand=x", "h1 addr=-oProxyCommand=x", "h1 addr=h2:/etc"]
)
def test_nothing_that_ssh_or_rsync_would_take_for_an_option_or_a_path_is_a_host(line: str) -> None:
    with pytest.raises(ConfigError, match=r"hosts\.txt:1: "):
        parse_hostfile(line, "hosts.txt")


def test_a_host_is_local_by_its_address_too_but_only_one_can_be() -> None:
    marked = mark_local([Host("alias", addr="10.0.0.7"), Host("h2")], ["10.0.0.7"])
    assert [host.local for host in marked] == [True, False]
    with pytest.raises(ConfigError, match="hosts localhost and node1 are both this machine"):
        mark_local([Host("localhost"), Host("node1")], ["node1"])


_NAMES = st.lists(
    st.from_regex(r"[a-z][a-z0-9]{0,6}(-[a-z0-9]{1,3})?", fullmatch=True),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(_NAMES, st.data())
def test_what_is_written_in_any_dialect_is_read_back(names: list[str], data: st.DataObject) -> None:
    slots = [data.draw(st.none() | st.integers(1, 64)) for _ in names]
    hosts = [Host(name, count) for name, count in zip(names, slots, strict=True)]
    words = [host.name + (f":{host.slots}" if host.slots else "") for host in hosts]
    assert list(parse_hosts(",".join(words))) == hosts
    lines = [word.replace(":", data.draw(st.sampled_from([":", " slots="]))) for word in words]
    assert list(parse_hostfile("\n".join(lines), "f")) == hosts


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 4))
def test_a_range_counts_up_and_keeps_its_zeros(low: int, more: int, width: int) -> None:
    names = expand_range(f"n[{low:0{width}}-{low + more:0{width}}]")
    assert names == [f"n{number:0{width}}" for number in range(low, low + more + 1)]


@given(st.text())
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    for parse in (lambda: parse_hosts(text), lambda: parse_hostfile(text, "f")):
        try:
            found = parse()
        except ConfigError:
            continue
        assert found
        assert all(host.name for host in found)

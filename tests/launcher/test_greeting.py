"""What agents say of themselves, and what does not fit."""

from __future__ import annotations

import sys
from pathlib import Path

import msgpack
import pytest

from runtime import __version__
from runtime.errors import WireError
from runtime.launcher.channel import Frame, Kind
from runtime.launcher.greeting import Hello, ahead_s, check, describe, read_hello

OWN = Hello("here", "3.11.7", "2.9.0", "0.1.0", 2, 8, 0)


def problems(own: Hello = OWN, **there: object) -> str:
    failures = check({"h1": OWN._replace(**there)}, own)  # type: ignore[arg-type]
    assert [failure.host for failure in failures] == ["h1"] * len(failures)
    assert not any(failure.unreachable for failure in failures)
    return " / ".join(failure.reason for failure in failures)


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ({}, ""),
        ({"python": "3.11.2", "hostname": "h1", "gpu_count": 8}, ""),
        ({"python": "3.12.1"}, "python 3.12 there, but 3.11 here"),
        ({"torch": "2.8.0"}, "torch 2.8.0 there, but 2.9.0 here"),
        ({"torch": None}, "torch none there, but 2.9.0 here"),
        ({"runtime": "0.2.0", "protocol": 3}, "runtime 0.2.0 there, but 0.1.0 here; protocol version 3 there, but 2 here"),
        ({"problems": ("no such directory: /x",)}, "no such directory: /x"),
    ],
)  # fmt: skip
def test_what_differs_from_the_launcher_is_named(there: dict[str, object], reason: str) -> None:
    assert problems(**there) == reason


def test_without_torch_here_the_hosts_must_agree_among_themselves() -> None:
    own = OWN._replace(torch=None)
    hellos = {"h1": OWN, "h2": OWN, "h3": OWN._replace(torch=None)}
    assert [failure.host for failure in check(hellos, own)] == ["h3"]
    assert check({"h1": own, "h2": own}, own) == []


def test_a_machine_by_two_names_is_told_of_the_second() -> None:
    there = OWN._replace(addresses=(("eth0", "10.0.0.7"),))
    other = OWN._replace(addresses=(("eth0", "10.0.0.8"),))
    (failure,) = check({"h1": there, "h2": other, "10.0.0.7": there}, OWN)
    assert failure == ("10.0.0.7", "it is the same machine as h1: name it once", False)


def test_this_machine_describes_itself_without_importing_torch() -> None:
    had = "torch" in sys.modules
    hello = describe({})
    assert (hello.python, hello.runtime) == (sys.version.split()[0], __version__)
    assert hello.cpu_count >= 1
    assert not hello.problems
    assert all(not address.startswith(("127.", "::1")) for _, address in hello.addresses)
    assert ("torch" in sys.modules) == had


def test_what_is_asked_for_and_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    there = {"workdir": str(tmp_path), "python": [sys.executable, "sh"], "paths": ["train.py"]}
    assert describe(there).problems == ()
    lacking = {
        "workdir": str(tmp_path),
        "python": ["/no/python", str(tmp_path)],
        "paths": ["x.py", "/no/dir"],
    }
    assert describe(lacking).problems == (
        "no interpreter /no/python",
        f"no interpreter {tmp_path}",
        "no such file or directory: x.py",
        "no such file or directory: /no/dir",
    )
    assert describe({"workdir": "/no/dir"}).problems == ("no such file or directory: /no/dir",)
    assert describe({"workdir": "/dev/null"}).problems == ("no directory: /dev/null",)
    assert describe({"paths": ["/dev/null/x"]}).problems == ("not a directory: /dev/null/x",)


@pytest.mark.parametrize(
    ("clock", "ahead"), [(99.0, -1.0), (100.0, 0.0), (100.2, 0.0), (100.5, 0.0), (3700.5, 3600.0)]
)
def test_a_clock_that_cannot_be_right_is_told_by_how_much_at_least(
    clock: float, ahead: float
) -> None:
    assert ahead_s(clock, 100.0, 100.5) == ahead


def test_a_hello_comes_back_from_its_frame() -> None:
    hello = OWN._replace(addresses=(("eth0", "10.0.0.1"),), problems=("p",))
    body = msgpack.packb({"event": "hello", **hello._asdict()})
    assert read_hello(Frame(Kind.EVENT, body)) == hello


@pytest.mark.parametrize(
    "frame",
    [
        None,
        Frame(Kind.STDOUT, b"hello"),
        Frame(Kind.EVENT, msgpack.packb({"event": "end"})),
        Frame(Kind.EVENT, msgpack.packb({"event": "hello", "hostname": "x"})),
        Frame(Kind.EVENT, msgpack.packb({"event": "hello", **OWN._asdict(), "addresses": [1]})),
    ],
)
def test_what_is_no_greeting_is_refused(frame: Frame | None) -> None:
    with pytest.raises(WireError, match="no greeting"):
        read_hello(frame)

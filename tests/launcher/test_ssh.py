"""What ssh is told and what its answers mean."""

from __future__ import annotations

import itertools
import shlex
from typing import Any

import pytest

from runtime.launcher.plan import Host
from runtime.launcher.ssh import (
    DialSettings,
    Failure,
    LastWords,
    forwarded,
    is_busy,
    marked_version,
    remote_command,
    ssh_argv,
    why,
)


def argv(host: Host, **settings: Any) -> list[str]:
    return ssh_argv(host, DialSettings("python", "/", **settings), "command", 12.7)


def options(words: list[str]) -> list[str]:
    return [word for before, word in itertools.pairwise(words) if before == "-o"]


def test_ssh_gets_no_terminal_asks_nothing_shares_nothing_and_notices_a_dead_line() -> None:
    words = argv(Host("h1"))
    assert words[:2] == ["ssh", "-T"]
    assert options(words) == [
        "BatchMode=yes", "ControlMaster=no", "ControlPath=none", "RemoteCommand=none",
        "ClearAllForwardings=yes", "ServerAliveInterval=5", "ServerAliveCountMax=3",
        "ConnectTimeout=12",
    ]  # fmt: skip
    assert words[-3:] == ["--", "h1", "command"]


def test_user_port_address_and_configuration_are_passed_on() -> None:
    words = argv(Host("h1", user="me", port=2222, addr="10.0.0.1"), ssh_port=23, ssh_config="c")
    assert words[words.index("-F") :] == [
        "-F", "c", "-p", "2222", "-l", "me", "--", "10.0.0.1", "command",
    ]  # fmt: skip
    assert "23" in argv(Host("h1"), ssh_port=23)


def test_own_options_go_before_ours_where_ssh_takes_the_first_it_hears() -> None:
    heard = options(argv(Host("h1"), ssh_args=("-o", "ConnectTimeout=3", "-o", "BatchMode=no")))
    assert heard.index("ConnectTimeout=3") < heard.index("ConnectTimeout=12")
    assert heard.index("BatchMode=yes") < heard.index("BatchMode=no")


def test_a_name_that_looks_like_an_option_is_none() -> None:
    words = argv(Host("h", addr="-oProxyCommand=x"))
    assert words.index("--") == words.index("-oProxyCommand=x") - 1


def test_the_command_starts_with_exec_and_finds_the_home_there() -> None:
    words = shlex.split(remote_command("/opt/my python", "pass", "f00"))
    assert words[:6] == ["exec", "sh", "-c", 'exec "$0" "$@"', "/opt/my python", "-c"]
    words = shlex.split(remote_command("~/my py", "pass", "f00"))
    assert words[:5] == ["exec", "sh", "-c", 'exec "$HOME/$0" "$@"', "my py"]
    words = shlex.split(remote_command("python", "pass", "f00", [("PYTHONPATH", "/my libs")]))
    assert words[:5] == ["exec", "env", "PYTHONPATH=/my libs", "sh", "-c"]


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (b"runtime-agent f00 3.11.7\n", "3.11.7"),
        (b"Welcome! runtime-agent f00 3.12.0\r\n", "3.12.0"),
        (b"runtime-agent f01 3.11.7\n", None),
        (b"runtime-agent f00\n", None),
        (b"\xff\xfe\n", None),
    ],
)
def test_the_marker_is_found_after_noise_on_its_line_and_by_its_token(
    line: bytes, version: str | None
) -> None:
    assert marked_version(line, "f00") == version


def test_the_environment_is_forwarded_by_the_list_of_prefixes() -> None:
    passed = {
        "PATH": "/bin", "LD_LIBRARY_PATH": "x", "PYTHONPATH": "x", "CUDA_HOME": "x", "NCCL_DEBUG": "INFO",
        "HF_HOME": "x", "OMP_NUM_THREADS": "2", "VIRTUAL_ENV": "x", "RUNTIME_LOG": "debug",
        "TOKENIZERS_PARALLELISM": "0",
    }  # fmt: skip
    kept_back = {
        "SSH_AUTH_SOCK": "x", "SSH_CONNECTION": "x", "SLURM_PROCID": "1", "DISPLAY": ":0",
        "HOME": "/home/me", "SECRET_TOKEN": "x", "PATHS": "x", "CUDA_VISIBLE_DEVICES": "0", "HFX": "x",
    }  # fmt: skip
    assert forwarded({**passed, **kept_back}) == passed


def words(code: int, *stderr: str, signal: str = "", noise: str = "") -> LastWords:
    return LastWords(code, signal, stderr, noise)


_CHANGED = "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @"


@pytest.mark.parametrize(
    ("ending", "reason", "unreachable"),
    [
        (words(255, "ssh: connect to host h1 port 22: Connection refused"), "connect to host h1 port 22: Connection refused", True),
        (words(255, "No ED25519 host key is known for h1 and you have requested strict checking.", "Host key verification failed."),
         "its host key is not known here: run `ssh h1` once, or add it to known_hosts", True),
        (words(255, _CHANGED, "Host key verification failed."), "its host key is not the one that is known here: another machine answers, or it was set up anew", True),
        (words(255, "me@h1: Permission denied (publickey,password)."),
         "no key opens it (me@h1: Permission denied (publickey,password)): use ssh-agent or a key without a passphrase", True),
        (words(255, "channel 0: open failed: connect failed: No route to host", "stdio forwarding failed",
               "kex_exchange_identification: Connection closed by remote host", "Connection closed by UNKNOWN port 65535"),
         "channel 0: open failed: connect failed: No route to host", True),
        (words(255, "kex_exchange_identification: read: Connection reset by peer"), "kex_exchange_identification: read: Connection reset by peer", True),
        (words(255), "ssh gave up without a word", True),
        (words(0, signal="SIGKILL"), "ssh was ended by SIGKILL", True),
        (words(127, "sh: 1: exec: /py: not found"), "has no interpreter /py (--python, or python= in the host file)", False),
        (words(127, "/py: error while loading shared libraries: libpython3.11.so.1.0: cannot open"),
         "cannot run its interpreter /py: /py: error while loading shared libraries: libpython3.11.so.1.0: cannot open", False),
        (words(126, "sh: 1: exec: /py: Permission denied"), "cannot run its interpreter /py: sh: 1: exec: /py: Permission denied", False),
        (words(1, "Traceback", "ModuleNotFoundError: No module named 'runtime'"), "has no package runtime: neither in /src nor installed for /py", False),
        (words(1, "Traceback", "ModuleNotFoundError: No module named 'msgpack'"), "has no package msgpack for /py", False),
        (words(1, "srun: error: Unable to create step for job 4: Invalid node"), "Unable to create step for job 4: Invalid node", True),
        (words(3, "bang"), "its interpreter /py ended with exit 3: bang", False),
        (words(1, noise="no space left"), "its interpreter /py ended with exit 1: it printed 'no space left'", False),
        (words(1), "its interpreter /py ended with exit 1: without a word", False),
    ],
)  # fmt: skip
def test_every_ending_has_its_reason_in_one_line(
    ending: LastWords, reason: str, unreachable: bool
) -> None:
    assert why("h1", ending, "/py", "/src") == Failure("h1", reason, unreachable)


@pytest.mark.parametrize(
    ("reason", "busy"),
    [
        ("Connection reset by 10.0.0.1 port 22", True),
        ("Connection closed by UNKNOWN port 65535", True),
        ("kex_exchange_identification: read: Connection reset by peer", True),
        ("connect to host h1 port 22: Connection refused", False),
    ],
)
def test_a_host_that_turns_us_away_before_it_knows_us_may_be_busy(reason: str, busy: bool) -> None:
    assert is_busy(Failure("h1", reason, unreachable=True)) == busy

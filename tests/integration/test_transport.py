"""How the workers of a real job reach each other: by the local lane and the arena, or all by ZeroMQ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support.job import Job

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]

_PAIR = """
import glob, json, os
import numpy as np
import runtime

@runtime.rpc(export=True)
def double(array):
    array *= 2  # ours: nobody else sees that
    return array

if os.environ["RANK"] == "1":
    mine = np.arange(1_000_000, dtype=np.int32)
    got = runtime.RoleGroup("default").call_rank0("double", mine).result(20)
    assert (got == 2 * np.arange(1_000_000)).all() and mine[-1] == 999_999
    got[0] = 7  # writable
    with open("/proc/net/unix") as table:
        rows = [line.split() for line in table]
    links = [row[-1] for row in rows if row[-1].startswith(os.environ["XDG_RUNTIME_DIR"])]
    connected = [row[-1] for row in rows if row[-1] in links and row[-1].endswith(".u") and row[5] == "03"]
    with open("/proc/self/maps") as maps:
        print(json.dumps({"local": len(connected), "arena": "memfd:arena" in maps.read()}))
runtime.barrier("end")
"""


@pytest.mark.parametrize(
    ("options", "env", "expected"),
    [
        ((), {}, {"local": 1, "arena": True}),
        (("--transport", "zmq"), {}, {"local": 0, "arena": False}),
        ((), {"RUNTIME_TRANSPORT": "zmq"}, {"local": 0, "arena": False}),
        (("--arena", "0"), {}, {"local": 1, "arena": False}),
    ],
)
def test_calls_within_a_host_go_as_the_transport_option_says(
    write: Write, launch: Launch, options: tuple[str, ...], env: dict[str, str], expected: object
) -> None:
    script = write("pair.py", _PAIR)
    job = launch(*options, "--nproc-per-node", "2", "--no-tag-output", script, env=env)
    assert job.wait() == 0, job.describe()
    assert json.loads(job.out.splitlines()[-1]) == expected, job.describe()
    job.assert_nothing_left()

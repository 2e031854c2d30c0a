"""What the agent's process is made of: small, and without torch."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading

from runtime.agent import _Agent

LOADED = """
import json, sys
import runtime.agent
rollup = dict(line.split()[:2] for line in open("/proc/self/smaps_rollup") if "kB" in line)
private = int(rollup["Private_Clean:"]) + int(rollup["Private_Dirty:"])
print(json.dumps({"modules": sorted(sys.modules), "private_kib": private}))
"""


def test_the_agent_imports_neither_torch_nor_boto3_nor_numpy_and_stays_small() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, timeout=50
    )
    found = json.loads(done.stdout)
    heavy = {"torch", "boto3", "botocore", "numpy", "runtime.worker"} & set(found["modules"])
    assert not heavy
    assert found["private_kib"] < 45 * 1024


async def test_what_other_threads_log_goes_to_the_launcher_from_the_loop() -> None:
    sent: list[tuple[int, str]] = []

    class Sent:
        def send_message(self, kind: object, event: dict[str, str]) -> None:
            sent.append((threading.get_ident(), event["text"]))

    agent = _Agent()
    agent._loop = asyncio.get_running_loop()
    agent._channel = Sent()  # type: ignore[assignment]
    await asyncio.to_thread(agent._log, "disk full\n")
    agent._log("here\n")
    assert sent == [(threading.get_ident(), text) for text in ("disk full\n", "here\n")]


def test_the_launcher_imports_neither_torch_nor_zmq_for_a_plan() -> None:
    code = (
        "import json, sys; sys.argv = ['launch', '--dry-run', 'x.py'];"
        "import runtime.launch; runtime.launch.main(['--dry-run', '--no-python', 'true']);"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50
    )
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert not {"torch", "zmq", "numpy", "boto3"} & modules

"""What the agent's process is made of: small, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys

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

"""Starting a worker process as the agent does by exec, without an agent: what tests of `main` need."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from runtime.job import ActorInfo, Entry, JobSpec, RoleSpec
from runtime.launcher import child
from runtime.launcher.plan import WorkerSpec

TIMEOUT_S = 30


def worker_spec(
    folder: Path,
    entry: Entry,
    *,
    config: Any = None,
    kind: Literal["elastic", "simple"] = "simple",
    **changes: Any,
) -> WorkerSpec:
    """A spec for the only worker of a job; `changes` are fields of `WorkerSpec`."""
    role = RoleSpec("trainer", kind, entry)
    me = ActorInfo("trainer-0", "trainer", 0, host="here", spec=role)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RUNTIME_")}
    spec = WorkerSpec(
        job_id="j1",
        job=JobSpec("demo", {"trainer": role}, config=config or {}),
        info=me,
        entry=entry,
        env=env,
        actors=(me,),
        peer="trainer-0.0000aaaa",
        address=f"ipc://{folder}/t0",
        agent_peer="agent-0.0000bbbb",
        agent_address=f"ipc://{folder}/agent",
        agent_pid=os.getpid(),
        incarnation=0,
        workdir=str(folder),
        error_file=str(folder / "logs" / "error.json"),
        shutdown_timeout_s=1.0,
        start_timeout_s=20.0,
    )
    return replace(spec, **changes)


@dataclass
class Ended:
    """How a worker ended."""

    code: int
    stdout: str
    stderr: str
    error: dict[str, Any] | None


@dataclass
class WorkerProcess:
    """A running worker. Leaving the block kills it if it still runs."""

    spec: WorkerSpec
    env: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> WorkerProcess:
        order = child.Order(
            "runtime.worker:main",
            pickle.dumps(self.spec),
            {**self.spec.env, **self.env},
            self.spec.workdir,
            os.getpid(),
        )
        fd = child.pack_order(order)
        try:
            self.process = subprocess.Popen(
                child.command(sys.executable, fd),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[fd],
                start_new_session=True,
            )
        finally:
            os.close(fd)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for(self, line: str) -> None:
        """Read stdout until that line."""
        assert self.process.stdout is not None
        seen = []
        for found in self.process.stdout:
            seen.append(found.decode())
            if seen[-1].rstrip("\n") == line:
                return
        assert self.process.stderr is not None
        raise AssertionError(f"no line {line!r} in {seen}; {self.process.stderr.read().decode()}")

    def terminate(self) -> None:
        self.process.terminate()

    def end(self) -> Ended:
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        path = Path(self.spec.error_file)
        error = json.loads(path.read_text()) if path.exists() else None
        return Ended(self.process.returncode, out.decode(), err.decode(), error)


def write(folder: Path, name: str, text: str) -> Path:
    """A source file below `folder`, dedented."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip("\n"))
    return path


def run_script(folder: Path, text: str, *args: str, **changes: Any) -> Ended:
    """Run `text` as a script worker to its end."""
    path = write(folder, "train.py", text)
    with WorkerProcess(worker_spec(folder, Entry("script", str(path), args), **changes)) as worker:
        return worker.end()

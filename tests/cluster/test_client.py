"""One picture of a job, made of what its control plane and its agents say."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.cluster.client import job_status
from runtime.errors import Timeout
from runtime.launcher.records import JobEndpoint, JobHost, JobStatus

HOSTS = (JobHost("h1", "/logs/j"), JobHost("h2", "/logs/j"))
JOB = JobEndpoint("j", "train", 100.0, HOSTS, "@agent-0.a", "ipc:///x/agent")


def member(name: str, state: str = "starting", **more: Any) -> dict[str, Any]:
    role, _, rank = name.partition("-")
    host = "h1" if rank == "0" else "h2"
    facts = {"name": name, "role": role, "rank": int(rank), "host": host, "state": state}
    return {**facts, "incarnation": 0, "code": None, "step": None, "cause": "", **more}


def seen(*members: dict[str, Any], stage: str = "running", **more: Any) -> JobStatus:
    processes: dict[str, list[str]] = more.pop("processes", {"h1": ["t-0"], "h2": ["t-1"]})
    answers = {
        host: {"pid": 5, "workers": [{"name": n, "pid": 7, "incarnation": 0} for n in names]}
        for host, names in processes.items()
    }
    supervision = {"stage": stage, "since_s": 10.0, "code": None, "reason": "", "roles": []}
    agents = [{"host": "", "quiet_s": 0.1}, {"host": "h2", "quiet_s": 2.0}]
    job = {"supervision": {**supervision, **more}, "members": list(members), "agents": agents}
    return job_status(JOB, job, {"h2": Timeout("does not answer"), **answers}, 200.0)


def test_a_worker_with_a_process_runs_whether_or_not_it_knows_of_us() -> None:
    status = seen(member("t-0"), member("t-1", "running", step=4))
    assert (status.stage, status.since, status.exit_code) == ("running", 190.0, None)
    assert [(w.state, w.pid, w.step) for w in status.roles["t"]] == [
        ("running", 7, None), ("running", 7, 4),
    ]  # fmt: skip
    assert [w.last_heartbeat_s for w in status.roles["t"]] == [0.1, 2.0]


def test_a_job_starts_until_all_its_workers_have_a_process() -> None:
    status = seen(member("t-0"), member("t-1", "expected"), processes={"h1": ["t-0"], "h2": []})
    assert status.stage == "starting"
    assert [w.state for w in status.roles["t"]] == ["running", "starting"]


def test_a_restart_is_not_the_start_of_the_job() -> None:
    again = member("t-1", "starting", incarnation=1)
    status = seen(member("t-0"), again, roles=[{"attempt": 1, "actors": [{"restarts": 2}]}])
    assert (status.stage, status.restarts) == ("running", 3)
    assert (status.roles["t"][1].state, status.roles["t"][1].restart_count) == ("starting", 1)


def test_a_host_that_does_not_answer_is_named_and_holds_nothing_up() -> None:
    status = seen(member("t-0"), member("t-1"), processes={"h1": ["t-0"]})
    assert status.stage == "running"
    assert [(h.host, h.pid, h.problem) for h in status.hosts] == [
        ("h1", 5, ""), ("h2", None, "does not answer"),
    ]  # fmt: skip


def test_how_a_worker_ended_is_told() -> None:
    ended = member("t-1", "failed", code=137, cause="SIGKILL")
    lost = member("t-0", "failed", code=-1, cause="host unreachable")
    first, second = seen(lost, ended, processes={"h1": [], "h2": []}).roles["t"]
    assert (first.state, first.exit_code, first.cause) == ("failed", None, "host unreachable")
    assert (second.exit_code, second.cause, second.pid) == (137, "SIGKILL", None)


@pytest.mark.parametrize(
    ("stage", "code", "shown"),
    [
        ("new", None, "starting"),
        ("stopping", 143, "stopping"),
        ("finishing", 0, "stopping"),
        ("ended", 0, "finished"),
        ("ended", 3, "failed"),
        ("ended", None, "failed"),
    ],
)
def test_the_stage_is_one_of_the_five(stage: str, code: int | None, shown: str) -> None:
    assert seen(member("t-0"), member("t-1"), stage=stage, code=code).stage == shown

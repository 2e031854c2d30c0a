"""The files that jobs are found by: who may have written them, which job is meant, how it ended."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import ConfigError, MisuseError
from runtime.launcher import jobs
from runtime.launcher.outcome import keep
from runtime.launcher.records import Ended, JobEndpoint, JobHost, Way
from runtime.launcher.report import Outcome

KEYS = (b"\x01" * 32, b"\x02" * 32, frozenset((b"\x01" * 32,)))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".runtime" / "jobs"


def endpoint(job_id: str = "j1", **more: object) -> JobEndpoint:
    values: dict[str, object] = {
        "name": "train",
        "started": 100.0,
        "hosts": (JobHost("h1", "/nowhere/logs"), JobHost("h2", "~/logs", local=False)),
        "peer": "@agent-0.ab",
    }
    values |= {"address": "ipc:///nowhere/agent"}
    return JobEndpoint(job_id, **{**values, **more})  # type: ignore[arg-type]


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[str]:
    """The address of somebody who listens, as an agent does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "agent"))
        server.listen(100)
        yield f"ipc://{tmp_path}/agent"


def test_a_registered_job_is_read_back_as_it_was(home: Path) -> None:
    way = Way("/py", ("ssh", "--", "h2"))
    host = JobHost("h2", "~/logs", (7, 99), (("t", 0), ("t", 1)), way, local=False)
    written = endpoint(
        security=KEYS, detached=True, shutdown_timeout_s=3.0, machine="m", hosts=(host,)
    )
    jobs.register(written)
    assert jobs.read("j1") == written
    assert (home / "j1").stat().st_mode & 0o777 == 0o700
    assert (home / "j1" / "endpoint.json").stat().st_mode & 0o777 == 0o600


def test_the_keys_of_a_job_are_not_in_its_text() -> None:
    assert "02" not in repr(endpoint(security=KEYS))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_file_that_others_can_read_or_write_is_refused(home: Path, mode: int) -> None:
    jobs.register(endpoint())
    os.chmod(home / "j1" / "endpoint.json", mode)
    with pytest.raises(ConfigError, match=f"mode is {mode:04o}"):
        jobs.read("j1")
    assert jobs.known()[0] == []
    with pytest.raises(MisuseError, match="not believed"):
        jobs.find(None)


def test_a_folder_that_others_can_look_into_is_refused(home: Path) -> None:
    jobs.register(endpoint())
    os.chmod(home / "j1", 0o755)
    with pytest.raises(ConfigError, match="mode is 0755"):
        jobs.find("j1")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["", "endpoint.json"])
def test_what_belongs_to_another_user_is_refused(home: Path, what: str) -> None:
    jobs.register(endpoint())
    os.chown(home / "j1" / what, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        jobs.read("j1")


def test_a_link_is_not_followed(home: Path, tmp_path: Path) -> None:
    for name in ("j1", "j2"):
        jobs.register(endpoint(name))
        (home / name).rename(tmp_path / name)
    (home / "j1").symlink_to(tmp_path / "j1")
    (home / "j2").mkdir(mode=0o700)
    (home / "j2" / "endpoint.json").symlink_to(tmp_path / "j2" / "endpoint.json")
    with pytest.raises(ConfigError, match="j1 is not believed: it is no regular file or folder"):
        jobs.read("j1")
    with pytest.raises(ConfigError, match="Too many levels of symbolic links"):
        jobs.read("j2")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(home: Path) -> None:
    jobs.register(endpoint())
    (home / "j1" / "endpoint.json").unlink()
    os.mkfifo(home / "j1" / "endpoint.json", 0o600)
    with pytest.raises(ConfigError, match="it is no regular file"):
        jobs.read("j1")


def test_what_an_agent_says_before_it_has_a_log_is_for_this_user_only(
    home: Path, tmp_path: Path
) -> None:
    os.close(jobs.open_log("j1"))
    assert (home / "j1" / "agent.log").stat().st_mode & 0o777 == 0o600
    assert (home / "j1").stat().st_mode & 0o777 == 0o700
    (home / "j1" / "agent.log").unlink()
    (home / "j1" / "agent.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot write in"):
        jobs.open_log("j1")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_was_put_into_the_folder_of_another_job_is_not_taken(home: Path) -> None:
    jobs.register(endpoint())
    (home / "j1").rename(home / "j2")
    with pytest.raises(ConfigError, match="it is of job 'j1'"):
        jobs.read("j2")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"security": 3}', "{'a'", None])
def test_a_file_that_is_no_endpoint_says_so(home: Path, text: str | None) -> None:
    jobs.register(endpoint())
    if text is None:
        text = (home / "j1" / "endpoint.json").read_text().replace("100.0", '"yesterday"')
    (home / "j1" / "endpoint.json").write_text(text)
    with pytest.raises(ConfigError, match="is no endpoint file"):
        jobs.read("j1")


def test_a_job_is_found_by_id_by_prefix_by_name_and_as_the_newest(listening: str) -> None:
    jobs.register(endpoint("a-1", name="one", started=1.0))
    jobs.register(endpoint("a-2", name="two", started=2.0, address=listening))
    jobs.register(endpoint("b-3", name="one", started=3.0))
    assert jobs.find("a-1").job_id == "a-1"
    assert jobs.find("b").job_id == "b-3"
    assert jobs.find("one").job_id == "b-3"
    assert jobs.find("two").job_id == "a-2"
    assert jobs.find(None).job_id == "a-2", "the newest that runs"
    with pytest.raises(MisuseError, match=r"means several jobs(.|\n)*a-2  two\n  a-1  one"):
        jobs.find("a-")
    with pytest.raises(MisuseError, match="no job 'c'"):
        jobs.find("c")


def test_a_job_that_has_ended_does_not_run_whoever_listens_there_now(listening: str) -> None:
    for job_id in ("a", "b"):
        jobs.register(endpoint(job_id, address=listening))
    jobs.remember(endpoint("a"), Outcome("finished"))
    assert jobs.find("train").job_id == "b"


def test_a_name_of_two_running_jobs_is_ambiguous(listening: str) -> None:
    for job_id in ("a", "b"):
        jobs.register(endpoint(job_id, address=listening))
    with pytest.raises(MisuseError, match="several jobs"):
        jobs.find("train")


def test_without_any_job_it_says_so() -> None:
    with pytest.raises(MisuseError, match="no job was launched"):
        jobs.find(None)


def test_who_listens_answers(listening: str) -> None:
    assert jobs.answers(endpoint(address=listening))
    assert jobs.answers(endpoint(address=f"ipc:///nowhere/x {listening}"))
    assert not jobs.answers(endpoint())
    assert not jobs.answers(endpoint(address=listening, machine="another"))


def test_a_port_that_listens_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        address = f"ipc:///nowhere/x tcp://127.0.0.1:{port}?key={'ab' * 32}"
        assert jobs.answers(endpoint(address=address))
    assert not jobs.answers(endpoint(address=address))


def test_how_a_job_ended_is_found_in_its_logs_or_beside_its_endpoint(
    home: Path, tmp_path: Path
) -> None:
    job = endpoint(hosts=(JobHost("h1", str(tmp_path)),))
    jobs.register(job)
    assert jobs.outcome(job) is None
    keep(Outcome("host_lost", "j1", log_dir=str(home / "j1")), job.peer)
    ended = jobs.outcome(job)
    assert ended is not None
    assert (ended.code, ended.stage) == (69, "failed")
    keep(Outcome("finished", "j1", log_dir=str(tmp_path)), job.peer)
    ended = jobs.outcome(job)
    assert ended is not None
    assert (ended.code, ended.stage) == (0, "finished")
    again = job._replace(peer="@agent-0.cd")
    jobs.register(again)
    assert jobs.outcome(again) is None, "that was an earlier job of the id"


def test_what_a_host_told_of_the_end_is_remembered_with_its_time(home: Path) -> None:
    job = endpoint()
    jobs.register(job)
    jobs.remember(job, Outcome("host_lost", "j1", log_dir="/there"), 1234.5)
    jobs.remember(job, Outcome("finished"), 2345.0)
    assert jobs.outcome(job) == Ended(Outcome("host_lost", "j1", log_dir="/there"), 1234.5)


def test_jobs_that_do_not_answer_are_waited_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(job: JobEndpoint) -> bool:
        time.sleep(0.2)
        return job.job_id == "j3"

    monkeypatch.setattr(jobs, "answers", answers)
    known = [endpoint(f"j{number}") for number in range(10)]
    started = time.monotonic()
    assert [job.job_id for job in jobs.running(known)] == ["j3"]
    assert time.monotonic() - started < 1.0


def test_old_jobs_are_forgotten_unless_they_run(home: Path, listening: str) -> None:
    old = 15 * 86400.0
    jobs.register(endpoint("old", started=0.0))
    jobs.register(endpoint("runs", started=0.0, address=listening))
    jobs.register(endpoint("new", started=old - 10.0))
    jobs.clean(old)
    assert sorted(os.listdir(home)) == ["new", "runs"]


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".runtime").write_text("a file")
    with pytest.raises(ConfigError, match=r"endpoint\.json"):
        jobs.register(endpoint())


def test_the_file_is_json_that_others_can_learn_from(home: Path) -> None:
    jobs.register(endpoint(security=KEYS))
    record = json.loads((home / "j1" / "endpoint.json").read_text())
    assert record["security"] == ["01" * 32, "02" * 32]
    assert [host["name"] for host in record["hosts"]] == ["h1", "h2"]

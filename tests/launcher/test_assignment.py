"""The job's private folder: short, ours alone, gone at the end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.launcher.assignment import choose_job_dir, make_job_dir, remove_job_dir

FALLBACK = f"/tmp/runtime-{os.getuid()}/abcd1234"


def test_the_users_runtime_directory_is_used_where_it_can_be(tmp_path: Path) -> None:
    base = f"/tmp/rt-{os.getpid()}"
    os.mkdir(base)
    try:
        assert choose_job_dir("abcd1234", {"XDG_RUNTIME_DIR": base}) == f"{base}/runtime-abcd1234"
    finally:
        os.rmdir(base)


@pytest.mark.parametrize("base", ["", "relative", "/no/such/folder", "/tmp/" + "long" * 30])
def test_else_a_short_one_of_our_own(base: str) -> None:
    assert choose_job_dir("abcd1234", {"XDG_RUNTIME_DIR": base}) == FALLBACK


def test_a_folder_is_private_and_removed_with_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "runtime-1"
    make_job_dir(str(path))
    assert path.stat().st_mode & 0o777 == 0o700
    (path / "socket").write_text("")
    remove_job_dir(str(path))
    assert not path.exists()
    assert tmp_path.exists()
    remove_job_dir(str(path))


def test_a_shared_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    above = tmp_path / f"runtime-{os.getuid()}"
    above.mkdir(mode=0o755)
    above.chmod(0o755)
    with pytest.raises(ConfigError, match=r"not a private folder.*755"):
        make_job_dir(str(above / "job"))


def test_the_folder_above_goes_with_the_last_job(tmp_path: Path) -> None:
    above = tmp_path / f"runtime-{os.getuid()}"
    make_job_dir(str(above / "one"))
    make_job_dir(str(above / "two"))
    remove_job_dir(str(above / "one"))
    assert (above / "two").exists()
    remove_job_dir(str(above / "two"))
    assert not above.exists()


def test_what_dead_jobs_left_long_ago_is_removed_and_nothing_else(tmp_path: Path) -> None:
    above = tmp_path / f"runtime-{os.getuid()}"
    for name in ("dead", "alive", "young"):
        make_job_dir(str(above / name))
    (above / "dead" / "other").write_text("")
    with socket.socket(socket.AF_UNIX) as gone, socket.socket(socket.AF_UNIX) as listening:
        gone.bind(str(above / "dead" / "agent"))
        listening.bind(str(above / "alive" / "agent"))
        listening.listen()
        for name in ("dead", "alive"):
            os.utime(above / name, (1.0, 1.0))
        make_job_dir(str(above / "new"))
    assert sorted(os.listdir(above)) == ["alive", "new", "young"]


def test_a_folder_that_is_there_already_is_an_error_naming_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        make_job_dir(str(tmp_path))

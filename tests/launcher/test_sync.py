"""What is to be copied to a host, and by which command."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.launcher.plan import Host
from runtime.launcher.ssh import DialSettings
from runtime.launcher.sync import changed_files, rsync_argv, stamps


def test_files_of_another_size_or_time_and_those_that_lack_are_changed() -> None:
    here = {"same": [1, 10], "longer": [2, 10], "newer": [1, 11], "new": [1, 10]}
    there = {"same": [1, 10], "longer": [1, 10], "newer": [1, 10], "only there": [5, 5]}
    assert changed_files(here, there) == ["longer", "new", "newer"]


def test_stamps_are_of_files_and_links_below_a_folder_which_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    assert stamps(str(folder)) == {}
    (folder / "sub").mkdir()
    (folder / "sub" / "a.py").write_text("123")
    os.utime(folder / "sub" / "a.py", (100, 100.9))
    (folder / "link").symlink_to("sub")
    os.mkfifo(folder / "pipe")
    found = stamps(str(folder))
    assert found["sub/a.py"] == [3, 100]
    assert set(found) == {"sub/a.py", "link"}


def test_rsync_goes_through_the_same_ssh_and_makes_the_folder() -> None:
    settings = DialSettings("python", "/", ssh_args=("-J", "my gate"))
    argv = rsync_argv(Host("h1", user="me", port=2222), "/a b", settings)
    shell = argv[argv.index("-e") + 1]
    assert shell.startswith("ssh -T -o BatchMode=yes")
    assert "-J 'my gate'" in shell
    assert shell.endswith("-p 2222 -l me")
    assert argv[argv.index("--rsync-path") + 1] == "mkdir -p '/a b' && rsync"
    assert argv[-3:] == ["--", "/a b/", "h1:/a b/"]
    assert rsync_argv(Host("fe80::1%ib0"), "/a", settings)[-1] == "[fe80::1%ib0]:/a/"

"""What `--sync` says of an ssh that works, to a host whose login shell does not. (With real hosts: test_sync.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.launcher.link import HostsFailed
from runtime.launcher.plan import Host
from runtime.launcher.ssh import DialSettings
from runtime.launcher.sync import copy_to


@pytest.mark.parametrize("printed", ["", "echo '{} bye'"])
def test_an_answer_that_is_no_list_of_files_is_a_failure_of_the_host(
    printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\n{printed}\n")
    ssh.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))  # no rsync either
    with pytest.raises(HostsFailed, match=r"host h1: cannot copy .* its login shell"):
        copy_to([Host("h1", local=False)], str(tmp_path), DialSettings("python", "/"))

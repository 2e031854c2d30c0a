"""Copying a directory to hosts as a program, to be run on a test host: `sync_program.py DIR HOST…`."""

from __future__ import annotations

import sys

from runtime.launcher.link import HostsFailed
from runtime.launcher.plan import Host
from runtime.launcher.ssh import DialSettings
from runtime.launcher.sync import copy_to

if __name__ == "__main__":
    hosts = [Host(name, local=False) for name in sys.argv[2:]]
    try:
        copy_to(hosts, sys.argv[1], DialSettings(sys.executable, "/", timeout_s=5))
    except HostsFailed as error:
        print(error)
        sys.exit(error.code)

"""Both examples over three hosts, one of them behind a slow line that loses packets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.support.hosts import Hosts
from tests.integration.support.job import ROOT


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sft", ("step 40/40", "held-out loss", "weights ")),
        pytest.param("grpo", ("step 60/60", "61,440 samples used"), marks=pytest.mark.long),
    ],
)
def test_an_example_runs_over_hosts_as_on_one(
    hosts: Hosts, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    hosts.delay("host2", "20ms", "loss", "1%")
    run = ROOT / "examples" / name / "run.py"
    where = ("--hosts", "host1:2,host2:1,host3:1", "--log-dir", tmp_path / "logs")
    options = ("--fast", "--out", tmp_path / "out", *where)
    done = hosts.python(
        "host1", run, *options, cwd=tmp_path, env={"HOME": str(tmp_path)}, timeout=200
    )
    assert all(word in done.stdout for word in words), done.stdout
    assert "runtime" not in done.stderr, done.stderr  # torch has something to say
    assert len(list((tmp_path / "out").glob("curve.*"))) == 2
    hosts.assert_empty()

"""Which settings file is read, and what is said when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.config import Config, read_config
from runtime.errors import ConfigError


def write(path: Path, keep: int) -> str:
    path.write_text(f"[checkpoint]\nkeep_last_n = {keep}\n")
    return str(path)


def test_the_argument_goes_before_the_variable_and_that_before_the_folders_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_config(env={}) == Config()
    write(tmp_path / "runtime.toml", 1)
    env = {"RUNTIME_CONFIG": write(tmp_path / "two.toml", 2)}
    three = write(tmp_path / "three.toml", 3)
    assert read_config(env={}).checkpoint.keep_last_n == 1
    assert read_config(env={}).source == "runtime.toml"
    assert read_config(env=env).checkpoint.keep_last_n == 2
    assert read_config(three, env).checkpoint.keep_last_n == 3


def test_a_config_can_be_read_from_a_path_over_the_process_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_CHECKPOINT_INTERVAL_STEPS", "8")
    write(tmp_path / "f.toml", 4)
    found = Config.from_file(tmp_path / "f.toml")
    assert (found.checkpoint.keep_last_n, found.checkpoint.interval_steps) == (4, 8)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config file .*gone.toml: No such file or directory"):
        read_config(str(tmp_path / "gone.toml"), {})
    with pytest.raises(ConfigError, match="No such file or directory"):
        read_config(env={"RUNTIME_CONFIG": str(tmp_path / "gone.toml")})
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bad.toml: not UTF-8 text"):
        read_config(str(tmp_path / "bad.toml"), {})

"""Settings: precedence, what is allowed, and the notation of RUNTIME_LOG."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.config import (
    Checkpoint,
    Config,
    Coordinator,
    LogSpec,
    load_config,
    own_rank,
    parse_log_spec,
)
from runtime.errors import ConfigError


def problems(text: str, **env: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(text, "runtime.toml", env)
    return str(raised.value).split("\n")


def test_nothing_said_gives_the_defaults() -> None:
    assert load_config("", "", {}) == Config()
    assert Config().coordinator == Coordinator(1000, 30_000)
    assert Config().checkpoint == Checkpoint(1000, 5, "none")
    assert Config().log == LogSpec(30)


def test_environment_beats_file_beats_default() -> None:
    text = "[coordinator]\nheartbeat_interval_ms = 500\n[checkpoint]\nkeep_last_n = 2\ninterval_steps = 10"
    env = {"RUNTIME_CHECKPOINT_KEEP_LAST_N": " 7 ", "RUNTIME_CHECKPOINT_COMPRESSION": "zstd"}
    found = load_config(text, "f.toml", env)
    assert found.coordinator == Coordinator(500, 30_000)
    assert found.checkpoint == Checkpoint(10, 7, "zstd")
    assert found.source == "f.toml"


def test_an_empty_variable_says_nothing() -> None:
    assert load_config("", "", {"RUNTIME_CHECKPOINT_KEEP_LAST_N": " "}) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cordinator]\nx = 1", "runtime.toml: cordinator: unknown section (did you mean coordinator?); allowed are [coordinator], [checkpoint]"),
        ("checkpoint = 1", "runtime.toml: checkpoint: must be a section, [checkpoint]"),
        ("[checkpoint]\nkeep_last = 1", "runtime.toml: [checkpoint] keep_last: unknown key (did you mean keep_last_n?); allowed are interval_steps, keep_last_n, compression"),
        ("[checkpoint]\nkeep_last_n = 0", "runtime.toml: [checkpoint] keep_last_n = 0: must be a whole number of at least 1"),
        ("[checkpoint]\nkeep_last_n = true", "runtime.toml: [checkpoint] keep_last_n = True: must be a whole number of at least 1"),
        ("[checkpoint]\nkeep_last_n = '5'", "runtime.toml: [checkpoint] keep_last_n = '5': must be a whole number of at least 1"),
        ("[checkpoint]\ncompression = 'xz'", "runtime.toml: [checkpoint] compression = 'xz': must be one of none, gzip, zstd, lz4"),
        ("[checkpoint]\ncompression = 1", "runtime.toml: [checkpoint] compression = 1: must be one of none, gzip, zstd, lz4"),
        (
            "[coordinator]\nheartbeat_timeout_ms = 1500",
            "runtime.toml: [coordinator] heartbeat_timeout_ms = 1500: must be at least twice heartbeat_interval_ms (1000), else one late heartbeat is a death",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_with_what_is_allowed(text: str, message: str) -> None:
    assert problems(text) == [message]


def test_all_mistakes_come_together_those_of_the_environment_by_variable() -> None:
    found = problems(
        "[checkpoint]\nkeep = 1\n[x]",
        RUNTIME_COORDINATOR_HEARTBEAT_INTERVAL_MS="soon",
        RUNTIME_LOG="loud",
    )
    assert [line.split(":")[0] for line in found] == [
        "runtime.toml",
        "runtime.toml",
        "RUNTIME_COORDINATOR_HEARTBEAT_INTERVAL_MS = 'soon'",
        "RUNTIME_LOG='loud'",
    ]


def test_a_file_that_is_not_toml_is_refused_with_the_line() -> None:
    (line,) = problems("[checkpoint\n")
    assert line.startswith("runtime.toml: this is not TOML: ")
    assert "line 1" in line


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("", LogSpec(30)),
        ("info", LogSpec(20)),
        ("DEBUG", LogSpec(10)),
        ("info,runtime.control=debug", LogSpec(20, (("runtime.control", 10),))),
        (
            "control=debug, wire = error",
            LogSpec(30, (("runtime.control", 10), ("runtime.wire", 40))),
        ),
        ("runtime=warn", LogSpec(30, (("runtime", 30),))),
    ],
)
def test_levels_are_read_for_all_and_by_module(text: str, spec: LogSpec) -> None:
    assert parse_log_spec(text) == spec
    assert load_config("", "", {"RUNTIME_LOG": text}).log == spec


@pytest.mark.parametrize("text", ["loud", "=debug", "runtime.control=", "a=b=c", "info debug"])
def test_a_level_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_log_spec(text)
    assert str(raised.value) == (
        f"RUNTIME_LOG={text!r}: {text!r} is not LEVEL or MODULE=LEVEL; "
        "levels are debug, info, warning, error, critical"
    )


@given(st.text(), st.text())
def test_any_text_is_read_or_refused(text: str, log: str) -> None:
    try:
        found = load_config(text, "f", {"RUNTIME_LOG": log})
    except ConfigError:
        return
    assert found.checkpoint.keep_last_n >= 1


@pytest.mark.parametrize(("log", "steps", "level"), [("", 1, 20), ("", 5, 10), ("info", -1, 30), ("", -9, 50)])  # fmt: skip
def test_verbosity_moves_the_general_level_within_bounds(log: str, steps: int, level: int) -> None:
    config = load_config("", "", {"RUNTIME_LOG": f"{log},wire=error"}).louder(steps)
    assert config.log == LogSpec(level, (("runtime.wire", 40),))


@pytest.mark.parametrize(
    ("env", "rank"),
    [({}, 0), ({"SLURM_PROCID": "2"}, 2), ({"OMPI_COMM_WORLD_RANK": "3", "SLURM_PROCID": "0"}, 3)],
)
def test_the_own_rank_is_what_the_launcher_says(
    env: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert own_rank() == rank
    monkeypatch.setenv("RANK", "5")
    assert own_rank() == 5
    monkeypatch.setenv("RANK", "five")
    with pytest.raises(ConfigError, match="RANK='five'"):
        own_rank()

"""Our log records: one line, right level, and nobody else's logging touched."""

from __future__ import annotations

import io
import logging
import re

import pytest

from runtime.config import LogSpec, parse_log_spec
from runtime.observe.logs import configure_logging


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def configured(text: str) -> io.StringIO:
    stream = io.StringIO()
    configure_logging(parse_log_spec(text), stream)
    return stream


def test_a_record_is_one_line_with_time_level_and_logger() -> None:
    stream = configured("info")
    logging.getLogger("runtime.control.client").info("joined as %s", "a-0")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} info runtime\.control\.client: joined as a-0\n", stream.getvalue()
    )


def test_a_message_of_several_lines_stays_one() -> None:
    stream = configured("info")
    logging.getLogger("runtime.wire").warning("a\nb\r\nc")
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().endswith(r"warning runtime.wire: a\nb\nc" + "\n")


def test_a_traceback_follows_its_record() -> None:
    stream = configured("info")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("runtime.wire").exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("error runtime.wire: failed")
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: boom"


def test_levels_hold_for_all_and_by_module() -> None:
    stream = configured("warning,control=debug")
    logging.getLogger("runtime.wire").info("hidden")
    logging.getLogger("runtime.control.client").debug("shown")
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["shown"]


def test_configuring_again_replaces_stream_and_levels() -> None:
    first = configured("debug,control=debug")
    second = configured("error")
    logging.getLogger("runtime.control.client").debug("hidden")
    logging.getLogger("runtime.wire").error("shown")
    assert first.getvalue() == ""
    assert second.getvalue().endswith("shown\n")
    assert second.getvalue().count("\n") == 1


def test_the_users_logging_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    mine = logging.NullHandler()
    logging.getLogger("runtime").addHandler(mine)
    before = (list(logging.getLogger().handlers), logging.getLogger().level)
    stream = configured("debug")
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
    assert mine in logging.getLogger("runtime").handlers
    logging.getLogger("theirs").error("x")
    assert stream.getvalue() == ""
    assert [record.name for record in caplog.records] == ["theirs"]


@pytest.mark.parametrize(("stream", "coloured"), [(Terminal(), True), (io.StringIO(), False)])
def test_colours_are_for_terminals(stream: io.StringIO, coloured: bool) -> None:
    configure_logging(LogSpec(20), stream)
    logging.getLogger("runtime.wire").warning("x")
    logging.getLogger("runtime.wire").info("y")
    warning, info = stream.getvalue().splitlines()
    assert ("\x1b[33mwarning\x1b[0m" in warning) is coloured
    assert "\x1b" not in info


def test_a_function_may_take_the_lines() -> None:
    lines: list[str] = []
    configure_logging(LogSpec(), lines.append)
    logging.getLogger("runtime.wire").warning("late")
    assert [line.partition(" ")[2] for line in lines] == ["warning runtime.wire: late\n"]


def test_a_stream_that_fails_does_not_end_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(line: str) -> None:
        raise ValueError("no more lines")

    configure_logging(LogSpec(), broken)
    logging.getLogger("runtime.wire").warning("late")
    assert "no more lines" in capsys.readouterr().err

"""Where our own log records go: one line each to one place, with time, level and logger.

Only loggers below "runtime" are touched; the user's own logging stays as it is. Colours only on a
terminal. Which levels are written is a `config.LogSpec`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TextIO

from runtime.config import LogSpec

_COLOURS = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


class LineFormatter(logging.Formatter):
    """ "12:03:44.120 warning runtime.control.client: text"; a traceback follows on lines of its own."""

    def __init__(self, *, colours: bool = False) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        time = f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03d}"
        level = record.levelname.lower()
        colour = _COLOURS.get(record.levelname) if self._colours else None
        if colour is not None:
            level = f"\x1b[{colour}m{level}\x1b[0m"
        message = "\\n".join(record.getMessage().splitlines())
        line = f"{time} {level} {record.name}: {message}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _OurHandler(logging.Handler):
    """Told apart from handlers that the user installed, so that configuring twice leaves one."""

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - as in logging's own handlers: no record may end a program
            self.handleError(record)


def configure_logging(spec: LogSpec, target: TextIO | Callable[[str], object]) -> None:
    """Write the package's log records to a stream, or give them to a function, line by line.

    Calling it again replaces what it did before.
    """
    ours = logging.getLogger("runtime")
    for handler in [h for h in ours.handlers if isinstance(h, _OurHandler)]:
        ours.removeHandler(handler)
    handler = _OurHandler(target if callable(target) else partial(_write, target))
    handler.setFormatter(LineFormatter(colours=not callable(target) and target.isatty()))
    ours.addHandler(handler)
    ours.propagate = False
    # A level of an earlier call must not outlive it.
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith("runtime.") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.NOTSET)
    ours.setLevel(spec.level)
    for name, level in spec.modules:
        logging.getLogger(name).setLevel(level)


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()

"""The command `batchgen` in this process, without the second that a new one and its workers take to start."""

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from batchgen.jobs import cli
from batchgen.options import flags_in_use, use_flags


@dataclass(frozen=True, slots=True)
class Done:
    """What a process would leave: its exit code and what it printed."""

    returncode: int
    stdout: bytes
    stderr: bytes


def batchgen(
    *arguments: object,
    folder: Path = Path(),
    stdin: str | Path = os.devnull,
    environment: Mapping[str, str] | None = None,
    together: bool = False,
) -> Done:
    """Run a command line in a folder, with a file as its standard input; with `together`, stdout has all (2>&1)."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    streams = {"stdout": out, "stderr": out if together else err}
    argv = ["batchgen", *map(str, arguments)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored())
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mock.patch.dict(os.environ, environment or os.environ.copy(), clear=True))
        given = stack.enter_context(open(stdin, encoding="utf-8"))
        stack.enter_context(mock.patch.multiple(sys, argv=argv, stdin=given, **streams))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.buffer.getvalue(), err.buffer.getvalue())


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """What a command sets for its process is as before: signals, the names of options in errors, and logging."""
    root = logging.getLogger()
    loggers = [root, logging.getLogger("batchgen"), logging.getLogger("jobs")]
    levels, handlers, flags = [logger.level for logger in loggers], root.handlers, flags_in_use()
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
        use_flags(flags)

"""On the path of a run whose opens are counted: writes a line for each time that the main process opens a file.

The main process is the child of AUDIT_PARENT; workers have this module on their path too.
"""

import os
import sys

if os.environ.get("AUDIT_PARENT") == str(os.getppid()):
    _log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND)
    _path = os.environ["AUDIT_PATH"]

    def _count_open(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return  # a file that is opened by its number was counted before
        if os.path.abspath(os.fsdecode(arguments[0])) == _path:
            os.write(_log, b"open\n")

    sys.addaudithook(_count_open)

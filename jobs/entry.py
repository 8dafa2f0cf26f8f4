"""The entry point: Ctrl-C during the half second of imports ends the command without a traceback."""

import os
import signal
import sys
import traceback


def main() -> None:
    """Import and run the command line, which then handles signals itself; an ignored Ctrl-C (nohup) stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from batchgen.jobs.cli import main as command_line
    except Exception as error:
        shadow = _file_here(error)
        if shadow is None:
            raise
        remedy = "rename it, or start in another folder"
        sys.exit(f"batchgen: {shadow} is imported instead of the library of its name ({error}); {remedy}")

    command_line()


def _file_here(error: Exception) -> str | None:
    """A module of the current folder that was imported, if one was; PYTHONPATH may name that folder."""
    failed = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    loaded = [getattr(module, "__file__", None) for name, module in sys.modules.items() if "batchgen" not in name]
    files = [file for file in (*failed, *loaded) if file and "batchgen" not in file]
    return next((file for file in files if os.path.dirname(os.path.abspath(file)) == os.getcwd()), None)

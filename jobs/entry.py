"""The entry point: Ctrl-C during the half second of imports ends the command without a traceback."""

import os
import signal
import sys
from collections.abc import Iterable


def main() -> None:
    """Import and run the command line, which then handles signals itself; an ignored Ctrl-C (nohup) stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import traceback
        import warnings

        from batchgen.limits import FEW_THREADS

        os.environ.update(FEW_THREADS)
        # Without shared memory no worker starts, and that error says all.
        warnings.filterwarnings("ignore", ".*joblib will operate in serial mode")
        warnings.filterwarnings("ignore", "A worker stopped while some jobs")  # another is started for it
        from batchgen.jobs.cli import main as command_line
    except (OSError, MemoryError) as error:  # such as a limit on open files
        sys.exit(f"batchgen: cannot be imported: {error!r}; perhaps a limit is reached (ulimit -n, -v)")
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if shadow := _file_here(frame.filename for frame in frames):
            remedy = "rename it, or start in another folder"
            sys.exit(f"batchgen: {shadow} is imported instead of the library of its name ({error}); {remedy}")
        where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"  # which names a variable that is wrong
        sys.exit(f"batchgen: cannot be imported: {error!r}, at {where}; correct that")

    command_line()


def _file_here(failed: Iterable[str]) -> str | None:
    """A module of the current folder that was imported, if one was; PYTHONPATH may name that folder."""
    loaded = [getattr(module, "__file__", None) for name, module in sys.modules.items() if "batchgen" not in name]
    files = [file for file in (*failed, *loaded) if file and "batchgen" not in file and not file.startswith("<")]
    return next((file for file in files if os.path.dirname(os.path.abspath(file)) == os.getcwd()), None)

"""Where the command begins: Ctrl-C in the half second that importing the rest takes ends it without a traceback."""

import signal


def main() -> None:
    """Import and run the command line, which then heeds signals itself; Ctrl-C that is ignored (nohup) stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from batchgen.jobs.cli import main as command_line

    command_line()

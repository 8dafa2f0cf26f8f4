"""The entry point: Ctrl-C during the half second of imports ends the command without a traceback."""

import signal


def main() -> None:
    """Import and run the command line, which then handles signals itself; an ignored Ctrl-C (nohup) stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from batchgen.jobs.cli import main as command_line

    command_line()

"""The command `batchgen`: its commands joined, and errors turned into one line and an exit code."""

import logging
import os
import sys
from typing import Annotated

import typer

from batchgen import __version__
from batchgen.errors import BatchgenError
from jobs.complete import complete
from jobs.convert import convert
from jobs.generate import generate
from jobs.models import models

app = typer.Typer(
    name="batchgen",
    help="Offline batch completions with GPT-2 on ordinary CPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, complete, convert, models):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchgen {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What comes before a command."""


def main() -> None:
    """Run the command line; a user's own mistake is one line on standard error, never a traceback."""
    logging.basicConfig(format="batchgen: %(message)s", level=logging.WARNING)
    try:
        app()
    except BatchgenError as error:
        typer.echo(f"batchgen: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("batchgen: interrupted; run the same command again to go on", err=True)
        _quit(130)
    except BrokenPipeError:  # whoever read our output has left; nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _quit(1)


def _quit(code: int) -> None:
    """Leave at once: at exit joblib would wait for what its workers are doing; they die with this process."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

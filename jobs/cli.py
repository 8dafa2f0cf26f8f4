"""The command `batchgen`: joins the commands, and turns errors into one line and an exit code."""

import gc
import logging
import os
import signal
import sys
import threading
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from batchgen import __version__
from batchgen.errors import BatchgenError
from batchgen.job import FLAGS
from batchgen.jobs.card import card
from batchgen.jobs.complete import complete
from batchgen.jobs.convert import convert
from batchgen.jobs.doctor import doctor
from batchgen.jobs.embed import embed
from batchgen.jobs.fetch import fetch
from batchgen.jobs.generate import generate
from batchgen.jobs.html_report import report
from batchgen.jobs.lm_eval import PASS_ON, lm_eval
from batchgen.jobs.logs import is_json, log_for_people
from batchgen.jobs.merge import merge
from batchgen.jobs.models import models
from batchgen.jobs.panels import Command, panel_of
from batchgen.jobs.peek import peek
from batchgen.jobs.plan import plan, plan_embed, plan_score
from batchgen.jobs.report import discard_stdout, one_line
from batchgen.jobs.score import score
from batchgen.jobs.verify import verify
from batchgen.limits import reached_limit
from batchgen.options import use_flags
from batchgen.progress import SIGNALS, exit_code_of, outcome, words_of, words_of_stop

logger = logging.getLogger(__name__)


class Commands(TyperGroup):
    """The commands; the name of one may be two words, as `plan score`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = " ".join(args[:2])
        return super().resolve_command(ctx, [name, *args[2:]] if name in self.commands else args)


app = typer.Typer(
    name="batchgen",
    cls=Commands,
    help="Offline batch completions with GPT-2 on ordinary CPUs.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # which joins the lines of a paragraph
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(plan, generate, complete),
    *(plan_score, score, plan_embed, embed),
    *(peek, merge, report, verify, card, fetch, convert, models, doctor),
):
    name = command.__name__.replace("_", " ")
    app.command(name, cls=Command, rich_help_panel=panel_of(name))(command)
app.command("lm-eval", cls=Command, rich_help_panel=panel_of("lm-eval"), context_settings=PASS_ON)(lm_eval)


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
    """Options before a command."""


def main() -> None:
    """Run the command line; a user's own mistake is one line on standard error, never a traceback."""
    _open_missing_streams()
    log_for_people()
    use_flags(FLAGS)
    _handle_signals()
    gc.freeze()  # what is imported stays; and rows hold no cycles, so that looking for them is lost time:
    gc.set_threshold(20_000, 20, 50)  # a quarter of the time of reading an input, else
    try:
        app(prog_name="batchgen")
    except Exception as error:
        if not isinstance(error, (BatchgenError, OSError)) and reached_limit(error) is None:
            raise
        _say(words_of(error))
        if isinstance(error, OSError):
            discard_stdout()  # it may be the file that cannot be written
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        _stop(130)
    except SystemExit as end:
        if end.code in SIGNALS:  # Typer makes 130 of a KeyboardInterrupt
            _stop(end.code)
        raise


def _handle_signals() -> None:
    """The first signal ends the run in order, the second immediately; ignored ones (nohup, `&` in a script) stay so.

    A terminal that is closed sends SIGHUP, and more than once.
    """
    seen: list[int] = []

    def terminate(number: int, frame: object) -> None:
        if seen and number == signal.SIGHUP:
            return
        if seen:
            _stop(128 + number)
        seen.append(number)
        # Python drops an exception that is raised while a finalizer runs.
        last_resort = threading.Timer(3, _stop, (128 + number,))
        last_resort.daemon = True
        last_resort.start()
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, terminate)


def _open_missing_streams() -> None:
    """Open the streams that a shell closed (`>&-`): the next opened file would take their number and their output.

    And wait for readers that are slow: what does not fit into a pipe that does not block is lost.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for output in (1, 2):
        os.set_blocking(output, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _say(text: str) -> None:
    if is_json():
        logger.error("%s", one_line(text))
    else:
        typer.echo(f"batchgen: {one_line(text)}", err=True)


def _stop(code: int) -> NoReturn:
    """Exit immediately: a normal exit would wait for the workers, which die with this process."""
    try:
        _say(words_of_stop(code))
    finally:
        os._exit(done.exit_code if (done := outcome()) else code)


if __name__ == "__main__":
    main()

"""batchgen peek: the rows of an output while its run works, and after it."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchgen.errors import UsageError
from batchgen.files import JsonObject as Row
from batchgen.input.kept import json_text
from batchgen.jobs.report import SHOWN, harmless, one_line, printable, row_line, rows_of_line, to_stdout
from batchgen.progress import SIGNALS
from batchgen.review.committed import Target
from batchgen.review.peek import RESUME, Peek, State
from batchgen.types import Kind

TABLE_ROWS = 10
CELL = 200  # characters of a value at most
NARROW = 16  # a column of such a width is never cut


def peek(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A run's output: a file, a folder or an address.")],
    rows: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Only the newest N rows; a table shows 10 without it.")
    ] = None,
    row: Annotated[
        int | None, typer.Option(min=0, help="Only this input row, by its number; a table shows all its columns.")
    ] = None,
    columns: Annotated[str | None, typer.Option(metavar="A,B", help="Only these columns.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print rows as they are committed, to the end.")] = False,
    as_json: Annotated[
        bool | None, typer.Option("--json/--table", help="JSON lines, or a table; a table on a terminal.")
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The --work-dir of the run, for an output in a store.")
    ] = None,
) -> None:
    """Show the rows of an output, also while its run works; the run is not disturbed.

    On a terminal: how far the run is, and its newest rows. Else, or with --json: all rows that are committed, in the
    order of the input, each as a .jsonl output has it. --follow prints every row once, as it is committed, until the
    output is finished (exit code 0), or the run was stopped or killed (75) or failed (1).

    Example: batchgen peek completions.parquet

    Example: batchgen peek completions.parquet --follow --columns id,completion
    """
    if follow and (rows or row is not None):
        raise UsageError("--follow prints all rows; leave out --rows and --row")
    if rows and row is not None:
        raise UsageError("--row is one row; leave out --rows")
    names = tuple(dict.fromkeys(name for name in (columns or "").split(",") if name))
    look = Peek(Target.of(output, work_dir), names)
    is_json = not sys.stdout.isatty() if as_json is None else as_json
    with _quiet_end(), to_stdout():
        if follow:
            _follow(look, is_json)
        elif row is not None:
            found = _find_row(look, row)
            (_write_json if is_json else _print_whole)(found, names)
        elif is_json:
            for some in [look.newest(rows)] if rows else look.committed():
                _write_json(some, names)
        else:
            _print_table(look, rows or TABLE_ROWS)
    for line in look.damaged:
        _say(f"batchgen: {line}")
    if look.damaged:
        sys.exit(1)


# ---- standard output


@contextmanager
def _quiet_end() -> Iterator[None]:
    """A signal ends a look without a word: there is nothing to resume."""
    try:
        yield
    except SystemExit as end:
        if end.code not in SIGNALS:
            raise
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(int(end.code))


def _write_json(rows: Iterable[Row], names: Sequence[str]) -> None:
    """As the .jsonl output has them; on a terminal, characters that it would obey are escaped, which JSON allows."""
    text = "".join(json_text(_pick(row, names)) + "\n" for row in rows)
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    sys.stdout.buffer.write(text.encode())


def _pick(row: Row, names: Sequence[str]) -> Row:
    return {name: row[name] for name in names} if names else row


# ---- what is printed


def _follow(look: Peek, is_json: bool) -> None:
    """Each row once; what is on standard error says why nothing comes, and how it ended."""
    said = None
    for rows in look.follow():
        if is_json:
            _write_json(rows, look.columns)
        else:
            for line in _lines(look, rows):
                typer.echo(line)
        sys.stdout.flush()
        phase = said if rows else (state := look.state()).phase
        if phase != said and phase in ("missing", "beginning", "unknown"):
            _say(_state_line(look.target, state))
        said = phase
    _say(_state_line(look.target, look.state()))


def _lines(look: Peek, rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if look.columns:
            yield "  ".join(_cell(row[name]) for name in look.columns)
        else:
            yield from (row_line(one, look.kind) for one in rows_of_line(row))


def _find_row(look: Peek, number: int) -> list[Row]:
    found = look.find_row(number)
    if not found:
        source = look.find()
        is_coming = not source.finished and (source.plan is None or number in source.plan.selection)
        what = "this row is not committed yet" if is_coming else "the output has no such row"
        what += ", or --no-rejects leaves it out" if source.plan and not source.plan.rejects else ""
        raise UsageError(f"{look.target.where}: row {number}: {what}; rows are counted from 0")
    return found


def _print_table(look: Peek, n: int) -> None:
    rows = [one for row in look.newest(n) for one in rows_of_line(row)]
    source = look.find()  # it may be finished by now
    typer.echo(_state_line(look.target, look.state(source)))
    if source.plan and not source.finished and source.plan.drops("completion"):
        typer.echo("note: duplicates of completions are found at the end: some of these rows may be dropped then")
    if rows:
        typer.echo()
        _print_cells(rows, look.columns or _useful(look.kind, rows))


def _useful(kind: Kind, rows: Sequence[Row]) -> list[str]:
    """Without columns that say nothing of these rows: the only sample, no id, no error."""
    names = ("row", "sample", "id", *SHOWN[kind], "status", "error")
    nothing = {"sample": (None, 0)}
    return [name for name in names if any(row.get(name) not in nothing.get(name, (None,)) for row in rows)]


def _print_cells(rows: Sequence[Row], names: Sequence[str]) -> None:
    """A line for each row: short columns whole, the others share what is left of the width."""
    console, table = Console(highlight=False), Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown = [[Text(_cell(row.get(name)), no_wrap=True, overflow="ellipsis") for row in rows] for name in names]
    for name, cells in zip(names, shown, strict=True):
        is_number = all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        is_short = max(cell.cell_len for cell in cells) <= NARROW
        table.add_column(Text(printable(name, NARROW)), justify="right" if is_number else "left", no_wrap=is_short)
    for line in zip(*shown, strict=True):
        table.add_row(*line)
    console.print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    return printable(value if isinstance(value, str) else json_text(value), CELL)


def _print_whole(rows: Iterable[Row], names: Sequence[str]) -> None:
    """A row by lines `name: value`; of a text with several lines, the others are indented."""
    for row in rows:
        for name, value in _pick(row, names).items():
            text = harmless(value if isinstance(value, str) else json_text(value)).replace("\n", "\n    ")
            typer.echo(f"{printable(name)}: {text}")
        typer.echo()


def _state_line(target: Target, state: State) -> str:
    counts = ", ".join(f"{n:,} {name}" for name, n in state.statuses.items() if n or name == "ok")
    committed = f"; committed rows: {counts}" if state.statuses.total() else ""
    rows = f"{state.rows:,} rows" if state.rows_done is None else f"{state.rows_done:,} of {state.rows:,} rows"
    left = f", {timedelta(seconds=round(state.eta_seconds))} left" if state.eta_seconds else ""
    silent = timedelta(seconds=round(state.silent_seconds))
    words = {
        "missing": "nothing is there yet; waiting for a run",
        "beginning": "a run begins; none of its rows is committed yet",
        "running": f"running: {rows}{left}{committed}",
        "killed": f"killed: its last status is {silent} old{committed}; {RESUME}",
        "stopped": f"stopped{committed}; {RESUME}",
        "failed": f"failed: {state.error}{committed}; correct that, and {RESUME}",
        "unknown": f"not finished; no status file says whether its run works{committed}",
        "finished": f"finished: {state.rows:,} input rows{f' ({counts})' if counts else ''}",
    }[state.phase]
    if state.phase == "running" and state.silent_seconds:
        words += f"; no word from it for {silent}, but its process is there"
    return one_line(f"{target.where}: {words}")


def _say(text: str) -> None:
    typer.echo(one_line(text), err=True)

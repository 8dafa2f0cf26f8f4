"""--help: the groups of commands, and for each command the options that people use, with the others by group."""

from inspect import cleandoc
from textwrap import fill
from typing import Any

import typer
from typer.core import TyperCommand

COMMANDS = {
    "Completions": ("plan", "generate", "complete"),
    "Scores": ("plan score", "score", "plan embed", "embed"),
    "Outputs": ("peek", "merge", "report", "verify", "card"),
    "Evaluation": ("lm-eval",),
    "Models": ("fetch", "convert", "models"),
    "This machine": ("doctor",),
}

# What --help explains of a command with many options.
USUAL = (
    *("output", "model", "max_tokens", "temperature", "top_p", "stop", "n", "seed"),
    *("text_column", "completion_column", "choices_column", "answer_column", "first_token", "stride", "per_token"),
    *("layer", "pool"),
    *("keep", "on_too_long", "jobs", "time_limit", "show", "time", "help", "help_all"),
)
MANY = 20


def panel_of(command: str) -> str:
    return next(panel for panel, commands in COMMANDS.items() if command in commands)


class Command(TyperCommand):
    """A command whose help is plain lines of any width: a table of Rich cuts flags and words at 80 columns."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        arguments = [one.metavar or one.name for one in self.get_params(ctx) if one.param_type_name == "argument"]
        formatter.write(" ".join(["Usage:", ctx.command_path, "[OPTIONS]", *arguments]) + "\n\n")
        for paragraph in cleandoc(self.help or "").split("\n\n"):
            formatter.write(_wrap(" ".join(paragraph.split()), formatter.width) + "\n\n")
        for title, rows in self._sections(ctx).items():
            formatter.write(f"{title}:\n{_table(rows, formatter.width)}\n")

    def _sections(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """By title: the arguments, the options that people use or all of them, and the names of the others."""
        sections: dict[str, list[tuple[str, str]]] = {}
        others: dict[str, list[str]] = {}
        shown = [(one, record) for one in self.get_params(ctx) if (record := one.get_help_record(ctx))]
        is_short = len(shown) > MANY and not ctx.params.get("help_all")
        for one, (names, text) in sorted(shown, key=lambda pair: pair[0].name in ("help", "help_all")):
            panel = getattr(one, "rich_help_panel", None) or "Options"
            if one.param_type_name == "argument":
                sections.setdefault("Arguments", []).append((one.metavar or names, text))
            elif is_short and one.name not in USUAL:
                others.setdefault(panel, []).append(one.opts[0])
            else:
                sections.setdefault("Options" if is_short else panel, []).append((names, text))
        if others:
            more = [(panel, ", ".join(names)) for panel, names in others.items()]
            sections["More options, explained by --help-all"] = more
        return sections


def _wrap(text: str, width: int, indent: str = "") -> str:
    return fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _table(rows: list[tuple[str, str]], width: int) -> str:
    """Names at the left, texts at the right; a long name has its own line."""
    left = min(max(len(name) for name, _ in rows), width // 3) + 4
    lines = []
    for name, text in rows:
        wrapped = _wrap(text, width, " " * left)
        fits = len(name) + 4 <= left
        lines.append(f"  {name}".ljust(left) + wrapped[left:] if fits else f"  {name}\n{wrapped}")
    return "\n".join(lines) + "\n"


def show_all(ctx: typer.Context, wanted: bool) -> None:
    """The callback of --help-all."""
    if wanted:
        ctx.params["help_all"] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


HELP_ALL = typer.Option("--help-all", is_eager=True, callback=show_all, help="Explain every option, by group.")

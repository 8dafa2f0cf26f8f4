"""A command line from records: each field that batchgen/options.py declares becomes an option of the command.

    @flatten()
    def complete(prompt: str, sampling: SamplingParams, policy: Policy) -> None: ...

has the options --max-tokens, --temperature, ..., --on-too-long, ..., and is called with the two records. A field may
also be declared as Typer has it: `quiet: Annotated[bool, typer.Option(...)] = False`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from batchgen.errors import UsageError
from batchgen.job import GROUPS
from batchgen.jobs.panels import HELP_ALL
from batchgen.options import Option, flag_of, off_flag_of, parse_escapes, show_escapes

Command = Callable[..., None]
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def flatten(*leave_out: str) -> Callable[[Command], Command]:
    """Give a command the options of the records that it takes, but for the fields to leave out, which keep defaults."""
    return lambda command: _flattened(command, frozenset(leave_out))


def _flattened(command: Command, leave_out: frozenset[str]) -> Command:
    own = inspect.signature(command, eval_str=True).parameters
    records = {name: one for name, one in own.items() if dataclasses.is_dataclass(one.annotation)}
    flat = {name: list(_parameters(one.annotation, leave_out, one.default)) for name, one in records.items()}

    @wraps(command)
    def run(**values: Any) -> None:
        values.pop("help_all")
        built = {name: _build(one.annotation, values, leave_out, one.default) for name, one in records.items()}
        command(**built, **values)

    parameters = [one for name, parameter in own.items() for one in flat.get(name, [parameter])]
    parameters.append(inspect.Parameter("help_all", _KEYWORD, default=False, annotation=Annotated[bool, HELP_ALL]))
    parameters = sorted((one.replace(kind=_KEYWORD) for one in parameters), key=_position)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _position(parameter: inspect.Parameter) -> tuple[int, bool]:
    """By group, and in it what must be given first; --help and docs/commands.md keep this order."""
    (declared,) = getattr(parameter.annotation, "__metadata__", (None,))
    group = getattr(declared, "rich_help_panel", None)
    return GROUPS.index(group) if group in GROUPS else -1, parameter.default is not inspect.Parameter.empty


def _typer_fields(record: Any) -> Iterator[tuple[Any, Any]]:
    """Each field that is declared as Typer has it, with its annotation."""
    kinds = get_type_hints(record, include_extras=True)
    return ((one, kinds[one.name]) for one in dataclasses.fields(record) if get_origin(kinds[one.name]) is Annotated)


def _fields(record: Any, leave_out: frozenset[str]) -> Iterator[tuple[Any, Option, str]]:
    """Each declared field, with the name of its option as a parameter: kv_bytes -> kv_memory, for --kv-memory."""
    for field in dataclasses.fields(record):
        declared = field.metadata.get("option")
        if declared is not None and field.name not in leave_out:
            yield field, declared, flag_of(field.name, declared)[2:].replace("-", "_")


def _parameters(record: Any, leave_out: frozenset[str], instead: Any) -> Iterator[inspect.Parameter]:
    """`instead` is a record that gives what no option gives; without one, fields without a default are required."""
    kinds = get_type_hints(record)
    for field, declared, name in _fields(record, leave_out):
        kind = _kind(kinds[field.name], declared)
        if field.default is dataclasses.MISSING:
            default = inspect.Parameter.empty if instead is inspect.Parameter.empty else None
        else:
            default = _default(field.default, declared)
        kind = kind | None if default is None and field.default is dataclasses.MISSING else kind
        annotation = Annotated[kind, _typer_parameter(field.name, declared, kind)]  # type: ignore[valid-type]
        yield inspect.Parameter(name, _KEYWORD, default=default, annotation=annotation)
    for field, annotation in _typer_fields(record):
        yield inspect.Parameter(field.name, _KEYWORD, default=field.default, annotation=annotation)


def _kind(kind: Any, declared: Option) -> Any:
    """The type that Typer sees: text for what has a parser or may be a path, a list for a tuple."""
    if declared.argument:
        return list[str]
    if declared.parse is not None:
        return str
    if get_origin(kind) is tuple:
        return list[get_args(kind)[0]] | None  # type: ignore[misc]
    return str if kind == str | Path else kind


def _default(default: Any, declared: Option) -> Any:
    if declared.parse is not None:
        return declared.show(default)
    if declared.escaped and default:
        return show_escapes(default) if isinstance(default, str) else [*map(show_escapes, default)]
    return None if default == () else default


def _typer_parameter(name: str, declared: Option, kind: Any) -> Any:
    if declared.argument:
        return typer.Argument(metavar=declared.metavar, help=declared.help)
    flag = flag_of(name, declared)
    off = off_flag_of(name, declared) if kind is bool else None
    flags = [f"{flag}/{off}" if off else flag, *([declared.short] if declared.short else [])]
    return typer.Option(*flags, metavar=declared.metavar, help=declared.help, rich_help_panel=declared.panel or None)


def _build(record: Any, values: dict[str, Any], leave_out: frozenset[str], instead: Any) -> Any:
    """The record, from the values of its options, which are taken out of `values`."""
    given = {field.name: values.pop(field.name) for field, _ in _typer_fields(record)}
    for field, declared, name in _fields(record, leave_out):
        value = values.pop(name)
        flag = flag_of(field.name, declared)
        if declared.parse is not None:
            value = _parse(flag, declared.parse, value)
        elif declared.escaped:
            value = _parse_texts(flag, value)
        elif declared.read is not None:
            value = _parse(flag, declared.read, value)
        if value is None and field.default is dataclasses.MISSING:
            value = getattr(instead, field.name)
        given[field.name] = () if value is None and field.default == () else value
    return record(**given)


def _parse_texts(flag: str, value: object) -> object:
    """A text, or each of several, with its escapes as characters."""
    if isinstance(value, list):
        return [_parse(flag, parse_escapes, text) for text in value]
    return value if value is None else _parse(flag, parse_escapes, str(value))


def _parse(flag: str, parse: Callable[[str], Any], text: str | None) -> Any:
    try:
        return parse(text) if text is not None else None
    except ValueError as error:
        raise UsageError(f"{flag} {error}") from error

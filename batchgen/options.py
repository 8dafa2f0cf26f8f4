"""Options, declared once: a field of a record says what it is on the command line, in a row and in Python.

A record is a frozen dataclass whose fields are made by `option`. jobs/flatten.py builds the command line of them,
`arguments` turns a record back into words, and `say` names an option in an error as the caller knows it.
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from batchgen.errors import UsageError

T = TypeVar("T")
Shard: TypeAlias = tuple[int, int]  # the k-th of n, k from 1 on

MAX_SHARDS = 1_000_000
OF_SLURM = "auto"
SLURM_ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option: what --help says, how it is spelled, and which values it may have."""

    help: str
    panel: str = ""  # its group in --help
    flag: str = ""  # on the command line; empty: the field's name
    off: str | None = ""  # of a boolean, the flag that unsets it; empty: --no-NAME; None: there is none
    short: str = ""  # -n
    metavar: str | None = None
    key: str = ""  # the name in errors, if the field's own is not unique; empty: the field's name
    within: tuple[float, float, str] | None = None  # lowest, highest, and the range in words
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None  # the text of the command line; ValueError says what is wrong with it
    read: Callable[[str], str] | None = None  # the same of a command line alone: a row of the input names no file
    show: Callable[[Any], str | None] = str  # the reverse; None: not given
    argument: bool = False  # given by its position
    escaped: bool = False  # a text in which a command line may write escapes such as \n; see parse_escapes


def option(default: Any, help: str, panel: str = "", **declared: Any) -> Any:
    """A dataclass field with an Option; see there. default MISSING: it must be given."""
    metadata = {"option": Option(help=help, panel=panel, **declared)}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def options_of(record: Any) -> dict[str, Option]:
    """The options of a record or of its type, by field."""
    fields = dataclasses.fields(record)
    return {one.name: one.metadata["option"] for one in fields if "option" in one.metadata}


def flag_of(name: str, declared: Option) -> str:
    """max_tokens -> --max-tokens"""
    return declared.flag or f"--{name.replace('_', '-')}"


def off_flag_of(name: str, declared: Option) -> str | None:
    """share_prefixes -> --no-share-prefixes; None if the flag can only be set."""
    return f"--no-{flag_of(name, declared)[2:]}" if declared.off == "" else declared.off


# ---- a record as words of a command line


def arguments(record: Any, without: Collection[str] = ()) -> Iterator[str]:
    """The words of a command line that make this record, without arguments, what has its default, and some fields.

    SamplingParams(max_tokens=8, stop=("a", "-b")) -> --max-tokens 8 --stop a --stop=-b
    """
    for one in dataclasses.fields(record):
        declared = one.metadata.get("option")
        value = getattr(record, one.name)
        if declared is not None and not declared.argument and value != one.default and one.name not in without:
            yield from words_of(one.name, declared, ("",) if value == () else value)  # no list instead of a default


def words_of(name: str, declared: Option, value: Any) -> Iterator[str]:
    """The words that give one option this value; none for (), None, and False without an off flag."""
    flag = flag_of(name, declared)
    if isinstance(value, bool):
        words = flag if value else off_flag_of(name, declared)
        yield from [words] if words else []
        return
    for item in value if isinstance(value, tuple) and declared.parse is None else (value,):
        if item is not None:
            text = str(declared.show(item))
            yield from with_value(flag, show_escapes(text) if declared.escaped else text)


def with_value(flag: str, text: str) -> Iterator[str]:
    """--stop a -> two words; --stop=-a -> one, because a word that begins with a dash would be an option."""
    yield from (f"{flag}={text}",) if text.startswith("-") else (flag, text)


# ---- keywords in Python


def check_keywords(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise UsageError, with the nearest, for a keyword that is none of the known."""
    names = list(known)
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"these are: {', '.join(names)}"
            raise UsageError(f"{name!r} is not an option of {what}; {remedy}")


def known_keywords(kind: type[T]) -> type[T]:
    """A class whose constructor names the nearest keyword for an unknown one."""
    construct: Callable[..., None] = kind.__init__
    known = list(signature(construct).parameters)[1:]  # without self

    @wraps(construct)
    def __init__(self: object, *values: object, **named: object) -> None:
        check_keywords(named, known, kind.__name__)
        construct(self, *values, **named)

    kind.__init__ = __init__  # type: ignore[method-assign]
    return kind


def split_keywords(given: Mapping[str, object], *records: Any) -> list[dict[str, object]]:
    """The fields of each record: {"n": 2, "trim": True}, SamplingParams, Policy -> [{"n": 2}, {"trim": True}]"""
    known = {
        declared.key or name: (at, name)
        for at, one in enumerate(records)
        for name, declared in options_of(one).items()
        if not declared.argument
    }
    check_keywords(given, known, " or ".join(record.__name__ for record in records))
    split: list[dict[str, object]] = [{} for _ in records]
    for key, value in given.items():
        at, name = known[key]
        split[at][name] = value
    return split


# ---- names in errors

_flags: dict[str, tuple[str, str | None]] = {}  # by name: the flag, and the one that unsets it


def use_flags(flags: Mapping[str, tuple[str, str | None]]) -> None:
    """Name options by their flags from here on: errors of this process are read at a command line."""
    _flags.clear()
    _flags.update(flags)


def flags_in_use() -> dict[str, tuple[str, str | None]]:
    """What another process needs for `use_flags`."""
    return dict(_flags)


def flags_of(records: Iterable[Any]) -> dict[str, tuple[str, str | None]]:
    """The flags of some types of records, for `use_flags`."""
    return {
        declared.key or name: (flag_of(name, declared), off_flag_of(name, declared))
        for record in records
        for name, declared in options_of(record).items()
    }


def say(name: str, value: object = None) -> str:
    """An option, or an option with a value, as the reader of an error writes it.

    say("on_too_long", "shorten") -> `--on-too-long shorten` at a command line, `on_too_long='shorten'` in Python
    """
    flag, off = _flags.get(name, ("", None))
    if not flag:
        return name if value is None else f"{name}={value!r}"
    if value is None or value is True:
        return flag
    return (off or f"no {flag}") if value is False else f"{flag} {value}"


# ---- ranges


def plain(value: Any) -> Any:
    """A number or an array of NumPy as Python's; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_ranges(record: Any) -> None:
    """Raise UsageError, with the range, for a field that is out of it; None passes where it is the default.

    A text becomes what it says at a command line: kv_bytes="2G", work_dir="here"; a number of NumPy becomes Python's.
    """
    for one in dataclasses.fields(record):
        declared: Option | None = one.metadata.get("option")
        value = plain(given := getattr(record, one.name))
        if value is not given:
            object.__setattr__(record, one.name, value)
        if declared is None or (value is None and one.default is None):
            continue
        if one.default is None:
            value = _from_text(declared.key or one.name, one.type, declared, value)
            object.__setattr__(record, one.name, value)
        if declared.choices and value not in declared.choices:
            raise UsageError(f"{one.name} {shown(value)} is none of {', '.join(declared.choices)}; choose one of these")
        if declared.within:
            low, high, words = declared.within
            number = is_number(value) and not (isinstance(low, int) and isinstance(value, float))
            if not number or not low <= value <= high:
                raise UsageError(f"{one.name} {shown(value)} is out of range ({words})")
        elif isinstance(one.default, bool) and not isinstance(value, bool):
            raise UsageError(f"{one.name} {shown(value)} is out of range (true or false)")


def _from_text(name: str, kind: object, declared: Option, value: object) -> object:
    """The value itself, if it is not a text; UsageError for one that no command line can give."""
    if declared.parse is None:
        return Path(value) if kind == Path | None and isinstance(value, str) else value
    try:
        parsed = declared.parse(value if isinstance(value, str) else str(declared.show(value)))
    except (TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else f"{shown(value)} is of the wrong type; give a number"
        raise UsageError(f"{say(name)} {reason}") from error
    return parsed if isinstance(value, str) else value


def is_number(value: object) -> bool:
    """Whether it is a finite number; every integer is, however long (too long for math.isfinite)."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def shown(value: object) -> str:
    """repr, of bounded length and of printable characters: a row of the input may hold anything."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"({type(value).__name__}, nested too deeply)"
    end = text[-1] if text[-1:] in tuple("'\")]}") else ""  # closed, so that a reader sees where the value ends
    return text if len(text) <= 60 else f"{text[: 57 - len(end)]}...{end}"


def find_escape(text: str) -> str | None:
    r"""The first `\n` or the like in a text that is not the character but a backslash and a letter."""
    found = re.search(r"\\(?:[nrt]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})", text)
    return found and found[0]


# ---- how values are written on a command line

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_HEX = r"x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}"
_PAIR = r"u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # the two halves of one character, as JSON has them
_ESCAPE = re.compile(rf"\\(?:([ntr\\])|({_PAIR})|({_HEX}))")


def parse_escapes(text: str) -> str:
    r"""A text of a command line with its escapes as characters; a backslash before anything else is itself.

    `a\nb` -> a, a line feed, b; `\\n` -> a backslash and an n; `\d` -> itself; `\xe9`, `\u00e9`, `\U000000e9` -> é
    Raises ValueError for the code of what is no character.
    """
    return _ESCAPE.sub(_unescape, text) if "\\" in text else text


def _unescape(found: re.Match[str]) -> str:
    plain, pair, code = found.groups()
    if plain:
        return _ESCAPES[plain]
    if pair:
        return bytes.fromhex(pair[1:5] + pair[7:]).decode("utf-16-be")
    number = int(code[1:], 16)
    if number > sys.maxunicode or 0xD800 <= number < 0xE000:
        raise ValueError(f"{found[0]} is the code of no character; correct it, or write \\\\ for a backslash")
    return chr(number)


def show_escapes(text: str) -> str:
    """The reverse: one line, of printable characters and of halves of surrogate pairs, which no escape can make."""
    return "".join(map(_escape, text))


def _escape(character: str) -> str:
    if character == "\\" or not (character.isprintable() or 0xD800 <= ord(character) < 0xE000):
        return character.encode("unicode_escape").decode()
    return character


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_auto(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """Also accept `auto`, which is None."""
    return lambda text: None if text == "auto" else parse(text)


def show_auto(value: int | None) -> str:
    """The reverse."""
    return "auto" if value is None else str(value)


def parse_count(text: str) -> int:
    """A whole number from 1."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise ValueError(f"{text!r}: must be a whole number from 1 on, or auto")
    return int(text)


def parse_rows(text: str) -> int:
    """A number of rows, from 1."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise ValueError(f"{text!r}: must be a whole number from 1 on; leave it out for all rows")
    return int(text)


def show_rows(value: int | None) -> str | None:
    """The reverse; None is all of them."""
    return None if value is None else str(value)


def parse_size(text: str) -> int:
    """A number of bytes: `1536M` -> 1610612736."""
    match = re.fullmatch(r"(\d{1,16})([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r}: not a size; write it as 1536M or 2G")
    if not int(match[1]):
        raise ValueError(f"{text!r} is out of range (a byte or more); leave it out: it is automatic then")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_duration(text: str) -> float:
    """Seconds: `90s` -> 90.0, `50m` -> 3000.0, `1h30m` -> 5400.0."""
    bare = re.fullmatch(r"(?:.*([smhd]))?\d{1,9}(?:\.\d{1,9})?", text)
    if bare and (units := {None: "smh", "d": "smh", "h": "sm", "m": "s"}.get(bare[1])):
        *others, last = (text + unit for unit in units)
        raise ValueError(f"{text!r} has no unit; write {' or '.join(filter(None, [', '.join(others), last]))}")
    parts = re.findall(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < 1e9:
        raise ValueError(f"{text!r}: not a time; write it as 90s, 50m or 1h30m")
    return seconds


def show_duration(seconds: float | None) -> str | None:
    """90.0 -> `90s`"""
    return None if seconds is None else f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def parse_token_ids(text: str) -> tuple[int, ...]:
    """`198,13` -> (198, 13)"""
    return tuple(map(_parse_token_id, _parts(text)))


def show_token_ids(value: tuple[int, ...]) -> str:
    """(198, 13) -> `198,13`"""
    return ",".join(map(str, value))


def parse_biases(text: str) -> tuple[tuple[int, float], ...]:
    """`198=-100,464=2.5` -> ((198, -100.0), (464, 2.5))"""
    return tuple(dict(map(_parse_bias, _parts(text))).items())


def show_biases(value: tuple[tuple[int, float], ...]) -> str:
    """((198, -100.0), (464, 2.5)) -> `198=-100.0,464=2.5`"""
    return ",".join(f"{token}={float(bias)!r}" for token, bias in value)


def _parse_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    number = _parse_token_id(token)
    try:
        return number, float(bias)
    except ValueError as error:
        raise ValueError(f"{text!r}: write it as a token id and a number, such as 198=-100") from error


def read_regex(text: str) -> str:
    """Not empty: a variable that is not set would let through any text."""
    if not text:
        raise ValueError("'' is empty; write a regular expression, or leave it out")
    return text


def read_schema(text: str) -> str:
    """A JSON object's text, which begins with {, or that in a file: schema.json, or as curl has it @schema.json."""
    return text if text.lstrip().startswith("{") else _read_pattern(text, 'JSON text begins with "{"')


def read_grammar(text: str) -> str:
    """A grammar's text, which has a rule `start:`, or that in a file: list.lark, or @list.lark."""
    is_text = not text.startswith("@") and re.search(r"^\s*start\b[^:\n]*:", text, re.MULTILINE)
    return text if is_text else _read_pattern(text, 'a grammar has a rule "start: ..."')


def _read_pattern(name: str, otherwise: str) -> str:
    try:
        with Path(name.removeprefix("@")).open("rb") as file:
            return file.read(2**20).decode("utf-8-sig")  # more than any pattern may have
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8" if "\0" not in name else "a null"
        raise ValueError(f"{shown(name)} cannot be read as a file ({reason}); {otherwise}") from error


def _parts(text: str) -> list[str]:
    """Between commas; none of an empty text."""
    return text.split(",") if text.strip() else []


def _parse_token_id(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise ValueError(f"{text!r}: not a token id; write whole numbers from 0 on")
    return int(text)


# ---- fields whose text is parsed; None is automatic


def count(help: str, panel: str, **declared: Any) -> Any:
    """A field for a whole number from 1."""
    return option(None, help, panel, parse=parse_auto(parse_count), show=show_auto, **declared)


def rows(help: str, panel: str) -> Any:
    """A field for a number of rows; None: all of them."""
    return option(None, help, panel, metavar="N", parse=parse_rows, show=show_rows)


def size(help: str, panel: str, **declared: Any) -> Any:
    """A field for a number of bytes."""
    return option(None, help, panel, parse=parse_auto(parse_size), show=show_auto, **declared)


def duration(help: str, panel: str, **declared: Any) -> Any:
    """A field for seconds; None: no limit."""
    return option(None, help, panel, metavar="TIME", parse=parse_duration, show=show_duration, **declared)


# ---- shards of an input


def parse_shard(text: str) -> Shard:
    """`3/8` -> (3, 8); `auto`: the task of a Slurm array that this process is."""
    if text == OF_SLURM:
        return _slurm_shard()
    match = re.fullmatch(r"\s*(\d{1,7})\s*/\s*(\d{1,7})\s*", text)
    if not match:
        raise ValueError(f"{text!r}: not a part of a whole; write 3/8 for the third of eight, or auto in a Slurm array")
    k, n = int(match[1]), int(match[2])
    if not 1 <= k <= n <= MAX_SHARDS:
        n = min(max(n, 1), MAX_SHARDS)
        raise ValueError(f"{text!r} is out of range (1/{n} to {n}/{n})")
    return k, n


def show_shard(shard: Shard | None) -> str | None:
    """(3, 8) -> `3/8`"""
    return None if shard is None else "/".join(map(str, shard))  # whatever a caller in Python has given


def _slurm_shard() -> Shard:
    """The place of this task in its array, whose ids may begin anywhere and have steps: --array=0-7, --array=1-15:2"""
    try:
        task, first, last, count = (int(os.environ[name]) for name in SLURM_ARRAY)
        step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
    except KeyError as error:
        raise ValueError(f"'auto': this is no task of a Slurm array ({error.args[0]} is not set); write 3/8") from error
    except ValueError as error:
        raise ValueError(f"'auto': the variables of the Slurm array are no numbers ({error}); write 3/8") from error
    k, rest = divmod(task - first, max(step, 1))
    if rest or not 0 <= k < count or last - first != (count - 1) * step:
        ids = f"task {task} of {count} from {first} to {last}"
        what = f"{ids} has no place in a row of tasks with steps of {step}"
        raise ValueError(f"'auto': {what}; write --array=1-{count}, or its own shard, such as 3/8")
    return k + 1, count


def check_shard(shard: object) -> None:
    """Raise UsageError for what is no shard; a text is parsed before."""
    good = isinstance(shard, tuple) and len(shard) == 2 and all(type(part) is int for part in shard)
    if shard is not None and not (good and 1 <= shard[0] <= shard[1] <= MAX_SHARDS):  # type: ignore[index]
        raise UsageError(f"shard {shard!r} is out of range ((1, 8) to (8, 8), or '3/8')")

r"""Prompts that are made of columns: `Q: {question}\nA:`, in the notation of str.format without its formats."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from batchgen.errors import UsageError
from batchgen.input.kept import json_text, shared_spelling
from batchgen.input.targets import prompt_option
from batchgen.input.words import check_characters, find_surrogate
from batchgen.job import InputOptions
from batchgen.limits import reason_of
from batchgen.options import say, shown

MAX_BYTES = 2**20  # of a template's file


class Field(NamedTuple):
    """A column of a template, the text in front of it, and the option that names it."""

    before: str
    column: str
    option: str = "template"


@dataclass(frozen=True)
class Template:
    """What a prompt is made of."""

    fields: tuple[Field, ...]
    end: str = ""  # after the last field

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Each column once."""
        return tuple(dict.fromkeys(field.column for field in self.fields))

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """The columns, and those that hold them: none of them is a parameter. a.b -> a.b, a"""
        return (*self.columns, *(column.partition(".")[0] for column in self.columns))

    def fill(self, values: Mapping[str, object]) -> str:
        """The prompt of a row with these values, as JSON has them; UsageError, naming the column, if one has no text.

        "Q: {a}?" with a="x" -> "Q: x?"; with 7.0 -> "Q: 7?"; with True -> "Q: true?"; with [1, "x"] -> 'Q: [1, "x"]?'
        """
        texts = {column: _text_of(column, values[column]) for column in self.columns}
        return "".join(part for field in self.fields for part in (field.before, texts[field.column])) + self.end


def _text_of(column: str, value: object) -> str:
    """A text as it is, anything else as JSON; UsageError for what is none."""
    if value is None:
        raise UsageError(f"{shown(column)} is null, and its prompt needs a value; write one, or leave the row out")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{shown(column)} is {value}, and its prompt needs a value; write one, or leave the row out")
    if isinstance(value, bytes):
        raise UsageError(f"{shown(column)} is not UTF-8; write the column as UTF-8 strings")
    text = value if isinstance(value, str) else json_text(shared_spelling(value))
    check_characters(shown(column), text)
    return text


# ---- from text


@lru_cache(maxsize=8)
def parse_template(text: str) -> Template:
    """`Q: {a} {{x}}` -> the text "Q: ", the column a, the text " {x}"; UsageError with the place of what is wrong."""
    if code := find_surrogate(text):
        raise UsageError(f"a lone surrogate ({code}) is not a character; remove it")
    fields: list[Field] = []
    before, at = "", 0
    pieces = iter(Formatter().parse(text))
    while True:
        try:
            literal, column, form, conversion = next(pieces)
        except StopIteration:
            break
        except ValueError as error:
            brace = min(place for place in (text.find("{", at), text.find("}", at)) if place >= 0)
            what = f"{text[brace]} opens or closes no column"
            remedy = "write {column}, or for the brace itself {{ or }}"
            raise UsageError(f"{_place(text, brace)}: {what}; {remedy}") from error
        before, at = before + literal, at + len(literal)
        if column is None:
            at += literal[-1:] in ("{", "}")  # which is written twice
            continue
        end = text.index("}", at)  # no field that is accepted holds one
        _check_field(text, at, column, text[at + 1 + len(column) : end], f"{conversion or ''}{form}")
        fields.append(Field(before, column))
        before, at = "", end + 1
    if not fields:
        raise UsageError("it names no column, so every prompt would be the same; write one: {question}")
    return Template(tuple(fields), before)


def _check_field(text: str, at: int, column: str, more: str, form: str) -> None:
    """Raise UsageError for what str.format knows, and a template does not."""
    found = text[at : at + 40].split("}")[0] + "}"
    if more or form:
        remedy = (
            f"values are written as they are; write {{{column or 'column'}}}, or rename a column that has "
            f"{(more + form)[:1]} in its name, or write {{{{ and }}}} for braces"
        )
        raise UsageError(f"{_place(text, at)}: {found} asks for a format; {remedy}")
    if "[" in column or "]" in column:
        remedy = "name a column, a key of an object as {a.b}, or rename a column that has a bracket in its name"
        raise UsageError(f"{_place(text, at)}: {found} asks for an item; {remedy}")
    if not column or column.isdecimal():
        raise UsageError(f"{_place(text, at)}: {found} has no name; name a column: {{question}}")


def _place(text: str, at: int) -> str:
    """`character 5`, or `line 2, character 5`, from 1."""
    line, character = text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1
    return f"line {line}, character {character}" if "\n" in text else f"character {character}"


def _read_file(path: Path) -> str:
    """The text of a template's file, without a byte order mark and one line end at its end; CRLF is a line feed."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{say('template_file')} {path}: cannot be read: {reason_of(error)}; check the name"
        ) from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{say('template_file')} {path}: is longer than {MAX_BYTES} bytes; is this the input?")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        what = f"invalid UTF-8 at byte {error.start + 1}"
        raise UsageError(f"{say('template_file')} {path}: {what}; save the file as UTF-8") from error
    return text.removesuffix("\n")


def with_template(options: InputOptions) -> InputOptions:
    """The options with the text of the template's file, if they name one; UsageError for a template that is broken."""
    where = say("template")
    if options.template_file is not None:
        where = f"{say('template_file')} {options.template_file}"
        options = replace(options, template=_read_file(options.template_file), template_file=None)
    if options.template is not None:
        try:
            parse_template(options.template)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
    return options


# ---- examples


@dataclass(frozen=True, slots=True)
class Examples(InputOptions):
    """The file of the option shots, as an input: each row is a prompt and what follows it."""

    completion: str = ""  # the column that follows


@dataclass(frozen=True, slots=True)
class Shots:
    """Examples, as the text in front of every prompt."""

    text: str
    number: int
    paths: tuple[Path, ...]  # of their local files


def template_of(options: InputOptions) -> Template | None:
    """What the prompts of an input are made of; None: they are a column."""
    found = parse_template(options.template) if options.template is not None else None
    if not isinstance(options, Examples):
        return found
    fields, end = (found.fields, found.end) if found else ((Field("", options.prompt_column, "prompt_column"),), "")
    return Template((*fields, Field(end, options.completion, "shots_column")))


def prompt_columns(options: InputOptions) -> dict[str, str]:
    """The columns that a prompt is made of, each with the option that names it."""
    if template := template_of(options):
        return {field.column: field.option for field in template.fields}
    return {options.prompt_column: prompt_option(options)}
